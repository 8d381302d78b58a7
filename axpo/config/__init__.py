"""Every setting of a run: typed, bounded and described; the command line, recipes and config.toml are made from this.

Imports neither torch nor transformers, so that a mistake is reported before anything is loaded.
"""

from __future__ import annotations

from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, Field, model_validator

from axpo.config.base import Count, CountOrOff, Section
from axpo.config.pipeline import Stages
from axpo.config.rollout import Data, ImageSearchTool, JudgeOptions, Model, PythonTool, Rollout, Run, SearchTool
from axpo.config.training import Algo, Checkpoint, Debug, Eval, Log, Loss, Optim, Train

__all__ = [
    "Algo",
    "Checkpoint",
    "Collect",
    "CollectConfig",
    "Config",
    "Data",
    "Debug",
    "Eval",
    "ImageSearchTool",
    "JudgeOptions",
    "Log",
    "Loss",
    "Model",
    "Optim",
    "PipelineConfig",
    "PythonTool",
    "Rollout",
    "Run",
    "SearchTool",
    "Sft",
    "SftConfig",
    "Stages",
    "Train",
    "to_toml",
]


class Config(Section):
    """A reinforcement learning run (axpo.train)."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    rollout: Rollout = Rollout()
    python: PythonTool = PythonTool()
    search: SearchTool = SearchTool()
    image_search: ImageSearchTool = ImageSearchTool()
    judge: JudgeOptions = JudgeOptions()
    algo: Algo = Algo()
    loss: Loss = Loss()
    optim: Optim = Optim()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log: Log = Log()
    debug: Debug = Debug()

    @model_validator(mode="after")
    def _fits_the_step(self) -> Config:
        if self.algo.overlong_buffer > self.rollout.max_new_tokens:
            raise ValueError(
                f"algo.overlong_buffer = {self.algo.overlong_buffer}: more than rollout.max_new_tokens = "
                f"{self.rollout.max_new_tokens}; set it to a part of that"
            )
        if self.rollout.questions_per_step % self.train.minibatches:
            raise ValueError(
                f"train.minibatches = {self.train.minibatches}: does not divide rollout.questions_per_step = "
                f"{self.rollout.questions_per_step} into equal parts"
            )
        return self

    @model_validator(mode="after")
    def _heldout_rows(self) -> Config:
        if self.data.task == "jsonl" and self.eval.questions and not self.data.heldout_path:
            raise ValueError("data.heldout_path = '': evaluation needs held-out rows; set it, or eval.questions to 0")
        return self


class Collect(Section):
    out: str = Field(default="", description="folder of the result; empty: collected in the run's directory")
    samples: Count = Field(default=4, description="trajectories a question")
    limit: CountOrOff = Field(default=0, description="first training questions that are asked; 0: all")
    batch_size: Count = Field(default=64, description="questions rolled out at once, which is what a crash can lose")
    rows: bool = Field(default=True, description="write the right trajectories; off: outcomes alone")


class CollectConfig(Config):
    """Teacher trajectories on the task's training questions (axpo.collect), sampled by the eval section's fields."""

    collect: Collect = Collect()

    @model_validator(mode="after")
    def _heldout_rows(self) -> CollectConfig:
        return self  # none are asked


class Sft(Section):
    batch_size: Count = Field(default=64, description="teacher trajectories of a step, over all ranks")
    examples: Count = Field(default=20000, description="embedded tasks: different teacher trajectories of an epoch")
    style: Literal["practice", "crops", "copying", "teacher"] = Field(
        default="teacher",
        description="embedded tasks: what to learn: to see and call, read crops (mini), copy (suite), or the teacher",
    )
    tools: list[str] = Field(default=["image_zoom_in"], description="task 'jsonl': tools that the prompts offer")
    max_tokens: Count = Field(default=16384, description="tokens of the longest trajectory, images included")
    heldout_examples: CountOrOff = Field(
        default=0, description="last examples, which are not trained on: their loss is heldout/loss"
    )
    heldout_every: CountOrOff = Field(default=0, description="steps between these; 0: only after the first and last")
    image_label_weight: float = Field(
        default=0.0,
        ge=0.0,
        le=10.0,
        description="embedded tasks: weight of naming what every image token shows; 0 is off",
    )
    from_scratch: bool = Field(
        default=False, description="draw fresh weights; take only shapes and tokenizer from model.path"
    )
    policy_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="dtype of the trained model's file; bfloat16 halves it"
    )
    export: str = Field(
        default="", description="also write the trained model to this directory; empty: <run>/policy only"
    )


class SftConfig(Section):
    """Supervised fine-tuning on a teacher's trajectories (axpo.sft)."""

    run: Run = Run(name="mini-sft")
    model: Model = Model()
    data: Data = Data()
    sft: Sft = Sft()
    python: PythonTool = PythonTool()
    optim: Optim = Optim(lr=1e-5, schedule="cosine")
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @model_validator(mode="after")
    def _updates(self) -> SftConfig:
        if self.run.steps < 1:
            raise ValueError("run.steps = 0: fine-tuning takes 1 or more")
        if self.train.updates_per_batch > 1:
            raise ValueError(
                f"train.updates_per_batch = {self.train.updates_per_batch}: axpo.sft makes one update a step; set it "
                "to 1 and sft.batch_size to what an update shall see"
            )
        return self


class PipelineConfig(Section):
    """The paper's pipeline, stage by stage (axpo.pipeline)."""

    pipeline: Stages = Stages()


def to_toml(config: BaseModel) -> str:
    """The resolved configuration as TOML that `axpo.train` reads back; run.resume and debug.replay are off in it."""
    sections: dict[str, dict[str, Any]] = config.model_dump(mode="json")
    if "run" in sections:
        sections["run"]["resume"] = False
    if "debug" in sections:
        sections["debug"]["replay"] = ""
    return tomli_w.dumps(sections)
