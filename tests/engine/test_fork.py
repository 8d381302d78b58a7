"""Forks: every branch equals a fresh run from the same prefix, and the pool ends empty."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from engine import LLM, ImageInput, SamplingParams, Sequence
from tests.engine.checkpoints import IMAGE, VISION_END, VISION_START

BLOCK = 4
STOP = 40  # ends some runs early


@pytest.fixture(scope="module")
def llm(vl_checkpoint: Path) -> LLM:
    return LLM(vl_checkpoint, kv_cache_bytes=1 << 22, block_size=BLOCK, max_batch_tokens=23)


@pytest.fixture(scope="module")
def picture(llm: LLM) -> ImageInput:
    pixels = np.random.default_rng(3).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return llm.processor.image(Image.fromarray(pixels))


def params(seed: int, max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=(STOP,), ignore_eos=True)


def observation(rng: random.Random, picture: ImageInput) -> tuple[list[int], list[ImageInput]]:
    text = [rng.randrange(7, 260) for _ in range(rng.randint(1, 6))]
    if rng.random() < 0.5:
        return text, []
    return [*text, VISION_START, *[IMAGE] * picture.num_tokens, VISION_END], [picture]


def check_against_fresh_run(llm: LLM, sequence: Sequence, seed: int, max_tokens: int) -> None:
    """Runs `sequence` and a fresh one opened with the same tokens: same tokens, same log-probs, same entropies."""
    llm.reset_prefix_cache()  # the fresh run computes everything itself
    fresh = llm.open(
        {"prompt_token_ids": list(sequence.token_ids), "multi_modal_data": {"image": list(sequence.images)}}
    )
    actual = llm.run([sequence], params(seed, max_tokens))[0]
    expected = llm.run([fresh], params(seed, max_tokens))[0]
    fresh.close()
    assert actual.token_ids == expected.token_ids
    assert actual.finish_reason == expected.finish_reason
    np.testing.assert_allclose(actual.logprobs, expected.logprobs, atol=1e-4)
    np.testing.assert_allclose(actual.entropies, expected.entropies, atol=1e-4)


def legal_cuts(sequence: Sequence) -> list[int]:
    return [at for at in range(1, len(sequence) + 1) if not any(s.start < at < s.stop for s in sequence.spans)]


def test_fork_at_every_position(llm: LLM, picture: ImageInput) -> None:
    rng = random.Random()
    tokens, images = [9, 9, 10], []
    for _ in range(2):
        more, new = observation(rng, picture)
        tokens, images = tokens + more, images + new
    with llm.open({"prompt_token_ids": tokens, "multi_modal_data": {"image": images}}) as root:
        llm.run([root], params(1, 9))
        for at in legal_cuts(root):
            (child,) = root.fork(at=at)
            assert child.token_ids == root.token_ids[:at]
            check_against_fresh_run(llm, child, seed=at, max_tokens=5)
            child.close()
        for span in root.spans:
            for at in range(span.start + 1, span.stop):
                with pytest.raises(ValueError, match="inside an image"):
                    root.fork(at=at)
        for at in (0, -1, len(root) + 1):
            with pytest.raises(ValueError, match=f"at={at}"):
                root.fork(at=at)
    assert llm.stats()["blocks_used"] == 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(3, 14))
def test_any_order_of_fork_extend_run_close(llm: LLM, picture: ImageInput, seed: int, steps: int) -> None:
    rng = random.Random(seed)
    tokens, images = observation(rng, picture)
    live = [llm.open({"prompt_token_ids": [8, *tokens], "multi_modal_data": {"image": images}})]
    try:
        random_walk(llm, picture, rng, live, steps)
        for index, sequence in enumerate(live):
            check_against_fresh_run(llm, sequence, seed=index, max_tokens=4)
    finally:
        for sequence in live:
            sequence.close()
    assert llm.stats()["blocks_used"] == 0
    assert not llm.sequences


def random_walk(llm: LLM, picture: ImageInput, rng: random.Random, live: list[Sequence], steps: int) -> None:
    for step in range(steps):
        if not live:
            return
        sequence = rng.choice(live)
        verb = rng.choice(["fork", "fork", "extend", "run", "run_all", "prefill", "close"])
        if verb == "fork":
            live += sequence.fork(n=rng.randint(1, 3), at=rng.choice(legal_cuts(sequence)))
        elif verb == "extend":
            sequence.extend(*observation(rng, picture))
        elif verb == "run":
            check_against_fresh_run(llm, sequence, seed=step, max_tokens=rng.randint(1, 6))
        elif verb == "run_all":
            llm.run(live, [params(rng.randrange(99), rng.randint(1, 6)) for _ in live])
        elif verb == "prefill":
            llm.prefill([sequence])
        else:
            sequence.close()
            live.remove(sequence)
        check_pool(llm, live)


def check_pool(llm: LLM, live: list[Sequence]) -> None:
    """References equal the occurrences in block tables; all else is free."""
    refs = [0] * llm.pool.num_blocks
    for sequence in live:
        for block in sequence.block_table:
            refs[block] += 1
        assert len(sequence.block_table) == -(-sequence.num_computed // BLOCK)
    assert refs == llm.pool.refs
    assert llm.pool.num_free == refs.count(0)


@pytest.mark.parametrize("length", [4 * BLOCK - 1, 4 * BLOCK, 4 * BLOCK + 1])
def test_a_fork_allocates_nothing_until_it_writes_and_then_one_block(llm: LLM, length: int) -> None:
    with llm.open([10] * length) as root:
        llm.prefill([root])
        before = llm.stats()
        children = root.fork(n=3)
        assert llm.stats()["blocks_used"] == before["blocks_used"]
        llm.run(
            children, [params(seed, 1) for seed in range(3)]
        )  # the query of the last token alone: nothing is written
        assert llm.stats()["blocks_used"] == before["blocks_used"]
        assert llm.stats()["blocks_copied"] == before["blocks_copied"]
        llm.prefill(children)  # writes the sampled token
        after = llm.stats()
        assert after["blocks_used"] - before["blocks_used"] == 3
        tail = length % BLOCK
        assert after["blocks_copied"] - before["blocks_copied"] == (3 if tail else 0)
        assert after["tokens_copied"] - before["tokens_copied"] == 3 * tail
        for child in children:
            child.close()


def test_the_last_holder_of_a_tail_writes_in_place(llm: LLM) -> None:
    root = llm.open([10] * (BLOCK + 2))
    llm.prefill([root])
    (child,) = root.fork()
    root.close()
    before = llm.stats()["blocks_copied"]
    check_against_fresh_run(llm, child, seed=0, max_tokens=5)
    assert llm.stats()["blocks_copied"] == before
    child.close()
    assert llm.stats()["blocks_used"] == 0


def test_forks_of_held_kv_prefill_nothing(llm: LLM) -> None:
    with llm.open(list(range(10, 50))) as root:
        llm.run([root], params(0, 8))
        prefilled = llm.stats()["prefill_tokens"]
        children = root.fork(n=4, at=43)
        llm.run(children, [params(seed, 6) for seed in range(4)])
        assert llm.stats()["prefill_tokens"] == prefilled
        for child in children:
            child.close()


def test_preemption_loses_no_token(vl_checkpoint: Path) -> None:
    """A cache too small for all at once: runs are preempted and recomputed, and end as they would have with room."""
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    prompts = [[rng.randrange(7, 260) for _ in range(rng.randint(5, 20))] for _ in range(6)]
    sampling = [params(rng.randrange(2**31), 30) for _ in prompts]
    roomy = LLM(vl_checkpoint, kv_cache_bytes=1 << 22, block_size=BLOCK)
    tight = LLM(vl_checkpoint, kv_cache_bytes=roomy.kv.bytes_per_block * 20, block_size=BLOCK)
    expected = roomy.generate(prompts, sampling, use_tqdm=False)
    actual = tight.generate(prompts, sampling, use_tqdm=False)
    for one, other in zip(actual, expected, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids, f"seed {seed}"
        np.testing.assert_allclose(one.outputs[0].logprobs, other.outputs[0].logprobs, atol=1e-4)
    assert tight.stats()["preemptions"] > 0
    assert tight.stats()["blocks_used"] == 0


def test_noise_does_not_depend_on_the_batch(llm: LLM) -> None:
    alone = llm.generate([[10, 11, 12]], params(5, 12), use_tqdm=False)[0].outputs[0]
    prompts = [[20 + i] * (i + 1) for i in range(7)]
    crowd = llm.generate([*prompts, [10, 11, 12]], [params(i, 12) for i in range(7)] + [params(5, 12)], use_tqdm=False)
    assert crowd[-1].outputs[0].token_ids == alone.token_ids


def test_sleep_gives_memory_back_and_sequences_survive(llm: LLM) -> None:
    with llm.open([10, 20, 30, 40, 50, 60]) as sequence:
        llm.run([sequence], params(0, 5))
        address = llm.kv.data.data_ptr()
        llm.sleep()
        assert llm.stats()["kv_bytes"] == 0
        with pytest.raises(RuntimeError, match="asleep"):
            llm.run([sequence], params(0, 5))
        llm.abort(sequence)
        llm.wake_up()
        assert llm.kv.data.data_ptr() == address
        check_against_fresh_run(llm, sequence, seed=3, max_tokens=5)


def test_updated_weights_are_used_at_once(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22)
    tokens = list(range(20, 60))
    before = llm.generate([tokens], params(0, 5), use_tqdm=False)[0].outputs[0]
    state = {name: parameter.clone() for name, parameter in llm.model.named_parameters()}
    noise = {name: torch.randn_like(value) * 0.1 * value.std() for name, value in state.items() if value.dim() > 1}
    noisy = {name: state[name] + change for name, change in noise.items()}
    with llm.open(tokens) as held:
        llm.prefill([held])
        llm.update_weights(noisy)
        assert held.num_computed == 0, "KV of the old weights is not used"
        changed = llm.run([held], params(0, 5))[0]
    assert changed.logprobs != before.logprobs
    llm.update_weights(iter(state.items()))
    again = llm.generate([tokens], params(0, 5), use_tqdm=False)[0].outputs[0]
    assert (again.token_ids, again.logprobs) == (before.token_ids, before.logprobs)
    assert llm.weight_version == 2
    with pytest.raises(ValueError, match=r"lm_head\.bias, of shape \[3\], is unknown"):
        llm.update_weights({"lm_head.bias": torch.zeros(3)})
    # A tied model's own state dict names its head too, which is the embedding.
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(vl_checkpoint).state_dict()
    assert "lm_head.weight" in theirs
    llm.update_weights(theirs)
    tied = llm.generate([tokens], params(0, 5), use_tqdm=False)[0].outputs[0]
    assert (tied.token_ids, tied.logprobs) == (before.token_ids, before.logprobs)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not the embedding"):
        llm.update_weights({"lm_head.weight": torch.zeros(3)})
