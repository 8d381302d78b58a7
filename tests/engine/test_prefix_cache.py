"""The prefix cache changes what is computed, never what comes out; and the block pool against a plain model of it."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import LLM, SamplingParams
from engine.block_pool import BlockPool, OutOfBlocks, chain_hash
from tests.engine.checkpoints import IMAGE, VISION_END, VISION_START

BLOCK = 8


@pytest.fixture
def llm(vl_checkpoint: Path) -> LLM:
    return LLM(vl_checkpoint, kv_cache_bytes=1 << 22, block_size=BLOCK)


def greedy(llm: LLM, tokens: list[int], images: list | None = None):
    prompt = {"prompt_token_ids": tokens, "multi_modal_data": {"image": images or []}}
    return llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)[0]


def test_a_repeated_prompt_is_not_computed_again(llm: LLM) -> None:
    tokens = [10 + i % 200 for i in range(5 * BLOCK + 3)]
    first = greedy(llm, tokens)
    computed = llm.stats()["prefill_tokens"]
    again = greedy(llm, tokens)
    assert first.num_cached_tokens == 0 and again.num_cached_tokens == 5 * BLOCK
    assert llm.stats()["prefill_tokens"] - computed == 3
    assert again.outputs[0].token_ids == first.outputs[0].token_ids
    np.testing.assert_allclose(again.outputs[0].logprobs, first.outputs[0].logprobs, atol=1e-5)
    longer = greedy(llm, tokens + first.outputs[0].token_ids + [9])
    assert longer.num_cached_tokens == 6 * BLOCK  # sampled tokens as well
    changed = greedy(llm, [*tokens[: 2 * BLOCK], 9, *tokens[2 * BLOCK + 1 :]])
    assert changed.num_cached_tokens == 2 * BLOCK


def test_images_are_told_apart_by_content_and_place(llm: LLM) -> None:
    rng = np.random.default_rng()
    pictures = [Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)) for _ in range(2)]
    pads = llm.processor.image(pictures[0]).num_tokens

    def prompt(before: int) -> list[int]:
        return [30] * before + [VISION_START, *[IMAGE] * pads, VISION_END] + [40] * (3 * BLOCK)

    first = greedy(llm, prompt(2), [pictures[0]])
    assert greedy(llm, prompt(2), [pictures[0]]).num_cached_tokens >= 3 * BLOCK
    other = greedy(llm, prompt(2), [pictures[1]])
    assert other.num_cached_tokens == 0
    assert other.outputs[0].logprobs != first.outputs[0].logprobs
    llm.reset_prefix_cache()
    fresh = greedy(llm, prompt(2), [pictures[1]])
    np.testing.assert_allclose(other.outputs[0].logprobs, fresh.outputs[0].logprobs, atol=1e-5)


def test_new_weights_and_sleep_forget_the_cache(llm: LLM) -> None:
    tokens = [50] * (4 * BLOCK)
    for forget in (llm.weights_updated, llm.reset_prefix_cache, lambda: (llm.sleep(), llm.wake_up())):
        greedy(llm, tokens)
        forget()
        assert greedy(llm, tokens).num_cached_tokens == 0


def test_a_last_hidden_state_does_not_outlive_its_weights(llm: LLM) -> None:
    """After an update all of a sequence's KV may come from the cache; what follows is sampled with the new weights."""
    tokens = list(range(20, 20 + 3 * BLOCK))
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    with llm.open(tokens) as first, llm.open(tokens) as second:
        llm.prefill([first, second])
        llm.update_weights({name: value * 1.3 for name, value in llm.model.named_parameters()})
        expected = llm.run([first], params)[0]
        prefilled = llm.stats()["prefill_tokens"]
        actual = llm.run([second], params)[0]
        assert llm.stats()["prefill_tokens"] == prefilled, "all of its KV is in the cache"
        assert actual.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_without_prefix_caching_nothing_is_found(vl_checkpoint: Path) -> None:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22, block_size=BLOCK, enable_prefix_caching=False)
    greedy(llm, [50] * 30)
    assert greedy(llm, [50] * 30).num_cached_tokens == 0


def test_a_fork_inside_a_sealed_block_that_it_alone_holds_does_not_spoil_the_cache(llm: LLM) -> None:
    tokens = list(range(20, 20 + 2 * BLOCK))
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    root = llm.open(tokens)
    llm.prefill([root])
    (child,) = root.fork(at=BLOCK + 3)
    root.close()
    llm.run([child], params)  # writes into what was root's second block
    child.close()
    again = greedy(llm, tokens)
    assert again.num_cached_tokens == BLOCK
    llm.reset_prefix_cache()
    assert greedy(llm, tokens).outputs[0].token_ids == again.outputs[0].token_ids


def test_random_operations_of_the_pool_against_a_model() -> None:
    """References, the free list's order and the cache, against dictionaries and lists."""
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    pool = BlockPool(24, 4)
    refs = [0] * 24
    free = list(range(24))  # in the order in which blocks are taken
    content: dict[int, bytes] = {}
    tables: list[list[int]] = []
    for step in range(30_000):
        verb = rng.choice(["allocate", "allocate", "share", "release", "seal", "find", "reset"])
        if verb == "allocate":
            if not free:
                with pytest.raises(OutOfBlocks):
                    pool.allocate()
                continue
            block = free.pop(0)
            content.pop(block, None)
            refs[block] = 1
            assert pool.allocate() == block, f"seed {seed}, step {step}"
            tables.append([block])
        elif verb == "share" and tables:
            table = list(rng.choice(tables))
            pool.share(table)
            for block in table:
                refs[block] += 1
            tables.append(table)
        elif verb == "release" and tables:
            table = tables.pop(rng.randrange(len(tables)))
            pool.release(table)
            for block in reversed(table):
                refs[block] -= 1
                if refs[block] == 0:
                    free.insert(len(free) if block in content else 0, block)
        elif verb == "seal" and tables:
            block = rng.choice(tables)[0]
            digest = chain_hash(pool.root, bytes([rng.randrange(40)]))
            pool.seal(block, digest)
            if block not in content and digest not in content.values():
                content[block] = digest
        elif verb == "find":
            digest = chain_hash(pool.root, bytes([rng.randrange(40)]))
            holder = next((block for block, held in content.items() if held == digest), None)
            assert pool.share_cached(digest) == holder, f"seed {seed}, step {step}"
            if holder is not None:
                if refs[holder] == 0:
                    free.remove(holder)
                refs[holder] += 1
                tables.append([holder])
        elif verb == "reset" and rng.random() < 0.01:
            pool.reset_cache()
        assert pool.num_free == len(free)
        if step % 100 == 0:
            assert pool.refs == refs, f"seed {seed}, step {step}"


def test_what_a_preempted_run_finds_of_its_own_is_not_counted_as_cached(vl_checkpoint: Path, llm: LLM) -> None:
    """Two runs that do not fit together: one is preempted, and finds its own blocks when it goes on."""
    prompts = [[10 + i, *range(30, 30 + 2 * BLOCK)] for i in range(3)]
    tight = LLM(vl_checkpoint, kv_cache_bytes=llm.kv.bytes_per_block * 15, block_size=BLOCK)
    for n in (1, 2):
        tight.reset_prefix_cache()
        before = tight.stats()["preemptions"]
        params = SamplingParams(temperature=0, n=n, max_tokens=5 * BLOCK, ignore_eos=True)
        outputs = tight.generate(prompts, params, use_tqdm=False)
        assert tight.stats()["preemptions"] > before
        assert [output.num_cached_tokens for output in outputs] == [0, 0, 0]
    tight.reset_prefix_cache()
    greedy(tight, prompts[0])
    assert greedy(tight, prompts[0]).num_cached_tokens == 2 * BLOCK
