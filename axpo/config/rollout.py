"""Where questions come from, how they are rolled out, with which tools, and who grades."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from axpo.config.base import Count, CountOrOff, Section, as_text

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What a run may be called, since its directory has the same name."""


class Run(Section):
    name: str = Field(
        default="mini-axpo", pattern=NAME, description="name of the run and its directory: letters, digits, . _ and -"
    )
    dir: str = Field(default="runs", min_length=1, description="parent of run directories")
    steps: CountOrOff = Field(
        default=100,
        description="training steps in all, those before a resume included; 0: axpo.train evaluates the checkpoint",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of the data order and of every sampled token")
    resume: bool = Field(default=False, description="continue the existing run directory from its last checkpoint")
    time_limit: Annotated[str, BeforeValidator(as_text)] = Field(
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


class Model(Section):
    path: str = Field(
        default="mini",
        min_length=1,
        description="embedded ('mini', 'suite/base', 'suite/teacher') or a Hugging Face checkpoint directory",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="compute dtype of engine and trainer; the trainer's master weights are float32"
    )


class Data(Section):
    task: Literal["mini", "perception", "reasoning", "search", "suite", "jsonl"] = Field(
        default="mini",
        description="embedded: 'mini' (digit scenes), 'suite' (those, sums and facts mixed) or one of its families; "
        "'jsonl': rows of your own, Parquet too",
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


class Rollout(Section):
    questions_per_step: Count = Field(default=64, description="questions B of a step, over all ranks")
    max_turns: Count = Field(default=3, description="turns of a trajectory; a turn ends in a tool call or an answer")
    max_new_tokens: Count = Field(default=4096, description="sampled tokens of a whole trajectory")
    max_tokens: Count = Field(
        default=16384, description="context limit: prompt, images, sampled tokens and observations"
    )
    max_observation_tokens: CountOrOff = Field(
        default=4096, description="tokens of a tool response's text, which is cut there with a note; 0: no limit"
    )
    max_images: CountOrOff = Field(
        default=32,
        description="images of a trajectory, the question's and the tools'; further ones are left out with "
        "a note; 0: no limit",
    )
    tool_timeout_s: float = Field(
        default=300.0,
        gt=0.0,
        le=86400.0,
        description="seconds that a turn's tool calls may take; then they have failed",
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


class PythonTool(Section):
    sandbox: Literal["bubblewrap", "none"] = Field(
        default="bubblewrap", description="isolation of the model's code; 'none' runs it with your own rights"
    )
    memory_mb: int = Field(default=512, ge=64, description="memory of a trajectory's kernel, in MiB")
    cpu_seconds: Count = Field(default=120, description="processor time of a trajectory's kernel, over all its calls")
    max_output_chars: int = Field(default=8000, ge=100, description="printed characters of a call that the model reads")


class SearchTool(Section):
    provider: Literal["local", "tavily"] = Field(
        default="local", description="'local' ranks a folder's documents by BM25, 'tavily' asks the web"
    )
    path: str = Field(
        default="",
        description="provider 'local': folder of .txt, .md and .jsonl documents; 'facts': those of the suite",
    )
    api_key_env: str = Field(default="TAVILY_API_KEY", description="environment variable that holds the API key")
    base_url: str = Field(default="https://api.tavily.com", description="where the API is")
    exclude_domains: list[str] = Field(default=["huggingface.co"], description="domains that no result may come from")
    cache_dir: str = Field(default="", description="folder of the web's answers; empty: ~/.cache/axpo/search")
    queries_per_minute: Count = Field(default=60, description="queries that a process sends to the web at most")
    timeout_s: float = Field(default=20.0, gt=0.0, le=600.0, description="seconds that one attempt may take")
    max_chars: int = Field(default=1000, ge=50, description="characters of a result's text")


class ImageSearchTool(Section):
    path: str = Field(default="", description="folder of pictures, with captions beside them or in captions.json")
    max_side: int = Field(default=1024, ge=32, description="larger pictures are shrunk to this side, in pixels")


class JudgeOptions(Section):
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
