"""Decoding over static buffers, run without capture: the same tokens and bits as steps that are laid out anew."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import LLM, SamplingParams, Sequence
from engine.graphs import bucket_sizes
from kernels import paged_attention, paged_plan
from kernels.paged_attention import fixed_paged_plan
from kernels.paged_attention.plan import PagedTile
from tests.engine.checkpoints import IMAGE, VISION_END, VISION_START

STOP = 40
BLOCK = 8


def engine(path: Path, graphs: bool, **options) -> LLM:
    llm = LLM(path, **{"kv_cache_bytes": 1 << 22, "block_size": BLOCK, "max_batch_tokens": 64, **options})
    if graphs:
        llm.runner.use_graphs(llm.scheduler.max_num_seqs, capture=False)
    return llm


def draw_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        max_tokens=rng.randint(1, 20),
        stop_token_ids=(STOP,),
        stop=("zz",) if rng.random() < 0.1 else (),
        presence_penalty=rng.choice([0.0] * 9 + [0.5]),
        seed=rng.randrange(2**31),
        ignore_eos=True,
    )


def walk(llm: LLM, seed: int) -> list:
    """A random hour in the life of an engine; everything that comes out of it, and what is left in its pool."""
    rng = random.Random(seed)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    picture = llm.processor.image(Image.fromarray(pixels))
    seen = [VISION_START, *[IMAGE] * picture.num_tokens, VISION_END]
    live: list[Sequence] = []
    out: list = []
    for _ in range(12):
        verb = rng.choice(["open", "fork", "run", "step", "step", "extend", "close"])
        idle = list(live)
        if verb == "open" or not idle:
            images = rng.random() < 0.3
            tokens = [rng.randrange(50, 260) for _ in range(rng.randint(1, 30))] + seen * images + [9]
            live.append(llm.open({"prompt_token_ids": tokens, "multi_modal_data": {"image": [picture] * images}}))
        elif verb == "fork":
            parent = rng.choice(live)
            cuts = [at for at in range(1, len(parent) + 1) if not any(s.start < at < s.stop for s in parent.spans)]
            live += parent.fork(rng.randint(1, 3), at=rng.choice([cuts[-1], rng.choice(cuts)]))
        elif verb == "run":
            outputs = llm.run(idle, [draw_params(rng) for _ in idle])
            out += [(o.token_ids, o.logprobs, o.entropies, o.finish_reason, o.stop_reason) for o in outputs]
        elif verb == "step":  # runs that are forked and aborted in the middle
            for sequence in idle:
                llm.submit(sequence, draw_params(rng))
            results = [one for _ in range(rng.randint(1, 6)) for one in llm.step()]
            live += rng.choice(idle).fork(2)
            results += [one for _ in range(rng.randint(0, 6)) for one in llm.step()]
            for sequence in idle:
                if rng.random() < 0.5:
                    llm.abort(sequence)
            results += llm._drain()
            out += [(o.token_ids, o.logprobs, o.entropies, o.finish_reason, o.stop_reason) for _, o in results]
        elif verb == "extend":
            rng.choice(idle).extend([rng.randrange(50, 260) for _ in range(rng.randint(1, 9))])
        else:
            sequence = rng.choice(live)
            sequence.close()
            live.remove(sequence)
    for sequence in live:
        assert len(sequence.block_table) == -(-sequence.num_computed // BLOCK)
        out.append(list(sequence.token_ids))
        sequence.close()
    assert llm.stats()["blocks_used"] == 0
    assert llm.pool.num_free == llm.pool.num_blocks
    return out


def test_a_random_walk_comes_out_the_same(vl_checkpoint: Path) -> None:
    seed = random.randrange(2**31)
    plain, graphs = engine(vl_checkpoint, graphs=False), engine(vl_checkpoint, graphs=True)
    for number in range(3):
        expected, actual = walk(plain, seed + number), walk(graphs, seed + number)
        compare(actual, expected, f"seed {seed + number}")


def compare(actual: list, expected: list, what: str) -> None:
    assert len(actual) == len(expected), what
    for one, other in zip(actual, expected, strict=True):
        if isinstance(one, list):
            assert one == other, what
        else:
            assert (one[0], one[3], one[4]) == (other[0], other[3], other[4]), what
            np.testing.assert_allclose(one[1], other[1], atol=1e-4, err_msg=what)
            np.testing.assert_allclose(one[2], other[2], atol=1e-4, err_msg=what)


def test_the_same_bits_where_batches_have_the_sizes_of_buckets(vl_checkpoint: Path) -> None:
    """Products have as many rows then, so MKL sums in the same order; trees change from run to run."""
    seed = random.randrange(2**31)
    results = []
    for graphs in (False, True):
        rng, llm = random.Random(seed), engine(vl_checkpoint, graphs)
        rows: list = []
        with llm.open([rng.randrange(7, 260) for _ in range(3 * BLOCK + 2)]) as root:
            llm.prefill([root])
            for size in (8, 4, 16, 8):
                inner = root.fork(size // 4)
                llm.run(inner, [SamplingParams(max_tokens=5, seed=i, ignore_eos=True) for i in range(len(inner))])
                leaves = [leaf for node in inner for leaf in node.fork(4, at=len(node) - rng.randrange(4))]
                params = [SamplingParams(max_tokens=12, seed=rng.randrange(99), ignore_eos=True) for _ in leaves]
                rows += [(o.token_ids, o.logprobs, o.entropies) for o in llm.run(leaves, params)]
                for sequence in inner + leaves:
                    sequence.close()
        results.append(rows)
        if graphs:
            assert llm.runner.graphs is not None and {4, 8, 16} <= set(llm.runner.graphs._buckets)
    assert results[0] == results[1], f"seed {seed}"


def test_steps_are_launched_before_the_last_ones_tokens_are_known(text_checkpoint: Path) -> None:
    llm = engine(text_checkpoint, graphs=True)
    sequences = [llm.open([20 + i, 30, 40]) for i in range(3)]
    for index, sequence in enumerate(sequences):
        llm.submit(sequence, SamplingParams(max_tokens=4 + index, ignore_eos=True, seed=index))
    ahead = []
    while llm.scheduler.has_work:
        llm.step()
        ahead.append(llm._launched is not None)
    # Prefill; then a step is always ahead, until all that is left ends with the step that runs.
    assert ahead == [False, True, True, True, True, False]
    assert [len(sequence) for sequence in sequences] == [7, 8, 9]


def test_a_pool_that_is_too_small_is_shared_as_before(text_checkpoint: Path) -> None:
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    prompts = [[rng.randrange(7, 260) for _ in range(rng.randint(5, 20))] for _ in range(6)]
    params = [SamplingParams(max_tokens=40, seed=rng.randrange(2**31), ignore_eos=True) for _ in prompts]
    expected = engine(text_checkpoint, graphs=False).generate(prompts, params, use_tqdm=False)
    size = engine(text_checkpoint, graphs=False).kv.bytes_per_block * 16
    tight = engine(text_checkpoint, graphs=True, kv_cache_bytes=size)
    actual = tight.generate(prompts, params, use_tqdm=False)
    assert tight.stats()["preemptions"] > 0 and tight.stats()["blocks_used"] == 0
    for one, other in zip(actual, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids, f"seed {seed}"
        np.testing.assert_allclose(one.outputs[0].logprobs, other.outputs[0].logprobs, atol=1e-4)


def test_one_fixed_plan_serves_trees_that_change() -> None:
    """The Triton kernel, interpreted: other trees in the same buffer give the bits of a plan of their own."""
    seed = random.randrange(2**31)
    generator = torch.Generator().manual_seed(seed)
    cpu, tile = torch.device("cpu"), PagedTile(16, 16, 2)
    k_cache, v_cache = torch.randn(2, 20, 1, 8, 16, generator=generator)
    q = torch.randn(4, 2, 16, generator=generator)
    fixed = fixed_paged_plan(4, 64, cpu, tile=tile)
    starts = np.arange(5, dtype=np.int32)
    trees = {  # all share; two pairs; nobody, with rows that fill the batch up
        "one": ([[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 5], [0, 1, 2, 6]], [30, 26, 31, 32]),
        "two": ([[0, 1, 2, 3], [0, 1, 4, 5], [6, 7, 8, 9], [6, 7, 10, 11]], [29, 17, 25, 32]),
        "none": ([[12, 13, 14, 15], [16, 17, 18, 19], [12, 13, 14, 15], [12, 13, 14, 15]], [20, 9, 20, 20]),
    }
    for name, (table, lengths) in trees.items():
        tables, contexts = np.array(table, dtype=np.int32), np.array(lengths, dtype=np.int32)
        arguments = torch.from_numpy(tables), torch.from_numpy(starts), torch.from_numpy(contexts), 0.25
        plans = [
            paged_plan(tables, starts, contexts, 2, k_cache, tile=tile, into=into, backend="triton")
            for into in (None, fixed)
        ]
        assert plans[1] is fixed
        own, again = (paged_attention(q, k_cache, v_cache, *arguments, plan, backend="triton") for plan in plans)
        assert torch.equal(own, again), f"{name}, seed {seed}"


@pytest.mark.parametrize("most", [1, 3, 8, 100, 1024])
def test_batches_are_filled_up_to_sizes_close_by(most: int) -> None:
    sizes = bucket_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for rows in range(1, most + 1):
        assert next(size for size in sizes if size >= rows) <= max(rows + 7, rows * 5 / 4)
