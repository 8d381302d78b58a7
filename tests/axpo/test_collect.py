"""Collected rows are the rollouts' own tokens, a killed collection goes on, and the filter keeps what RL can learn."""

import json
from pathlib import Path
from typing import Any

import pytest

from axpo.branch import Limits
from axpo.cli import resolve
from axpo.collect import Collection, collect, conversation, read_outcomes, summary
from axpo.config import CollectConfig
from axpo.data import Rows
from axpo.data.__main__ import filter_file
from axpo.data.select import RlQuestions
from axpo.data.write import write_rows
from axpo.outfolder import OutFolderError
from axpo.rollout import Agent
from axpo.tasks import get_task
from axpo.tasks.conversations import conversation_row
from axpo.trajectory import SAMPLED
from tests.axpo.pipeline_worker import COLLECT


def config(out: Path, **options: Any) -> CollectConfig:
    given = {**COLLECT, "collect.out": out} | {name.replace("__", "."): value for name, value in options.items()}
    return resolve(CollectConfig, [f"--{name}={value}" for name, value in given.items()], recipe="mini")


def test_a_row_has_the_tokens_of_its_rollout(tmp_path: Path, agent: Agent):
    task = get_task("mini")
    questions = [(index, task.question("train", index)) for index in range(5)]
    groups = agent.rollouts(0, questions, 4, Limits(max_turns=3, max_new_tokens=96, max_tokens=512))
    branches = [b for group in groups for b in group if b.status == "answered"]
    assert any(b.calls for b in branches) and any(not b.calls for b in branches)
    write_rows((conversation(agent, b) for b in branches), tmp_path / "rows.parquet")
    rows = Rows(tmp_path / "rows.parquet")
    rows.check(conversations=True)
    for branch, row in zip(branches, rows, strict=True):
        learned = conversation_row(row, agent.conversation)
        assert row.meta["tools"] == [call.name for call in branch.calls]
        assert row.rubric == branch.question.rubric
        if row.meta["exact"]:
            assert learned.tokens == branch.sequence.token_ids
            assert learned.loss_mask == [int(role == SAMPLED) for role in branch.roles]
            assert [image.key for image in learned.images] == [image.key for image in branch.sequence.images]
        else:
            decode = agent.conversation.processor.decode
            assert decode(learned.tokens) == decode(branch.sequence.token_ids)
    assert sum(row.meta["exact"] for row in rows) > len(branches) / 2
    for group in groups:
        agent.close(group)


def test_right_trajectories_become_rows_and_a_killed_collection_goes_on(tmp_path: Path, agent: Agent):
    settings = config(tmp_path)
    task = get_task("mini")
    collect(agent, task, settings, Collection(settings))
    outcomes = list(read_outcomes(tmp_path))
    assert [one["id"] for one in outcomes] == [f"mini/train/{index}" for index in range(3)]
    right = {f"0/{one['id']}/{i}" for one in outcomes for i, reward in enumerate(one["rewards"]) if reward}
    rows = list(Rows(tmp_path / "rows"))
    assert {row.id for row in rows} == right and right
    used = {f"0/{one['id']}/{i}": names for one in outcomes for i, names in enumerate(one["tools"])}
    assert all(row.meta["tools"] == used[row.id] for row in rows)
    cells = dict(zip(*([*column.cells] for column in summary(outcomes).columns), strict=True))
    assert cells["trajectories"] == "12" and cells["right"].startswith(f"{len(right)} (")
    tool_share = sum(bool(used[name]) for name in right) / len(right)
    assert cells["right ones with a tool call"] == f"{tool_share:.1%}"
    # Killed between a batch's rows and its outcomes.
    kept = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.suffix in (".jsonl", ".parquet")}
    (tmp_path / "outcomes" / "00000001.jsonl").unlink()
    collect(agent, task, settings, Collection(settings))
    assert {file: file.read_bytes() for file in kept} == kept
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(ValueError, match=r"collect\.samples = 3: .* holds results of 4"):
        Collection(config(tmp_path, collect__samples=3))
    (tmp_path / "outcomes" / "00000009.part").mkdir()  # refuses as a full disk does, with an OSError
    with pytest.raises(OutFolderError, match=r"could not be written: Is a directory; .* goes on with what is whole"):
        Collection(settings).write(9, [{}], [])


def test_the_filter_keeps_what_rl_can_learn_from(tmp_path: Path):
    rows = [{"id": name, "question": "x", "answer": "7", "images": []} for name in "abcd"]
    write_rows(rows, tmp_path / "rows.jsonl")
    student = {"a": [1, 1, 1, 1], "b": [1, 1, 1, 0], "c": [0, 0, 0, 0], "d": [0, 0, 0, 0]}
    teacher = {"a": [1, 1, 1, 1], "b": [0, 0, 0, 1], "c": [1, 0, 0, 0], "d": [0, 0, 0, 0]}
    chosen = RlQuestions(Rows(tmp_path / "rows.jsonl"), student, teacher)
    write_rows(chosen, tmp_path / "rl.parquet")
    kept = list(Rows(tmp_path / "rl.parquet"))
    assert [row.id for row in kept] == ["b", "c"] and (chosen.seen, chosen.solved, chosen.failed) == (4, 1, 1)
    assert kept[0] == Rows(tmp_path / "rows.jsonl")[1], "the question is asked as before"
    del teacher["c"]
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: row 'c' is not in the outcomes of the teacher"):
        list(RlQuestions(Rows(tmp_path / "rows.jsonl"), student, teacher))


def test_the_filter_command_reads_two_collections(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_rows([{"id": name, "question": "x", "answer": "7"} for name in "ab"], tmp_path / "rows.parquet")
    for who, rewards in (("student", {"a": [1, 1], "b": [0, 1]}), ("teacher", {"a": [1, 0], "b": [0, 1]})):
        for number, (name, given) in enumerate(rewards.items()):
            file = tmp_path / who / "outcomes" / f"{number:08d}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"id": name, "rewards": given}) + "\n")
    out, rows, folders = tmp_path / "rl.jsonl", tmp_path / "rows.parquet", (tmp_path / "student", tmp_path / "teacher")
    write_rows([{"id": "c", "question": "y", "answer": "8"}], tmp_path / "more.jsonl")
    filter_file(*folders, rows, out)
    assert [row.id for row in Rows(out)] == ["b"]
    assert "1 of 2 rows; left out: 1 that the student always solves, 0 that" in capsys.readouterr().out
    filter_file(*folders, rows, out, [tmp_path / "more.jsonl"])
    assert [row.id for row in Rows(out)] == ["b", "c"]
    assert "1 of 2 rows and 1 others; left out: 1 that" in capsys.readouterr().out
    write_rows([{"id": "a", "question": "x", "answer": "7"}], rows)
    with pytest.raises(ValueError, match=r"rows\.parquet: no row is left to learn from"):
        filter_file(*folders, rows, out)
    assert not out.exists()
    with pytest.raises(ValueError, match=r"nowhere: no outcomes/\*\.jsonl"):
        filter_file(tmp_path / "nowhere", tmp_path / "teacher", rows, out)
