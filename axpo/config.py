"""Every setting of a run: typed, bounded and described; the command line, recipes and config.toml are made from this.

Imports neither torch nor transformers, so that a mistake is reported before anything is loaded.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
CountOrOff = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _as_text(value: Any) -> Any:
    """A whole number as a recipe may write it, `time_limit = 90`, for the text "90"."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class _Section(BaseModel):
    """Unknown names, infinities and later changes are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Run(_Section):
    name: str = Field(
        default="mini-axpo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run and of its directory"
    )
    dir: str = Field(default="runs", min_length=1, description="parent of run directories")
    steps: Count = Field(default=100, description="training steps in all, those before a resume included")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the data order and of every sampled token")
    resume: bool = Field(default=False, description="continue the existing run directory from its last checkpoint")
    time_limit: Annotated[str, BeforeValidator(_as_text)] = Field(
        default="",
        pattern=r"^(\d+|\d+:[0-5]\d:[0-5]\d)?$",
        description="minutes, or H:MM:SS, after which the run saves and exits with 0 like on SIGTERM; empty: none",
    )
    timeout_s: float = Field(
        default=1800.0, gt=0.0, le=7 * 86400.0, description="longest wait for another rank, in seconds, before an error"
    )

    @property
    def time_limit_s(self) -> float | None:
        """`time_limit` in seconds, None without one."""
        if not self.time_limit:
            return None
        parts = [int(part) for part in self.time_limit.split(":")]
        return 60.0 * parts[0] if len(parts) == 1 else 3600.0 * parts[0] + 60.0 * parts[1] + parts[2]


class Model(_Section):
    path: str = Field(
        default="mini",
        min_length=1,
        description="'mini' (the embedded SFT checkpoint) or a Hugging Face checkpoint directory",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="compute dtype of engine and trainer; the trainer's master weights are float32"
    )


class Data(_Section):
    task: Literal["mini", "jsonl"] = Field(
        default="mini", description="'mini' (embedded digit scenes) or 'jsonl' (rows of your own, Parquet too)"
    )
    path: str = Field(
        default="",
        description="task 'jsonl': .jsonl, .parquet or .arrow file of rows {id, question, images, answer, …} "
        "(docs/data.md), or a folder of them, to train on",
    )
    heldout_path: str = Field(
        default="", description="task 'jsonl': the same for evaluation; empty needs eval.questions = 0"
    )
    check_rows: CountOrOff = Field(
        default=2_000,
        description="task 'jsonl': rows of a file, evenly spread, that are checked before the run starts; 0: all",
    )

    @model_validator(mode="after")
    def _paths_belong_to_jsonl(self) -> Data:
        if self.task == "jsonl" and not self.path:
            raise ValueError("data.path = '': task 'jsonl' needs a file of rows; set data.path")
        if self.task != "jsonl" and (self.path or self.heldout_path):
            name, value = ("path", self.path) if self.path else ("heldout_path", self.heldout_path)
            raise ValueError(f"data.{name} = {value!r}: only task 'jsonl' reads a file; set data.task to 'jsonl'")
        return self


class Rollout(_Section):
    questions_per_step: Count = Field(default=64, description="questions B of a step, over all ranks")
    max_turns: Count = Field(default=3, description="turns of a trajectory; a turn ends in a tool call or an answer")
    max_new_tokens: Count = Field(default=4096, description="sampled tokens of a whole trajectory")
    max_tokens: Count = Field(
        default=16384, description="context limit: prompt, images, sampled tokens and observations"
    )
    temperature: float = Field(
        default=1.0, gt=0.0, le=10.0, description="sampling temperature; training scores at the same"
    )
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="nucleus sampling; training needs 1 (off)")
    top_k: CountOrOff = Field(default=0, description="top-k sampling; training needs 0 (off)")
    kv_cache_bytes: int = Field(default=2**30, ge=2**20, description="memory of the engine's paged KV cache, in bytes")
    max_batch_tokens: Count = Field(default=8192, description="tokens that one engine step computes at most")
    overlap: bool = Field(
        default=False,
        description="roll the next step out while one trains, with weights one update old (one-step off-policy)",
    )
    sleep_in_training: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="give the KV cache's memory to training and take it again after; auto: on a GPU, without overlap",
    )
    tools: list[str] = Field(default=["image_zoom_in"], description="tools offered to the model; none: []")

    @model_validator(mode="after")
    def _sampled_is_trained(self) -> Rollout:
        if self.top_p < 1.0 or self.top_k > 0:
            name, value, off = ("top_p", self.top_p, 1.0) if self.top_p < 1.0 else ("top_k", self.top_k, 0)
            raise ValueError(
                f"rollout.{name} = {value}: truncated sampling biases the log-probabilities that training uses; "
                f"set it to {off} (eval.{name} is free)"
            )
        if self.max_new_tokens >= self.max_tokens:
            raise ValueError(
                f"rollout.max_new_tokens = {self.max_new_tokens}: not below rollout.max_tokens = {self.max_tokens}: "
                "the context also holds the prompt and its images"
            )
        if self.overlap and self.sleep_in_training == "always":
            raise ValueError(
                "rollout.sleep_in_training = 'always': under rollout.overlap the engine works while training does; "
                "set it to 'auto' or 'never'"
            )
        return self


class PythonTool(_Section):
    sandbox: Literal["bubblewrap", "none"] = Field(
        default="bubblewrap", description="isolation of the model's code; 'none' runs it with your own rights"
    )
    memory_mb: int = Field(default=512, ge=64, description="memory of a trajectory's kernel, in MiB")
    cpu_seconds: Count = Field(default=120, description="processor time of a trajectory's kernel, over all its calls")
    max_output_chars: int = Field(default=8000, ge=100, description="printed characters of a call that the model reads")


class SearchTool(_Section):
    provider: Literal["local", "tavily"] = Field(
        default="local", description="'local' ranks a folder's documents by BM25, 'tavily' asks the web"
    )
    path: str = Field(default="", description="provider 'local': folder of .txt, .md and .jsonl documents")
    api_key_env: str = Field(default="TAVILY_API_KEY", description="environment variable that holds the API key")
    base_url: str = Field(default="https://api.tavily.com", description="where the API is")
    exclude_domains: list[str] = Field(default=["huggingface.co"], description="domains that no result may come from")
    cache_dir: str = Field(default="", description="folder of the web's answers; empty: ~/.cache/axpo/search")
    queries_per_minute: Count = Field(default=60, description="queries that a process sends to the web at most")
    timeout_s: float = Field(default=20.0, gt=0.0, le=600.0, description="seconds that one attempt may take")
    max_chars: int = Field(default=1000, ge=50, description="characters of a result's text")


class ImageSearchTool(_Section):
    path: str = Field(default="", description="folder of pictures, with captions beside them or in captions.json")
    max_side: int = Field(default=1024, ge=32, description="larger pictures are shrunk to this side, in pixels")


class JudgeOptions(_Section):
    base_url: str = Field(default="", description="OpenAI-compatible API of the judge, up to /v1; empty: no judge")
    model: str = Field(default="", description="the judge's model, as its service calls it")
    api_key_env: str = Field(default="", description="environment variable that holds the judge's API key")
    max_calls: Count = Field(default=10_000, description="calls that a process may pay; known verdicts are free")
    cache_dir: str = Field(default="", description="folder of known verdicts; empty: ~/.cache/axpo/judge")
    timeout_s: float = Field(default=30.0, gt=0.0, le=600.0, description="seconds that one verdict may take")

    @model_validator(mode="after")
    def _a_service_has_a_model(self) -> JudgeOptions:
        if self.base_url and not self.model:
            raise ValueError("judge.model = '': judge.base_url needs the name of a model; set judge.model")
        return self


class Algo(_Section):
    name: Literal["grpo", "axpo"] = Field(default="axpo", description="grpo: no resampling; axpo: with it")
    group_size: int = Field(default=8, ge=2, description="rollouts N of a question")
    resamples_per_prefix: int = Field(default=4, ge=2, description="continuations K of a fixed prefix")
    budget_ratio: float = Field(
        default=0.25,
        ge=0.0,
        le=100.0,
        description="extra continuations r of a step, as a share of its B·N rollouts; 0 is GRPO",
    )
    rank: Literal["confidence", "entropy", "random"] = Field(
        default="confidence",
        description="which prefix is resampled first: least confident call, highest exact entropy, chance",
    )
    question_order: Literal["rank", "data"] = Field(
        default="rank",
        description="breadth-first order of triggered questions: by the rank of their best prefix, or as drawn",
    )
    prefix_reward: Literal["original", "joint"] = Field(
        default="original",
        description="rewards that normalise r_prefix: the group's original ones, or with all its sources' r_prefix in",
    )
    mask_failed_suffix: bool = Field(
        default=True, description="mask a source's own continuation also when no resample of its prefix succeeded"
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


class Loss(_Section):
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


class Optim(_Section):
    lr: float = Field(default=1e-6, gt=0.0, le=1.0, description="peak learning rate of AdamW")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.999), description="AdamW's moment decays")
    eps: float = Field(default=1e-8, gt=0.0, le=1.0, description="AdamW's epsilon")
    weight_decay: float = Field(default=0.0, ge=0.0, le=10.0, description="decoupled weight decay of matrices")
    grad_clip: float = Field(default=1.0, ge=0.0, description="largest global gradient norm; 0 is off")
    warmup_steps: CountOrOff = Field(default=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="learning rate after the warm-up: constant, or down to 0 at run.steps"
    )


class Train(_Section):
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


class Checkpoint(_Section):
    every: CountOrOff = Field(default=20, description="steps between checkpoints; 0: only after the last step")
    keep: Count = Field(default=2, description="newest checkpoints kept")
    asynchronous: bool = Field(
        default=True, description="write from a copy in CPU memory while training goes on; false: a step waits for it"
    )


class Eval(_Section):
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


class Log(_Section):
    tensorboard: bool = Field(default=True, description="write TensorBoard events")
    wandb: bool = Field(default=False, description="also log to Weights & Biases, which must be installed")
    wandb_project: str = Field(default="axpo", min_length=1, description="project of the run there")
    console: bool = Field(default=True, description="show progress; without a terminal, one line a step")
    trees_in_report: CountOrOff = Field(default=8, description="question trees drawn in report.html")


class Debug(_Section):
    replay: str = Field(
        default="",
        description="<run>/debug/step_…: make this kept update again, look for the first NaN or infinity, and exit",
    )


class Config(_Section):
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


class Collect(_Section):
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


class Sft(_Section):
    batch_size: Count = Field(default=64, description="teacher trajectories of a step, over all ranks")
    examples: Count = Field(default=20000, description="task 'mini': different teacher trajectories of an epoch")
    style: Literal["practice", "crops", "teacher"] = Field(
        default="teacher", description="task 'mini': what to learn: to see, to read crops, or the imperfect teacher"
    )
    tools: list[str] = Field(default=["image_zoom_in"], description="task 'jsonl': tools that the prompts offer")
    max_tokens: Count = Field(default=16384, description="tokens of the longest trajectory, images included")
    heldout_examples: CountOrOff = Field(
        default=0, description="last examples, which are not trained on: their loss is heldout/loss"
    )
    heldout_every: CountOrOff = Field(default=0, description="steps between these; 0: only after the first and last")
    image_label_weight: float = Field(
        default=0.0, ge=0.0, le=10.0, description="task 'mini': weight of naming what every image token shows; 0 is off"
    )
    from_scratch: bool = Field(
        default=False, description="draw fresh weights; take only shapes and tokenizer from model.path"
    )
    export: str = Field(
        default="", description="also write the trained model to this directory; empty: <run>/policy only"
    )


class SftConfig(_Section):
    """Supervised fine-tuning on a teacher's trajectories (axpo.sft)."""

    run: Run = Run(name="mini-sft")
    model: Model = Model()
    data: Data = Data()
    sft: Sft = Sft()
    optim: Optim = Optim(lr=1e-5, schedule="cosine")
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @model_validator(mode="after")
    def _one_update(self) -> SftConfig:
        if self.train.updates_per_batch > 1:
            raise ValueError(
                f"train.updates_per_batch = {self.train.updates_per_batch}: axpo.sft makes one update a step; set it "
                "to 1 and sft.batch_size to what an update shall see"
            )
        return self


def to_toml(config: BaseModel) -> str:
    """The resolved configuration as TOML that `axpo.train` reads back; run.resume and debug.replay are off in it."""
    sections: dict[str, dict[str, Any]] = config.model_dump(mode="json")
    if "run" in sections:
        sections["run"]["resume"] = False
    if "debug" in sections:
        sections["debug"]["replay"] = ""
    return tomli_w.dumps(sections)
