"""The engine against transformers: same weights, same prompts, same tokens."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3VLForConditionalGeneration

from engine import LLM, SamplingParams
from tests.engine.reference import prefill_logits, random_prompt, reference_inputs


@pytest.mark.parametrize("fixture", ["vl_checkpoint", "vl_untied_checkpoint"])
def test_vl_prefill_and_greedy_equal_transformers(fixture: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    reference = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None  # else it may not be generated before min_new_tokens
    llm = LLM(path, kv_cache_bytes=1 << 24, max_batch_tokens=rng.choice([17, 64, 4096]))
    prompts = [random_prompt(rng, llm, images) for images in (0, 1, 2, 3, 4)]
    for tokens, images in prompts:
        with torch.no_grad():
            expected = reference(**reference_inputs(tokens, images)).logits[0]
        actual = prefill_logits(llm, tokens, images)
        error = (actual - expected).norm() / expected.norm()
        assert error < 1e-4, f"{len(images)} images: relative error {error} (seed {seed})"
    outputs = llm.generate(
        [{"prompt_token_ids": tokens, "multi_modal_data": {"image": images}} for tokens, images in prompts],
        SamplingParams(temperature=0, max_tokens=64, ignore_eos=True),
        use_tqdm=False,
    )
    banned = torch.tensor(llm.config.banned_token_ids)
    for (tokens, images), output in zip(prompts, outputs, strict=True):
        greedy = reference.generate(
            **reference_inputs(tokens, images),
            do_sample=False,
            max_new_tokens=64,
            min_new_tokens=64,
            suppress_tokens=banned.tolist(),
            pad_token_id=0,
        )[0, len(tokens) :]
        assert output.outputs[0].token_ids == greedy.tolist(), f"{len(images)} images (seed {seed})"
    assert llm.stats()["blocks_used"] == 0


def test_text_prefill_and_greedy_equal_transformers(text_checkpoint: Path) -> None:
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    reference = AutoModelForCausalLM.from_pretrained(text_checkpoint, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None
    llm = LLM(text_checkpoint, kv_cache_bytes=1 << 24)
    prompts = [[rng.randrange(320) for _ in range(length)] for length in (1, 2, 16, 17, 100)]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64, ignore_eos=True), use_tqdm=False)
    for tokens, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            expected = reference(ids).logits[0]
        error = (prefill_logits(llm, tokens, []) - expected).norm() / expected.norm()
        assert error < 1e-4, f"prompt of {len(tokens)}: relative error {error} (seed {seed})"
        greedy = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=64,
            min_new_tokens=64,
            pad_token_id=0,
        )
        assert output.outputs[0].token_ids == greedy[0, len(tokens) :].tolist(), f"seed {seed}"


@pytest.mark.parametrize("images", [0, 2])
def test_bf16_is_as_close_to_exact_as_transformers(images: int, vl_checkpoint: Path) -> None:
    """Both beside the same rounded weights in fp32; and what is said greedily is the best token up to that error."""
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    narrow = Qwen3VLForConditionalGeneration.from_pretrained(vl_checkpoint, dtype=torch.bfloat16).eval()
    exact = Qwen3VLForConditionalGeneration.from_pretrained(vl_checkpoint, dtype=torch.bfloat16).float().eval()
    llm = LLM(vl_checkpoint, dtype=torch.bfloat16, kv_cache_bytes=1 << 24, max_batch_tokens=rng.choice([17, 4096]))
    tokens, pictures = random_prompt(rng, llm, images)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    prompt = {"prompt_token_ids": tokens, "multi_modal_data": {"image": pictures}}
    whole = tokens + llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
    with torch.no_grad():
        expected, theirs = (model(**reference_inputs(whole, pictures)).logits[0].float() for model in (exact, narrow))
    ours = prefill_logits(llm, whole, pictures)
    errors = [((logits - expected).norm() / expected.norm()).item() for logits in (ours, theirs)]
    assert errors[0] < 1.3 * errors[1] + 1e-3, f"{errors} (seed {seed})"
    expected[:, list(llm.config.banned_token_ids)] = -torch.inf
    said = expected[len(tokens) - 1 : -1].gather(1, torch.tensor(whole[len(tokens) :])[:, None])[:, 0]
    slack = 2 * (ours - expected)[expected.isfinite()].abs().max()
    assert (expected[len(tokens) - 1 : -1].amax(1) - said <= slack).all(), f"seed {seed}"


def test_logprobs_and_entropies_are_those_of_transformers(vl_checkpoint: Path) -> None:
    seed = random.randrange(2**31)
    rng = random.Random(seed)
    reference = Qwen3VLForConditionalGeneration.from_pretrained(vl_checkpoint, dtype=torch.float32).eval()
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 24)
    tokens, images = random_prompt(rng, llm, 2)
    temperature = 0.7
    params = SamplingParams(temperature=temperature, max_tokens=20, n=3, seed=seed, ignore_eos=True)
    prompt = {"prompt_token_ids": tokens, "multi_modal_data": {"image": images}}
    output = llm.generate([prompt], params, use_tqdm=False)[0]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1, "siblings drew the same noise"
    for completion in output.outputs:
        whole = tokens + completion.token_ids
        with torch.no_grad():
            logits = reference(**reference_inputs(whole, images)).logits[0, len(tokens) - 1 : -1]
        expected = (logits / temperature).log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        entropy = -(expected.exp() * expected).sum(-1)
        assert torch.allclose(torch.tensor(completion.logprobs), chosen, atol=2e-4), f"seed {seed}"
        assert torch.allclose(torch.tensor(completion.entropies), entropy, atol=2e-4), f"seed {seed}"
        assert not set(completion.token_ids) & set(llm.config.banned_token_ids)
