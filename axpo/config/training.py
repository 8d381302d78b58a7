"""The algorithm, its update, and what a run keeps and tells."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from axpo.config.base import Count, CountOrOff, Fraction, Section


class Algo(Section):
    name: Literal["grpo", "axpo"] = Field(default="axpo", description="grpo: no resampling; axpo: with it")
    group_size: int = Field(default=8, ge=2, description="rollouts N of a question")
    resamples_per_prefix: int = Field(default=4, ge=2, description="continuations K of a fixed prefix")
    budget_ratio: float = Field(
        default=0.25,
        ge=0.0,
        le=100.0,
        description="extra continuations r of a step, as a share of its B·N rollouts; 0 is GRPO",
    )
    trigger: Literal["tool", "no_tool", "always"] = Field(
        default="tool",
        description="rollouts that may be resampled: a question's with a tool call when all of them are wrong, those "
        "without one likewise, or every one",
    )
    fork_at: Literal["call", "prompt", "answer", "observation"] = Field(
        default="call",
        description="what a continuation keeps: up to the opening tag of the first call, the prompt alone, the first "
        "turn's thinking, or up to the tool response after which entropy rose most",
    )
    entropy_window: Count = Field(
        default=20,
        description="fork_at 'observation': tokens after a tool response whose mean entropy must exceed that of as "
        "many first tokens of the rollout",
    )
    rank: Literal["confidence", "entropy", "random", "entropy_rise"] = Field(
        default="confidence",
        description="which prefix is resampled first: least confident call, highest exact entropy, chance, or steepest "
        "rise of entropy after a tool response",
    )
    question_order: Literal["rank", "data"] = Field(
        default="rank",
        description="breadth-first order of triggered questions: by the rank of their best prefix, or as drawn",
    )
    prefix_reward: Literal["original", "joint", "own", "mean"] = Field(
        default="original",
        description="rewards that normalise r_prefix: the group's original ones, or with all its sources' r_prefix in; "
        "own: no credit for a recovery; mean: the mean advantage of source and continuations",
    )
    merge_continuations: bool = Field(
        default=False, description="normalise a question's continuations together with its rollouts, not on their own"
    )
    tool_reward: float = Field(
        default=0.0,
        ge=-1.0,
        le=1.0,
        description="added to the reward of a rollout that calls a tool; below 0: a penalty",
    )
    mask_failed_suffix: bool = Field(
        default=True, description="mask a source's own continuation also when no resample of its prefix succeeded"
    )
    mask_recovered_suffix: bool = Field(
        default=True, description="mask a source's own continuation when a resample of its prefix succeeded"
    )
    std_eps: float = Field(
        default=1e-6, gt=0.0, le=1.0, description="added to the sample standard deviation of a group"
    )

    advantage_scale: Literal["group", "batch", "none"] = Field(
        default="group",
        description="centred rewards are divided by the standard deviation of their group, of the whole step, or not",
    )
    drop_equal_groups: bool = Field(
        default=False,
        description="after resampling, leave out rollouts of a question, or of a prefix, whose advantages are all 0",
    )
    overlong_buffer: CountOrOff = Field(
        default=0,
        description="last tokens of rollout.max_new_tokens over which a reward is lowered; 0 is off",
    )
    overlong_penalty: float = Field(
        default=1.0, gt=0.0, le=100.0, description="by how much the reward of a trajectory of full length is lowered"
    )

    @property
    def resampling_ratio(self) -> float:
        """`budget_ratio`, or 0 under grpo."""
        return self.budget_ratio if self.name == "axpo" else 0.0

    @model_validator(mode="after")
    def _what_is_resampled_exists(self) -> Algo:
        if self.trigger == "no_tool" and self.fork_at in ("call", "observation"):
            raise ValueError(
                f"algo.fork_at = {self.fork_at!r}: algo.trigger 'no_tool' takes rollouts without a call; set it to "
                "'answer' or 'prompt'"
            )
        if self.rank == "entropy_rise" and self.fork_at != "observation":
            raise ValueError(
                f"algo.rank = 'entropy_rise': it compares entropy after a tool response, and algo.fork_at is "
                f"{self.fork_at!r}; set that to 'observation', or rank by 'entropy'"
            )
        return self

    @model_validator(mode="after")
    def _credit_is_whole(self) -> Algo:
        if self.prefix_reward == "mean" and not self.merge_continuations:
            raise ValueError(
                "algo.prefix_reward = 'mean': advantages of source and continuations can be averaged when they are "
                "normalised together; set algo.merge_continuations to true"
            )
        if self.mask_failed_suffix and not self.mask_recovered_suffix:
            raise ValueError(
                "algo.mask_recovered_suffix = False: a source would be trained to its end only where its prefix could "
                "do better; set algo.mask_failed_suffix to false as well"
            )
        return self


class Loss(Section):
    objective: Literal["clip", "gspo", "cispo"] = Field(
        default="clip",
        description="clipped surrogate with a ratio a token or a sequence (gspo), or capped weights on log π (cispo)",
    )
    clip_low: float = Field(
        default=0.2, gt=0.0, le=1.0, description="the probability ratio is clipped below 1 − clip_low; 1 is off"
    )
    clip_high: float = Field(
        default=0.4, gt=0.0, le=100.0, description="the probability ratio is clipped above 1 + clip_high"
    )
    kl_coef: float = Field(
        default=1e-3, ge=0.0, le=100.0, description="weight β of the KL to the fixed reference; 0 is off"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="estimator of the KL; k1 has the gradient of k2, its own would not see the reference"
    )
    entropy_coef: float = Field(
        default=0.0, ge=-10.0, le=10.0, description="weight of the exact entropy, which is added to what is maximised"
    )
    aggregation: Literal["token", "sequence", "constant"] = Field(
        default="token",
        description="mean over all trained tokens of the step, over the means of its trajectories, or over their sums "
        "divided by rollout.max_new_tokens",
    )
    tis: Literal["off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        default="off",
        description="importance weight trainer/sampler on the surrogate, of a token or a sequence, cut off at tis_cap "
        "or masked outside of 1/tis_cap to tis_cap",
    )
    tis_cap: float = Field(default=2.0, gt=1.0, le=1e6, description="largest importance weight of loss.tis")

    @model_validator(mode="after")
    def _whole_sequences(self) -> Loss:
        if self.objective == "gspo" and self.aggregation != "sequence":
            raise ValueError(
                f"loss.aggregation = {self.aggregation!r}: loss.objective 'gspo' is a mean over sequences; set it to "
                "'sequence'"
            )
        return self


class Optim(Section):
    lr: float = Field(default=1e-6, gt=0.0, le=1.0, description="peak learning rate of AdamW")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="AdamW's moment decays")
    eps: float = Field(default=1e-8, gt=0.0, le=1.0, description="AdamW's epsilon")
    weight_decay: float = Field(default=0.0, ge=0.0, le=10.0, description="decoupled weight decay of matrices")
    grad_clip: float = Field(default=1.0, ge=0.0, description="largest global gradient norm; 0 is off")
    warmup_steps: CountOrOff = Field(default=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="learning rate after the warm-up: constant, or down to 0 at run.steps"
    )


class Train(Section):
    micro_batch_tokens: Count = Field(
        default=8192, description="packed tokens of one forward and backward pass on a rank"
    )
    replicas: Count = Field(
        default=1,
        description="whole copies of the sharded model, each over consecutive ranks (HSDP); the number of nodes keeps "
        "gathers inside a node; 1: shards over all ranks",
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        default="none",
        description="what the backward pass computes again: nothing, all but matrix products and attention, everything",
    )
    freeze_vision: bool = Field(default=False, description="do not train the vision tower")
    optimizer_offload: bool = Field(
        default=False, description="keep the optimizer's moments in host memory between steps"
    )
    reference_offload: bool = Field(
        default=False, description="keep the reference policy's shards in host memory (loss.kl_coef above 0)"
    )
    updates_per_batch: Count = Field(
        default=1, description="optimizer updates of a step; with several the trainer scores π_old before the first"
    )
    deterministic: bool = Field(
        default=False,
        description="only algorithms that give the same bits in every run, or an error (docs/objectives.md)",
    )
    minibatches: Count = Field(
        default=1, description="equal parts of the step's questions, of which each update takes the next"
    )

    @model_validator(mode="after")
    def _whole_passes(self) -> Train:
        if self.updates_per_batch % self.minibatches:
            raise ValueError(
                f"train.updates_per_batch = {self.updates_per_batch}: not a multiple of train.minibatches = "
                f"{self.minibatches}, so that some questions would be trained on more often; set it to "
                f"{self.minibatches} for one update each"
            )
        return self


class Checkpoint(Section):
    every: CountOrOff = Field(default=20, description="steps between checkpoints; 0: only after the last step")
    keep: Count = Field(default=2, description="newest checkpoints kept")
    asynchronous: bool = Field(
        default=True, description="write from a copy in CPU memory while training goes on; false: a step waits for it"
    )


class Eval(Section):
    questions: CountOrOff = Field(default=256, description="held-out questions; 0: no evaluation")
    samples: Count = Field(default=4, description="rollouts a question, n of Pass@k")
    k: CountOrOff = Field(default=0, description="k of Pass@k, unbiased for k up to eval.samples; 0: eval.samples")
    temperature: float = Field(default=0.7, ge=0.0, le=10.0, description="sampling temperature; 0 is greedy")
    top_p: float = Field(default=0.8, gt=0.0, le=1.0, description="nucleus sampling; 1 is off")
    top_k: CountOrOff = Field(default=20, description="top-k sampling; 0 is off")
    presence_penalty: float = Field(
        default=0.0,
        ge=-2.0,
        le=2.0,
        description="subtracted from the logits of tokens that a turn has sampled; 0 is off",
    )
    max_turns: Count = Field(default=5, description="turns of a trajectory; its limits in tokens are rollout's")
    every: CountOrOff = Field(default=0, description="steps between evaluations; 0: only before and after the run")
    benchmarks: list[str] = Field(
        default=[], description="of axpo.evaluate: files of rows, each PATH or NAME=PATH, and embedded tasks by name"
    )
    limit: CountOrOff = Field(default=0, description="of axpo.evaluate: first questions of a benchmark; 0: all")
    repeats: Count = Field(default=1, description="of axpo.evaluate: times a benchmark is sampled, for a spread")
    out: str = Field(
        default="", description="of axpo.evaluate: folder of its results; empty: benchmarks in the run's directory"
    )

    @model_validator(mode="after")
    def _k_of_samples(self) -> Eval:
        if self.k > self.samples:
            raise ValueError(f"eval.k = {self.k}: Pass@k needs as many samples; set eval.samples to {self.k} or more")
        return self


class Log(Section):
    tensorboard: bool = Field(default=True, description="write TensorBoard events")
    wandb: bool = Field(default=False, description="also log to Weights & Biases, which must be installed")
    wandb_project: str = Field(default="axpo", min_length=1, description="project of the run there")
    console: bool = Field(default=True, description="show progress; without a terminal, one line a step")
    trees_in_report: CountOrOff = Field(default=8, description="question trees drawn in report.html")


class Debug(Section):
    replay: str = Field(
        default="",
        description="<run>/debug/step_…: make this kept update again, look for the first NaN or infinity, and exit",
    )
