"""transformers as the fork benchmark's peers: `generate`, and continuous batching over paged SDPA."""

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.fork_workload import Branches, Clock, Conditions, Measured, Workload, synchronize
from engine.models import ModelConfig

PAGE = 256  # tokens of a page of transformers' cache, its default
BATCH_TOKENS = 2048  # of one step of its continuous batching; on a CPU nothing infers it


def generate(name: str, work: Workload, conditions: Conditions) -> Measured:
    """`generate` over all branches as one batch.

    `num_return_sequences` is refused where decoding is greedy; then the same batch that it would make is given. It
    forks at the prompt's end only, so the branches inside are prompts of their own.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    model = _load(conditions)
    inputs = _inputs(work, conditions)
    out = Measured(name, notes=["computes the prefix once a branch"])

    class Watch(StoppingCriteria):
        """Tells the clock of every token; ends the batch when the time is over."""

        def __init__(self, clock: Clock):
            self.clock, self.tokens = clock, 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
            synchronize(input_ids.device)
            self.tokens += 1
            self.clock.tokens_are([self.tokens] * len(input_ids))
            return torch.full((len(input_ids),), self.clock.over, device=input_ids.device)

    def run(inputs: dict[str, torch.Tensor], count: int, copies: int, clock: Clock) -> list[list[int]]:
        sampling: dict[str, Any] = {"do_sample": False}
        if work.temperature:
            sampling = {"do_sample": True, "temperature": work.temperature, "top_k": 0, "top_p": 1.0}
            sampling["num_return_sequences"] = copies
        elif copies > 1:
            inputs = {key: value.repeat(copies, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
        with torch.inference_mode():
            ids = model.generate(
                **inputs,
                **sampling,
                max_new_tokens=count,
                pad_token_id=0,
                suppress_tokens=list(ModelConfig.from_pretrained(conditions.path).banned_token_ids) or None,
                stopping_criteria=StoppingCriteriaList([Watch(clock)]),
            )
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    def branches(inputs: dict[str, torch.Tensor], count: int, copies: int) -> Branches:
        clock = Clock(conditions, work.forks, count)
        outputs = run(inputs, count, copies, clock)
        length = inputs["input_ids"].shape[1]
        held = work.forks * (length + count - 1) * _token_bytes(conditions)
        return clock.read(outputs, bytes_copied=0.0, recomputed=float(length), kv_bytes=held)

    quiet = dataclasses.replace(conditions, tick=lambda done, of: None)
    short = {**inputs, "input_ids": inputs["input_ids"][:, :64], "attention_mask": inputs["attention_mask"][:, :64]}
    run(short if not work.prefix.images else inputs, 2, 1, Clock(quiet, 1, 2))
    cpu = time.process_time()
    try:
        clock = Clock(quiet, 1, 1)
        run(inputs, 1, 1, clock)
        out.prefill_s = clock.last - clock.start
        out.end = branches(inputs, work.new_tokens, work.forks)
        said = conditions.continuation or out.end.outputs[0]
        out.inside = branches(_inputs(work, conditions, work.inside_prompts(said)), work.inside_tokens, 1)
    except TimeoutError as error:
        out.error = str(error)
    out.cpu_s = time.process_time() - cpu
    return out


def continuous(name: str, work: Workload, conditions: Conditions) -> Measured:
    """Continuous batching, `paged|sdpa`, through the manager that `generate_batch` makes, as tokens need be timed.

    The prefix is computed first and its whole pages are found again. Branches are requests with equal prompts: in 5.17
    `generate_batch` loses the children of `num_return_sequences`. It takes token ids only, so no images.
    """
    if work.prefix.images:
        return Measured(name, error="takes no images")
    from transformers import ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it misses psutil
    model = _load(conditions, attn_implementation="sdpa")
    out = Measured(name, notes=["no block-table attention without flash-attn"])
    pages = work.forks * (-(-work.longest // PAGE) + 1) + 2
    wanted: dict[str, Any] = {
        "page_size": PAGE,
        "num_blocks": pages,
        "max_batch_tokens": max(BATCH_TOKENS, work.forks),
        "auto_switch_to_flash": False,
    }
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    sampling: dict[str, Any] = {"do_sample": False}
    if work.temperature:
        sampling = {"do_sample": True, "temperature": work.temperature, "top_k": 0, "top_p": 1.0}
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(eos_token_id=-1, pad_token_id=0, **sampling),
        continuous_batching_config=ContinuousBatchingConfig(**{k: v for k, v in wanted.items() if k in known}),
    )

    def run(prompts: list[list[int]], count: int, clock: Clock) -> list[list[int]]:
        said: dict[str, list[int]] = {}
        names = [manager.add_request(prompt, max_new_tokens=count, streaming=True) for prompt in prompts]
        running = set(names)
        while running and not clock.over:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("the generation thread ended")
                continue
            if result.error:
                raise RuntimeError(result.error)
            if result.request_id not in names:
                continue  # what is left of a group that was cut off
            said[result.request_id] = list(result.generated_tokens)
            clock.tokens_are([len(tokens) for tokens in said.values()])
            if result.is_finished():
                running.discard(result.request_id)
        for request in running:
            manager.cancel_request(request)
        return [said.get(request, []) for request in names]

    def branches(prompts: list[list[int]], count: int) -> Branches:
        clock = Clock(conditions, work.forks, count)
        outputs = run(prompts, count, clock)
        return clock.read(outputs, bytes_copied=0.0, kv_bytes=held(prompts, count))

    def held(prompts: list[list[int]], count: int) -> int:
        """If all whole pages that the prompts have in common are shared."""
        shared = (len(prompts[0]) - 1) // PAGE
        own = -(-(len(prompts[0]) + count - 1) // PAGE) - shared
        return (shared + work.forks * own) * PAGE * _token_bytes(conditions)

    quiet = dataclasses.replace(conditions, tick=lambda done, of: None)
    with _started(manager):
        run([[token + 1 for token in range(8)]], 2, Clock(quiet, 1, 2))
        cpu = time.process_time()
        try:
            # Two tokens: the pages of a request that ends with its prefill are not kept for others.
            clock = Clock(quiet, 1, 2)
            run([work.prefix.token_ids], 2, clock)
            out.prefill_s = (clock.first or clock.last) - clock.start
            out.end = branches([work.prefix.token_ids] * work.forks, work.new_tokens)
            said = conditions.continuation or out.end.outputs[0]
            out.inside = branches(work.inside_prompts(said), work.inside_tokens)
        except TimeoutError as error:
            out.error = str(error)
        out.cpu_s = time.process_time() - cpu
    return out


@contextmanager
def _started(manager: Any) -> Iterator[None]:
    manager.start()
    try:
        yield
    finally:
        manager.stop(block=True, timeout=60)


def _load(conditions: Conditions, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3VLForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    text = ModelConfig.from_pretrained(conditions.path).vision is None
    disable_progress_bar()
    family = AutoModelForCausalLM if text else Qwen3VLForConditionalGeneration
    model: Any = family.from_pretrained(conditions.path, dtype=conditions.dtype, **options)
    model = model.to(conditions.device).eval()
    model.generation_config.eos_token_id = None  # nothing ends a branch early
    return model


def _inputs(work: Workload, conditions: Conditions, prompts: list[list[int]] | None = None) -> dict[str, torch.Tensor]:
    """Of equally long prompts, each with the prefix's images; default the prefix alone."""
    ids = torch.tensor(prompts or [work.prefix.token_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if work.prefix.images:
        placeholder = ModelConfig.from_pretrained(conditions.path).image_token_id
        images = work.prefix.images * len(ids)
        inputs["pixel_values"] = torch.cat([image.pixel_values for image in images]).to(conditions.dtype)
        inputs["image_grid_thw"] = torch.tensor([image.grid_thw for image in images])
        inputs["mm_token_type_ids"] = (ids == placeholder).int()
    return {key: value.to(conditions.device) for key, value in inputs.items()}


def _token_bytes(conditions: Conditions) -> int:
    config = ModelConfig.from_pretrained(conditions.path).text
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * conditions.dtype.itemsize
