"""What fine-tuning learns from, as packed rows: an embedded task's scripted teacher, or a file of conversations."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from axpo.config import SftConfig
from axpo.conversation import Conversation
from axpo.data import Rows
from axpo.order import shuffled
from axpo.tasks import fingerprint, get_task
from axpo.tasks.conversations import conversation_row
from axpo.tasks.scripted import scripted_teacher
from axpo.tasks.teacher import Row
from axpo.tools import tool_class
from axpo.trajectory import PROMPT, SAMPLED, Trajectory
from axpo.tree import PackedBatch, build_trees, with_labels
from engine import Processor

CACHED = 20_000  # trees of an embedded task, a few kilobytes each; rows of a file are read again in every epoch


class SftData:
    """This rank's share of every step; example i is the same whatever the number of ranks.

    Raises:
        ValueError: rows of the file that cannot be used, or longer than sft.max_tokens.
    """

    def __init__(self, source: Path, config: SftConfig, rank: int, world_size: int):
        self.config = config
        self.rank, self.world_size = rank, world_size
        self.processor = Processor.from_pretrained(source)
        self._file: Rows | None = None
        if config.data.task == "jsonl":
            self._file = Rows(config.data.path)
            self._file.check(config.data.check_rows, conversations=True)
            # Nothing is called here, so that a search without its key can be offered.
            schemas = [tool_class(name).function() for name in config.sft.tools]
            self._conversation = Conversation(self.processor, {}, schemas)
        else:
            self._task = get_task(config.data.task)
            self._teach = scripted_teacher(
                config.data.task, config.sft.style, self.processor, config.python.model_dump()
            )
        if len(self) < 1:
            raise ValueError(
                f"sft.heldout_examples = {config.sft.heldout_examples}: there are {self._all} examples in all; "
                "leave some to train on"
            )
        self._tree = lru_cache(CACHED if self._file is None else 0)(self._make_tree)

    def fingerprint(self) -> dict[str, Any]:
        """Name, number and content of what is learned from."""
        if self._file is None:
            return fingerprint(self._task)
        return {"task": "jsonl", "questions": len(self), "sha256": self._file.content_hash()}

    def __len__(self) -> int:
        """Different examples to train on; an epoch goes through them all."""
        return self._all - self.config.sft.heldout_examples

    @property
    def _all(self) -> int:
        return self.config.sft.examples if self._file is None else len(self._file)

    def heldout(self) -> list[PackedBatch]:
        """This rank's share of the last examples, which are not trained on."""
        return [self._tree(example) for example in range(len(self), self._all)[self.rank :: self.world_size]]

    def batch(self, step: int) -> list[PackedBatch]:
        """This rank's share of the examples of step 1, 2, …; every epoch has a new order."""
        size = self.config.sft.batch_size
        wanted = np.arange((step - 1) * size, step * size)[self.rank :: self.world_size]
        return [self._tree(shuffled(self.config.run.seed, int(position), len(self))) for position in wanted]

    def _make_tree(self, example: int) -> PackedBatch:
        question_id, row = self._row(example)
        if len(row.tokens) > self.config.sft.max_tokens:
            raise ValueError(
                f"{question_id}: {len(row.tokens)} tokens, sft.max_tokens is {self.config.sft.max_tokens}; "
                "raise it, or leave the row out"
            )
        tree = build_trees([self._trajectory(question_id, example, row)], {}, self.processor.image_token_id)[0]
        weight = self.config.sft.image_label_weight
        return with_labels(tree, row.image_labels, weight) if weight and row.image_labels else tree

    def _row(self, example: int) -> tuple[str, Row]:
        if self._file is not None:
            found = self._file[example]
            return f"{self._file.place(example)}: row {found.id!r}", conversation_row(found, self._conversation)
        question = self._task.question("train", example % self._task.size("train"))
        rng = np.random.default_rng([self.config.run.seed, example])
        return question.id, self._teach(question, rng)

    def _trajectory(self, question_id: str, example: int, row: Row) -> Trajectory:
        length = len(row.tokens)
        return Trajectory(
            step=0,
            question_id=question_id,
            group=example,
            id=f"teacher/{example}",
            parent=None,
            fork_token=None,
            prompt_len=row.loss_mask.index(1),
            tokens=row.tokens,
            roles=[SAMPLED if trained else PROMPT for trained in row.loss_mask],
            loss_mask=row.loss_mask,
            logprobs=[None] * length,
            entropies=[None] * length,
            advantages=[0.0] * length,
            reward=1.0,
            status="answered",
            tool_calls=[],
            confidence=None,
            text="",
            images=row.images,
            positions=self.processor.positions(row.tokens, row.images),
        )
