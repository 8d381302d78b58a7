"""What a run is made of, checked in the order of its cost: files and questions first, weights last."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from axpo.config import Config
from axpo.conversation import Conversation
from axpo.distributed import be_deterministic, device, world_size
from axpo.fit import check_fits
from axpo.grading import Grader
from axpo.metrics import check_sinks
from axpo.paths import model_directory
from axpo.rollout import Agent
from axpo.tasks import Task, get_task
from axpo.tools import get_tools, tool_options
from engine import LLM, Processor
from engine.models import ModelConfig
from engine.weights import check_weights

if TYPE_CHECKING:
    from axpo.learner import Learner


@dataclass(frozen=True, slots=True)
class Inputs:
    """The checked inputs of a run; nothing large is loaded yet."""

    source: Path
    task: Task
    conversation: Conversation
    grader: Grader


def check_inputs(config: Config) -> Inputs:
    """Looks at everything that a run needs before anything expensive starts.

    Raises:
        ValueError, FileNotFoundError: what is wrong, by the name of its field or file.
    """
    from axpo.sharding import check_replicas

    check_replicas(config.train.replicas)
    if config.rollout.questions_per_step % world_size():
        raise ValueError(
            f"rollout.questions_per_step = {config.rollout.questions_per_step}: not a multiple of the {world_size()} "
            "ranks, which share the questions evenly"
        )
    inputs = check_sampling(config)
    check_fits(config, device())
    check_sinks(config.log)
    check_heldout(config, inputs.task)
    check_prompt(config, inputs)
    return inputs


def check_heldout(config: Config, task: Task) -> None:
    """ValueError when the task has fewer held-out questions than are asked."""
    if config.eval.questions > (held_out := task.size("heldout") if config.eval.questions else 0):
        raise ValueError(f"eval.questions = {config.eval.questions}: there are {held_out} held-out questions")


def check_prompt(config: Config, inputs: Inputs) -> None:
    """ValueError when the first question cannot be put to this checkpoint: its template, its images, their length."""
    question, processor = inputs.task.question("train", 0), inputs.conversation.processor
    try:
        images = [processor.image(image) for image in question.images]
        length = len(inputs.conversation.prompt(question.messages, images))
    except ValueError as error:
        raise ValueError(f"question {question.id!r}: {error}") from error
    if length >= config.rollout.max_tokens:
        raise ValueError(
            f"rollout.max_tokens = {config.rollout.max_tokens}: the prompt of question {question.id!r} has {length} "
            "tokens; raise it, or shorten the question or its images"
        )


def check_sampling(config: Config) -> Inputs:
    """What rolling out needs of `check_inputs`, which raises the same."""
    source = model_directory(config.model.path)
    model = ModelConfig.from_pretrained(source)
    check_weights(source)
    if config.rollout.max_tokens > model.text.max_position_embeddings:
        raise ValueError(
            f"rollout.max_tokens = {config.rollout.max_tokens}: the model's context is "
            f"{model.text.max_position_embeddings} tokens; set it to that or less"
        )
    task = _task(config)
    grader = Grader(config.judge)
    grader.check(task.kinds())
    tools = get_tools(config.rollout.tools, tool_options(config))
    return Inputs(source, task, Conversation(Processor(source, model), tools), grader)


def make_agent(config: Config, inputs: Inputs, *, load: bool = True) -> Agent:
    """The agent and its engine, with the checkpoint's weights, or without any yet."""
    llm = LLM(
        inputs.source,
        load_format="auto" if load else "dummy",
        dtype=getattr(torch, config.model.dtype),
        device=device(),
        kv_cache_bytes=config.rollout.kv_cache_bytes,
        max_batch_tokens=config.rollout.max_batch_tokens,
        enable_prefix_caching=False,  # what branches share they fork, and blocks need no hashes
    )
    return Agent(llm, inputs.conversation, config.run.seed, inputs.grader)


def make_learner(config: Config, source: Path) -> "Learner":
    """Loads trainer, optimizer and reference policy with the checkpoint's weights."""
    from axpo.learner import Learner  # FSDP takes seconds to import, and evaluation needs none

    if config.train.deterministic:
        be_deterministic()
    return Learner(
        source,
        dtype=getattr(torch, config.model.dtype),
        device=device(),
        optim=config.optim,
        total_steps=config.run.steps,
        loss=config.loss,
        temperature=config.rollout.temperature,
        max_new_tokens=config.rollout.max_new_tokens,
        train=config.train,
    )


def _task(config: Config) -> Task:
    if config.data.task == "jsonl":
        data = config.data
        return get_task("jsonl", path=data.path, heldout_path=data.heldout_path, check_rows=data.check_rows)
    return get_task(config.data.task)
