"""Several tokens in one call are the tokens of as many single steps, bit for bit, whatever happens in between."""

import random
from pathlib import Path

import pytest
import torch

from engine import LLM, CompletionOutput, SamplingParams, Sequence
from kernels._library import LOADED, MODE

pytestmark = pytest.mark.skipif(not LOADED or MODE == "reference", reason="the C++ kernels are not built")


def engine(path: Path, steps: int, **options: object) -> LLM:
    llm = LLM(path, num_scheduler_steps=steps, **{"kv_cache_bytes": 1 << 22, **options})
    assert llm.runner.packed is not None
    return llm


def params_of(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.randint(1, 60),
        temperature=rng.choice([0.0, 0.7, 1.0]),
        seed=rng.randrange(2**40),
        stop_token_ids=tuple(rng.sample(range(300), rng.choice([0, 1, 4, 40]))),
        ignore_eos=rng.random() < 0.5,
        detokenize=False,
    )


def said(output: CompletionOutput) -> tuple:
    return output.token_ids, output.logprobs, output.entropies, output.finish_reason, output.stop_reason


def generated(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[tuple]:
    return [said(request.outputs[0]) for request in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("block_size", [16, 32])
def test_bursts_give_what_single_steps_give(block_size: int, vl_checkpoint: Path) -> None:
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    root = [rng.randrange(7, 260) for _ in range(37)]
    prompts = [
        root[: rng.randint(1, 37)] + [rng.randrange(7, 260) for _ in range(rng.randint(0, 9))] for _ in range(25)
    ]
    params = [params_of(rng) for _ in prompts]
    single = engine(vl_checkpoint, 1, block_size=block_size)
    expected = generated(single, prompts, params)
    assert {"stop", "length"} == {reason for *_, reason, _ in expected}, f"seed {seed}"
    for steps in (2, rng.randint(3, 40), 64):
        llm = engine(vl_checkpoint, steps, block_size=block_size)
        assert generated(llm, prompts, params) == expected, f"seed {seed}, {steps} steps"
        counts, base = llm.stats(), single.stats()
        for name in ("steps", "prefill_tokens", "decode_tokens", "blocks_used"):
            assert counts[name] == base[name], f"seed {seed}, {steps} steps: {name}"


def test_bursts_between_forks_aborts_and_new_requests(vl_checkpoint: Path) -> None:
    """A tight pool, so that bursts are cut short and sequences preempted; every output is that of a run alone."""
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    alone = engine(vl_checkpoint, 1)
    block = alone.kv.bytes_per_block
    llm = engine(vl_checkpoint, 16, kv_cache_bytes=14 * block, max_num_seqs=7)
    running: dict[int, tuple[Sequence, list[int], SamplingParams]] = {}
    checked = forked = 0
    while checked < 60:
        if len(running) < 12:
            if running and rng.random() < 0.5:
                source = rng.choice(list(running.values()))[0]
                (sequence,) = source.fork(at=rng.randint(1, len(source)))
                forked += 1
            else:
                sequence = llm.open({"prompt_token_ids": [rng.randrange(7, 260) for _ in range(rng.randint(1, 40))]})
            params = params_of(rng)
            running[id(sequence)] = (sequence, list(sequence.token_ids), params)
            llm.submit(sequence, params)
        if rng.random() < 0.1:
            sequence = running.pop(rng.choice(list(running)))[0]
            llm.abort(sequence)
            sequence.close()
        for sequence, output in llm.step(rng.choice([None, 1, 5])):
            _, prompt, params = running.pop(id(sequence))
            assert said(output) == generated(alone, [prompt], [params])[0], f"seed {seed}, {params}"
            sequence.close()
            checked += 1
    for sequence, _, _ in running.values():
        sequence.close()
    assert forked and llm.stats()["preemptions"] and llm.stats()["blocks_used"] == 0, f"seed {seed}"


def test_what_a_burst_wrote_is_found_in_the_prefix_cache(vl_checkpoint: Path) -> None:
    prompt, params = [11, 12, 13] * 5, SamplingParams(max_tokens=70, ignore_eos=True, seed=3)
    found = []
    for steps in (1, 64):
        llm = engine(vl_checkpoint, steps)
        (request,) = llm.generate([prompt], params, use_tqdm=False)
        again = llm.generate([prompt + request.outputs[0].token_ids], params, use_tqdm=False)[0]
        found.append((again.num_cached_tokens, again.outputs[0].token_ids))
    assert found[0] == found[1] and found[0][0] == (15 + 70 - 1) // 16 * 16


def test_a_burst_only_where_nothing_needs_the_host(vl_checkpoint: Path) -> None:
    plain = SamplingParams(max_tokens=32, ignore_eos=True, seed=1)
    asks = {"stop": "zzz", "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5}
    for name, value in asks.items():
        llm = engine(vl_checkpoint, 16)
        sequences = [llm.open({"prompt_token_ids": [20 + index] * 9}) for index in range(2)]
        llm.submit(sequences[0], plain)
        llm.submit(sequences[1], SamplingParams(max_tokens=32, ignore_eos=True, seed=1, **{name: value}))
        llm.step()
        llm.step()
        assert [len(sequence) for sequence in sequences] == [11, 11], name
        llm.abort(sequences[1])
        llm.step()
        assert len(sequences[0]) == 27, name


def test_a_stream_has_every_token(vl_checkpoint: Path) -> None:
    llm = engine(vl_checkpoint, 16)
    sequence = llm.open({"prompt_token_ids": [9, 8, 7]})
    lengths = [len(out.token_ids) for _, out in llm.stream([sequence], SamplingParams(max_tokens=20, ignore_eos=True))]
    assert lengths == list(range(1, 21))


def test_sleep_gives_the_packed_weights_back(vl_checkpoint: Path) -> None:
    llm = engine(vl_checkpoint, 16)
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    before = generated(llm, [[11, 12, 13]], [params])
    held = llm.stats()["packed_bytes"]
    assert held > 0
    llm.sleep(1)
    assert llm.stats()["packed_bytes"] == held
    llm.wake_up()
    llm.sleep(2)
    assert llm.stats()["packed_bytes"] == 0
    llm.wake_up()
    llm.reload_weights()
    assert generated(llm, [[11, 12, 13]], [params]) == before


def test_an_engine_says_whether_its_steps_are_packed(vl_checkpoint: Path) -> None:
    assert engine(vl_checkpoint, 16).explain().splitlines()[-1] == "steps: packed"
    narrow = LLM(vl_checkpoint, kv_cache_bytes=1 << 22, dtype=torch.bfloat16)
    assert narrow.runner.packed is None and "not packed: they are C++ for fp32" in narrow.explain()
    small = LLM(vl_checkpoint, kv_cache_bytes=1 << 22, block_size=8)
    assert small.runner.packed is None and "blocks that are multiples of 16" in small.explain()
