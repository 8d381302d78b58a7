"""The engine against transformers however a prompt is cut, preempted and forked; fp32 and bf16, four checkpoints."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, SamplingParams, Sequence
from engine.images import ImageInput
from tests.engine.reference import (
    assert_greedy,
    load_reference,
    lost_logit,
    prefill_logits,
    random_prompt,
    reference_logits,
)

BLOCK = 8
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)

Prompt = tuple[list[int], list[ImageInput]]


@pytest.fixture(
    scope="module", params=["vl_checkpoint", "vl_untied_checkpoint", "text_checkpoint", "text_tied_checkpoint"]
)
def path(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reference(path: Path) -> Any:
    return load_reference(path)


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**31)
    print(f"seed = {seed}")  # pytest shows it when a test fails
    return random.Random(seed)


def prompts(rng: random.Random, llm: LLM) -> list[Prompt]:
    """Random text; with 0 to 4 images of random sizes where the model sees."""
    return [random_prompt(rng, llm, images) for images in (range(5) if llm.config.vision else [0] * 3)]


def opened(llm: LLM, prompt: Prompt) -> Sequence:
    return llm.open({"prompt_token_ids": prompt[0], "multi_modal_data": {"image": prompt[1]}})


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_every_chunk_size(path: Path, reference: Any, rng: random.Random) -> None:
    """Chunks of 1, 2, … all tokens: inside images, at their edges, with a part of a block."""
    llm = LLM(path, kv_cache_bytes=1 << 22, block_size=BLOCK)
    tokens, images = random_prompt(rng, llm, 2 if llm.config.vision else 0)
    tokens, images = (tokens, images) if images else ([rng.randrange(7, 260) for _ in range(30)], [])
    expected = reference_logits(reference, tokens, images)
    for chunk in range(1, len(tokens) + 1):
        llm.scheduler.max_batch_tokens = chunk
        assert relative_error(prefill_logits(llm, tokens, images), expected) < 1e-4, f"chunks of {chunk}"
    llm.scheduler.max_batch_tokens = rng.randint(1, len(tokens))
    llm.reset_prefix_cache()
    with opened(llm, (tokens, images)) as sequence:
        assert_greedy(llm, reference, tokens, images, llm.run([sequence], GREEDY)[0].token_ids)


def test_forced_preemption(path: Path, reference: Any, rng: random.Random) -> None:
    """Room for little more than the longest prompt: the others are dropped and computed again in between."""
    roomy = LLM(path, kv_cache_bytes=1 << 22, block_size=BLOCK)
    given = prompts(rng, roomy)
    new = 40
    blocks = 2 + (max(len(tokens) for tokens, _ in given) + new) // BLOCK
    tight = LLM(path, kv_cache_bytes=roomy.kv.bytes_per_block * blocks, block_size=BLOCK, max_batch_tokens=50)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    short = [prompt for prompt in given for _ in range(2)]
    sequences = [opened(tight, prompt) for prompt in short]
    outputs = tight.run(sequences, params)
    for (tokens, images), output in zip(short, outputs, strict=True):
        assert_greedy(tight, reference, tokens, images, output.token_ids)
    for sequence in sequences:
        sequence.close()
    assert tight.stats()["preemptions"] > 0 and tight.stats()["blocks_used"] == 0


def test_forks_of_forks(path: Path, reference: Any, rng: random.Random) -> None:
    """At random tokens of prompts and continuations, before and behind images, all running side by side."""
    llm = LLM(path, kv_cache_bytes=1 << 22, block_size=BLOCK)
    live = [opened(llm, prompt) for prompt in prompts(rng, llm)]
    for _ in range(3):
        for sequence in list(live):
            cuts = [at for at in range(1, len(sequence) + 1) if not any(s.start < at < s.stop for s in sequence.spans)]
            live += sequence.fork(at=rng.choice(cuts))
        before = [(list(sequence.token_ids), list(sequence.images)) for sequence in live]
        outputs = llm.run(live, GREEDY)
        for (tokens, images), output in rng.sample(list(zip(before, outputs, strict=True)), 6):
            assert_greedy(llm, reference, tokens, images, output.token_ids)
    for sequence in live:
        sequence.close()
    assert llm.stats()["blocks_used"] == 0


def test_bf16_is_as_near_to_fp32_as_transformers_bf16(path: Path, rng: random.Random) -> None:
    """The truth is the model of the bf16-rounded weights, computed in fp32.

    Every bf16 implementation rounds some tens of activations on a token's way to 8 bits, at different places; so two
    of them differ from each other as much as from the truth, and the bound can only be relative: half as much again
    as transformers' own error on the same prompt, and a chosen token that is best in the truth up to that error.
    """
    exact, rounded = load_reference(path, rounded=True), load_reference(path, torch.bfloat16)
    llm = LLM(path, dtype=torch.bfloat16, kv_cache_bytes=1 << 22, block_size=BLOCK)
    mine, theirs = [], []
    for tokens, images in prompts(rng, llm):
        truth = reference_logits(exact, tokens, images)
        theirs.append(relative_error(reference_logits(rounded, tokens, images), truth))
        mine.append(relative_error(prefill_logits(llm, tokens, images).float(), truth))
        with opened(llm, (tokens, images)) as sequence:
            new = llm.run([sequence], GREEDY)[0].token_ids
        lost = lost_logit(llm, reference_logits(exact, tokens + new, images)[len(tokens) - 1 : -1], new)
        scale = truth.std() * max(theirs[-1], 0.01)
        assert (lost < 6 * scale).all(), f"a token {lost.max()} below the best; errors are about {scale}"
    assert sum(mine) < 1.5 * sum(theirs), (mine, theirs)
    assert max(mine) < 0.1, mine
