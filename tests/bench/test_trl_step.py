"""What the comparison with TRL holds equal, where TRL itself is not needed."""

import argparse
from pathlib import Path

import pytest
from PIL import Image

from axpo.conversation import Conversation
from axpo.order import shuffled
from axpo.paths import model_directory
from axpo.tasks import get_task
from bench import trl_step
from engine import Processor


def test_the_prompt_that_trl_must_have_is_the_trainers():
    processor, task = Processor.from_pretrained(model_directory("mini")), get_task("mini")
    question = task.question("train", shuffled(trl_step.SEED, 0, task.size("train")))
    ours = Conversation(processor, {}).prompt(question.messages, [processor.image(i) for i in question.images])
    trl_step._check_prompt(ours)
    with pytest.raises(ValueError, match="TRL's prompt differs from ours"):
        trl_step._check_prompt(ours[:-1])


def test_questions_are_those_of_the_steps_in_their_order(tmp_path: Path):
    task = get_task("mini")
    rows = trl_step._questions(argparse.Namespace(steps=2, questions=3), tmp_path)
    assert len(rows) == 6
    for position, row in enumerate(rows):
        question = task.question("train", shuffled(trl_step.SEED, position, task.size("train")))
        assert row["question"] == question.messages[0]["content"][1]["text"] and row["answer"] == question.answer
        with Image.open(row["image"]) as image:
            assert image.tobytes() == question.images[0].tobytes(), "lossless"


def test_without_its_environment_it_says_how_to_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trl_step, "ENVIRONMENT", tmp_path)
    with pytest.raises(SystemExit, match="--setup-peers makes its environment"):
        trl_step.trl(argparse.Namespace(questions=8, group_size=8), 64, tmp_path)
