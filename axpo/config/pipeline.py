"""The stages of the paper's pipeline: what each public command is told besides what the pipeline tells it."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from axpo.config.base import Count, CountOrOff, Section
from axpo.config.rollout import NAME

_TAKEN = ("teacher", "base", "sft", "student", "evaluated", "comparison", "stages")


class Stages(Section):
    name: str = Field(default="pipeline", pattern=NAME, description="name of the folder that all stages write to")
    dir: str = Field(default="runs", min_length=1, description="parent of that folder")
    nproc: Count = Field(default=1, description="processes of a stage; above 1 by torchrun, one a GPU")
    teacher: str = Field(default="mini", description="checkpoint that the trajectories to learn from are sampled from")
    teacher_fields: str = Field(
        default="",
        description="fields of its collection and evaluation alone, such as a smaller rollout.kv_cache_bytes",
    )
    base: str = Field(default="mini", description="checkpoint that is fine-tuned on them, the student")
    questions: str = Field(default="mini", description="training questions: a file of rows, or an embedded task")
    count: CountOrOff = Field(default=0, description="first of them that are used; 0: all")
    heldout: str = Field(
        default="", description="the same for the evaluation before and after a run of RL; empty: none there"
    )
    more: list[str] = Field(default=[], description="files of rows that RL gets besides the questions that are left")
    collect: str = Field(default="mini", description="recipe and fields of axpo.collect, of teacher and student")
    sft: str = Field(default="mini-sft", description="recipe and fields of axpo.sft")
    rl: list[str] = Field(
        default=["axpo=mini"], description="runs of RL, each NAME=recipe and fields of axpo.train; [] for none"
    )
    evaluate: str = Field(
        default="mini --eval.benchmarks mini", description="recipe and fields of axpo.evaluate, benchmarks among them"
    )

    evaluated: list[str] = Field(
        default=[],
        description="checkpoints that are evaluated: teacher, base, sft, sft+NAME of a run of RL; empty: all",
    )

    @property
    def checkpoints(self) -> list[str]:
        """The names of `evaluated`, all of them where it is empty, in the order of the table."""
        names = ["teacher", "base", "sft", *(f"sft+{entry.partition('=')[0]}" for entry in self.rl)]
        return [name for name in names if name in self.evaluated or not self.evaluated]

    @model_validator(mode="after")
    def _known(self) -> Stages:
        if unknown := [name for name in self.evaluated if name not in self.checkpoints]:
            known = ", ".join(self.model_copy(update={"evaluated": []}).checkpoints)
            raise ValueError(f"pipeline.evaluated = {unknown[0]!r}: there is {known}")
        return self

    @field_validator("rl")
    @classmethod
    def _named(cls, value: list[str]) -> list[str]:
        names = [entry.partition("=")[0] for entry in value]
        for name, entry in zip(names, value, strict=True):
            if "=" not in entry or not re.match(NAME, name):
                raise ValueError(f"pipeline.rl = {entry!r}: must be NAME=recipe and fields of axpo.train")
            if name in _TAKEN or names.count(name) > 1:
                raise ValueError(f"pipeline.rl = {entry!r}: the name {name!r} is taken; choose another")
        return value
