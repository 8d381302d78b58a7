"""The fork benchmark's systems that are our engine: sharing everything, with attention unshared, and re-prefilling."""

import statistics
import time
from collections.abc import Sequence as Seq
from dataclasses import replace

from bench.fork_models import Prefix
from bench.fork_workload import BLOCK, Branches, Clock, Conditions, Measured, Workload, synchronize
from engine import LLM, SamplingParams
from engine.models import ModelConfig
from engine.sequence import Sequence

FORK_SAMPLES = 5  # groups of forks whose median time counts


def measure(
    name: str, work: Workload, conditions: Conditions, share_prefixes: bool = True, reprefill: bool = False
) -> Measured:
    """Both groups of branches after a warm-up. reprefill: each branch is a fresh sequence and no KV is found again."""
    llm = LLM(
        conditions.path,
        dtype=conditions.dtype,
        device=conditions.device,
        kv_cache_bytes=kv_bytes_of(work, conditions, reprefill),
        block_size=BLOCK,
        enable_prefix_caching=not reprefill,
        share_prefixes=share_prefixes,
    )
    out = Measured(name)
    quiet = replace(conditions, tick=lambda done, of: None, continuation=None)
    # Compiled kernels are chosen by size, so on a GPU the whole prefix is warmed up.
    length = len(work.prefix) if conditions.device.type == "cuda" else min(len(work.prefix), 64)
    warm = replace(work, prefix=_beginning(work.prefix, length), new_tokens=min(work.new_tokens, 4))
    _groups(llm, warm, quiet, reprefill, Measured(name))
    llm.reset_prefix_cache()
    cpu = time.process_time()
    try:
        _groups(llm, work, conditions, reprefill, out)
    except TimeoutError as error:
        out.error = str(error)
    out.cpu_s = time.process_time() - cpu
    if llm.stats()["preemptions"]:
        out.notes.append(f"{llm.stats()['preemptions']} preemptions")
    return out


def _groups(llm: LLM, work: Workload, conditions: Conditions, reprefill: bool, out: Measured) -> None:
    opened: list[Sequence] = []
    try:
        root = open_prompt(llm, work.prefix.token_ids, work.prefix)
        opened.append(root)
        synchronize(llm.device)
        start = time.perf_counter()
        llm.prefill([root])
        synchronize(llm.device)
        out.prefill_s = time.perf_counter() - start
        if reprefill:
            root.close()
            prompts = [work.prefix.token_ids] * work.forks
            out.end = fresh(llm, work, conditions, prompts, work.new_tokens, opened)
            said = conditions.continuation or out.end.outputs[0]
            for sequence in opened:
                sequence.close()
            out.inside = fresh(llm, work, conditions, work.inside_prompts(said), work.inside_tokens, opened)
        else:
            out.end = forked(llm, work, conditions, root, None, work.new_tokens, opened)
            if not out.end.complete:
                raise TimeoutError(f"cut off after {conditions.limit_s:g} s; give a longer --limit-s")
            source = opened[1]
            for sequence in (root, *opened[2:]):
                sequence.close()  # so that the KV held inside is that of the branches inside, as for the others
            out.inside = forked(llm, work, conditions, source, work.inside_at, work.inside_tokens, opened)
    finally:
        for sequence in opened:
            sequence.close()


def forked(
    llm: LLM, work: Workload, conditions: Conditions, parent: Sequence, at: int | None, count: int, opened: list
) -> Branches:
    """Forks of `parent`. Those inside it (at is given) get a token of their own each."""
    times = []
    for _ in range(FORK_SAMPLES):
        start = time.perf_counter()
        forks = parent.fork(work.forks, at)
        times.append(time.perf_counter() - start)
        for fork in forks:
            fork.close()
    copied = llm.stats()["tokens_copied"]
    clock = Clock(conditions, work.forks, count)
    branches = parent.fork(work.forks, at)
    opened += branches
    if at is not None:
        for branch, token in zip(branches, work.own_tokens, strict=True):
            branch.extend([token])
    outputs = _decode(llm, branches, work, count, clock)
    stats = llm.stats()
    return clock.read(
        outputs,
        bytes_copied=(stats["tokens_copied"] - copied) * (stats["block_bytes"] / BLOCK) / work.forks,
        recomputed=0.0,
        kv_bytes=stats["blocks_used"] * stats["block_bytes"],
        fork_s=statistics.median(times) / work.forks,
    )


def fresh(
    llm: LLM, work: Workload, conditions: Conditions, prompts: list[list[int]], count: int, opened: list
) -> Branches:
    """Sequences of their own, one a prompt."""
    clock = Clock(conditions, work.forks, count)
    branches = [open_prompt(llm, prompt, work.prefix) for prompt in prompts]
    opened += branches
    outputs = _decode(llm, branches, work, count, clock)
    stats = llm.stats()
    held = stats["blocks_used"] * stats["block_bytes"]
    return clock.read(outputs, bytes_copied=0.0, recomputed=float(len(prompts[0])), kv_bytes=held)


def _decode(llm: LLM, branches: Seq[Sequence], work: Workload, count: int, clock: Clock) -> list[list[int]]:
    """Runs the branches to `count` new tokens each, or until the time is over."""
    starts = [len(branch) for branch in branches]
    for index, branch in enumerate(branches):
        llm.submit(
            branch,
            SamplingParams(
                temperature=work.temperature, max_tokens=count, ignore_eos=True, seed=index, detokenize=False
            ),
        )
    while llm.scheduler.has_work and not clock.over:
        llm.step()
        clock.tokens_are([len(branch) - start for branch, start in zip(branches, starts, strict=True)])
    for branch in branches:
        llm.abort(branch)
    return [branch.token_ids[start:] for branch, start in zip(branches, starts, strict=True)]


def open_prompt(llm: LLM, token_ids: list[int], prefix: Prefix) -> Sequence:
    return llm.open({"prompt_token_ids": token_ids, "multi_modal_data": {"image": prefix.images}})


def _beginning(prefix: Prefix, length: int) -> Prefix:
    """The first `length` tokens, or as many as hold the images."""
    images = sum(image.num_tokens for image in prefix.images)
    return Prefix(prefix.token_ids[: max(length, images + 8) if images else length], prefix.images)


def kv_bytes_of(work: Workload, conditions: Conditions, reprefill: bool) -> int:
    """Room for everything that is held at once, with a twentieth to spare."""
    config = ModelConfig.from_pretrained(conditions.path).text
    per_block = 2 * config.num_layers * config.num_kv_heads * config.head_dim * conditions.dtype.itemsize * BLOCK
    prefix, longest = -(-len(work.prefix) // BLOCK), -(-work.longest // BLOCK)
    if reprefill:
        blocks = work.forks * (longest + 1)
    else:
        blocks = prefix + (2 * work.forks + FORK_SAMPLES) * (longest - prefix + 2)
    return int(max(blocks * 1.05, 64) + 16) * per_block
