"""Sampling parameters against plain recomputations, streaming, and refused values."""

import copy
import dataclasses
import math
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import LLM, SamplingParams


@pytest.fixture(scope="module")
def llm(text_checkpoint: Path) -> LLM:
    return LLM(text_checkpoint, kv_cache_bytes=1 << 22)


@pytest.fixture
def prompt() -> list[int]:
    seed = random.randrange(2**31)
    print(f"seed = {seed}")
    return [random.Random(seed).randrange(7, 260) for _ in range(9)]


def logits_after(llm: LLM, tokens: list[int]) -> torch.Tensor:
    """The model's own logits for what follows `tokens`, computed from nothing."""
    llm.reset_prefix_cache()
    with llm.open(tokens) as sequence:
        llm.prefill([sequence])
        assert sequence.last_hidden is not None
        return llm.model.logits(sequence.last_hidden[None])[0].clone()


def complete(llm: LLM, prompt: list[int], **params):
    params = {"max_tokens": 12, "ignore_eos": True, **params}
    return llm.generate([prompt], SamplingParams(**params), use_tqdm=False)[0].outputs[0]


def test_penalties_are_vllms_formula(llm: LLM, prompt: list[int]) -> None:
    params = {"presence_penalty": 0.9, "frequency_penalty": 0.7, "repetition_penalty": 1.6}
    output = complete(llm, prompt, temperature=0, **params)
    tokens = list(prompt)
    for token, logprob in zip(output.token_ids, output.logprobs, strict=True):
        raw = logits_after(llm, tokens)
        z = raw.clone()
        for seen in set(tokens):
            z[seen] = z[seen] / 1.6 if z[seen] > 0 else z[seen] * 1.6
        for sampled in set(tokens[len(prompt) :]):
            z[sampled] -= 0.9 + 0.7 * tokens[len(prompt) :].count(sampled)
        assert token == int(z.argmax())
        assert logprob == pytest.approx(raw.log_softmax(-1)[token].item(), abs=1e-4)
        tokens.append(token)
    assert output.token_ids != complete(llm, prompt, temperature=0).token_ids


def test_penalties_survive_preemption_and_forks(text_checkpoint: Path, llm: LLM) -> None:
    prompts = [[20 + i, 30, 40 + i, 50] for i in range(6)]
    params = SamplingParams(temperature=0, presence_penalty=2.0, max_tokens=30, ignore_eos=True)
    tight = LLM(text_checkpoint, block_size=8, kv_cache_bytes=llm.kv.bytes_per_block // 2 * 11)
    expected = llm.generate(prompts, params, use_tqdm=False)
    actual = tight.generate(prompts, params, use_tqdm=False)
    assert tight.stats()["preemptions"] > 0
    assert [o.outputs[0].token_ids for o in actual] == [o.outputs[0].token_ids for o in expected]


def test_bias_and_min_tokens(llm: LLM, prompt: list[int]) -> None:
    assert complete(llm, prompt, logit_bias={77: 1e4}).token_ids == [77] * 12
    ended = complete(llm, prompt, logit_bias={77: 1e4}, stop_token_ids=[77])
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([77], "stop", 77)
    later = complete(llm, prompt, logit_bias={77: 1e4}, stop_token_ids=[77], min_tokens=5)
    assert len(later.token_ids) == 6 and later.token_ids[-1] == 77 and 77 not in later.token_ids[:-1]


def test_stop_strings(llm: LLM, prompt: list[int]) -> None:
    free = complete(llm, prompt, seed=3, max_tokens=40)
    stop = free.text[11:14]
    at = free.text.index(stop)
    output = complete(llm, prompt, seed=3, max_tokens=40, stop=[stop, "never said, surely"])
    assert (output.text, output.finish_reason, output.stop_reason) == (free.text[:at], "stop", stop)
    assert output.token_ids == free.token_ids[: len(output.token_ids)]
    kept = complete(llm, prompt, seed=3, max_tokens=40, stop=stop, include_stop_str_in_output=True)
    assert kept.text == free.text[: at + len(stop)]


def test_bad_words_are_never_completed(llm: LLM, prompt: list[int]) -> None:
    letters = dict.fromkeys(llm.processor.encode_text("abcdefghijklmnopqrstuvwxyz"), 1e3)  # text that encodes to itself
    free = complete(llm, prompt, temperature=0, logit_bias=letters)
    word = llm.processor.decode(free.token_ids[2:4])
    output = complete(llm, prompt, temperature=0, logit_bias=letters, bad_words=[word])
    assert word in free.text and word not in output.text
    assert output.token_ids[:3] == free.token_ids[:3] or word in free.text[:3]


def test_top_and_processed_logprobs(llm: LLM, prompt: list[int]) -> None:
    params = {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.01, "presence_penalty": 0.5, "seed": 11}
    output = complete(llm, prompt, logprobs=4, processed_logprobs=True, **params)
    assert output.top_logprobs is not None and output.processed_logprobs is not None
    tokens = list(prompt)
    for index, token in enumerate(output.token_ids):
        raw = logits_after(llm, tokens)
        logp = (raw / 0.7).log_softmax(-1)
        top = dict(zip(logp.topk(4).indices.tolist(), logp.topk(4).values.tolist(), strict=True))
        assert output.top_logprobs[index] == pytest.approx(top, abs=1e-4)
        assert output.logprobs[index] == pytest.approx(logp[token].item(), abs=1e-4)
        shaped = raw.clone()
        shaped[list(set(tokens[len(prompt) :]))] -= 0.5
        p = (shaped / 0.7).softmax(-1)
        kept = p >= 0.01 * p.max()
        kept &= p >= p[kept].topk(min(5, int(kept.sum()))).values[-1]
        order = torch.where(kept, p, 0).argsort(descending=True)
        before = (p * kept)[order].cumsum(0) - (p * kept)[order]
        kept[order[before >= 0.8 * (p * kept).sum()]] = False
        expected = (p * kept / (p * kept).sum()).log()[token].item()
        assert output.processed_logprobs[index] == pytest.approx(expected, abs=1e-4)
        tokens.append(token)


def test_min_p_leaves_only_probable_tokens(llm: LLM, prompt: list[int]) -> None:
    greedy = complete(llm, prompt, temperature=0).token_ids
    assert complete(llm, prompt, min_p=1.0, seed=1).token_ids == greedy


def test_stream_yields_what_run_returns(llm: LLM, prompt: list[int]) -> None:
    params = [SamplingParams(seed=seed, max_tokens=3 + seed, ignore_eos=True) for seed in range(3)]
    with llm.open(prompt) as root:
        first, second = root.fork(3), root.fork(3)
        expected = llm.run(first, params)
        seen: dict[int, list] = {}
        for sequence, output in llm.stream(second, params):
            seen.setdefault(second.index(sequence), []).append(output)
        for index, outputs in seen.items():
            assert [len(output.token_ids) for output in outputs] == list(range(1, 4 + index))
            assert [output.finish_reason for output in outputs] == [None] * (2 + index) + ["length"]
            assert outputs[-1].token_ids == expected[index].token_ids
            assert outputs[-1].logprobs == pytest.approx(expected[index].logprobs, abs=1e-5)
        (third,) = root.fork()
        for _ in llm.stream([third], SamplingParams(max_tokens=50, ignore_eos=True)):
            break
        assert not llm.scheduler.has_work and len(third) == len(prompt) + 1
        for sequence in [*first, *second, third]:
            sequence.close()
    assert llm.stats()["blocks_used"] == 0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"min_tokens": 17}, "min_tokens is 17"),
        ({"stop": [""]}, "stop is"),
        ({"stop": "x", "detokenize": False}, "detokenize is False"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"bad_words": [""]}, "bad_words is"),
        ({"temperature": 1e-38}, "temperature is 1e-38"),  # a quotient by it is infinite in fp32
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty is 1e-38"),
        ({"frequency_penalty": -3e38}, "frequency_penalty is -3e"),
        ({"logit_bias": {20: 1e39}}, "logit_bias is {20: 1e"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 2**63}, "top_k is 9223372036854775808"),
        ({"n": 0}, "n is 0; it must be at least 1"),
        ({"n": True}, "n is True; it must be a whole number"),
        ({"n": 1.0}, "n is 1.0; it must be a whole number"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; it must be a whole number, or None"),
        ({"temperature": "1"}, "temperature is '1'; it must be a number"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"stop": [1]}, "stop is"),
        ({"stop": b"x"}, "stop is"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids is"),
    ],
)
def test_bad_values_are_named(params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


def test_none_and_off_are_vllms() -> None:
    none = SamplingParams(stop=None, stop_token_ids=None, bad_words=None, logit_bias=None, top_k=-1)
    assert none == SamplingParams() and not none.shapes_logits
    assert SamplingParams(n=np.int64(2), seed=np.uint64(5), temperature=np.float32(0.5)) == SamplingParams(
        n=2, seed=5, temperature=0.5
    )
    assert SamplingParams(logit_bias={"7": 1}).logit_bias == {7: 1.0}  # as JSON has it
    assert SamplingParams(stop="ab", bad_words="cd", stop_token_ids=7).stop == ("ab",)
    assert SamplingParams(bad_words="cd", stop_token_ids=7) == SamplingParams(bad_words=["cd"], stop_token_ids=[7])


def test_params_are_frozen_and_travel() -> None:
    params = SamplingParams(stop="a", seed=3, logit_bias={1: 2.0})
    for other in (pickle.loads(pickle.dumps(params)), copy.deepcopy(params), dataclasses.replace(params, n=1)):
        assert other == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]


@pytest.mark.parametrize("seed", [-5, -(1 << 63), (1 << 63) - 1])
def test_a_seed_is_64_bits_signed_or_not(llm: LLM, prompt: list[int], seed: int) -> None:
    drawn = complete(llm, prompt, seed=seed).token_ids
    assert drawn == complete(llm, prompt, seed=seed % (1 << 64)).token_ids
    assert drawn != complete(llm, prompt, seed=seed ^ 1 << 40).token_ids


def test_a_stop_string_whose_character_is_two_tokens(llm: LLM, prompt: list[int]) -> None:
    """It ends the run at its last byte, also where the same bytes are said in another order before."""
    first, second = llm.processor.encode_text("é")
    bias = {first: 1000.0, second: 950.0}  # the penalty makes them alternate
    free = complete(llm, prompt, temperature=0, logit_bias=bias, frequency_penalty=100.0, max_tokens=6)
    assert free.token_ids == [first, second] * 3 and free.text == "ééé"
    for stop, tokens, text in (("é", 2, ""), ("éé", 4, ""), (["x", "éé"], 4, ""), ("ééé", 6, "")):
        output = complete(llm, prompt, temperature=0, logit_bias=bias, frequency_penalty=100.0, max_tokens=6, stop=stop)
        assert (len(output.token_ids), output.text, output.finish_reason) == (tokens, text, "stop")
    assert "\N{REPLACEMENT CHARACTER}" in complete(llm, prompt, temperature=0, logit_bias={first: 1e3}, stop="é").text


def test_what_ends_with_the_last_token(llm: LLM, prompt: list[int]) -> None:
    bias = {"logit_bias": {77: 1e4}, "max_tokens": 3}
    word = llm.processor.decode([77])
    assert complete(llm, prompt, **bias, stop=[word * 3, word * 3]).finish_reason == "stop"  # and said twice
    ended = complete(llm, prompt, **bias, stop_token_ids=[77], min_tokens=2)
    assert (len(ended.token_ids), ended.finish_reason, ended.stop_reason) == (3, "stop", 77)
    assert complete(llm, prompt, **bias, stop=word * 4).finish_reason == "length"


def test_lengths_beyond_the_context(llm: LLM, prompt: list[int]) -> None:
    room = llm.config.text.max_position_embeddings - len(prompt)
    for params in ({"max_tokens": 10**30}, {"max_tokens": None}, {"max_tokens": None, "min_tokens": 10**9}):
        output = complete(llm, prompt, **params)
        assert (len(output.token_ids), output.finish_reason) == (room, "length")


def test_no_top_logprobs_are_the_sampled_ones_alone(llm: LLM, prompt: list[int]) -> None:
    output = complete(llm, prompt, logprobs=0, seed=1)
    assert output.top_logprobs is None and len(output.logprobs) == len(output.token_ids)
    assert output.cumulative_logprob == sum(output.logprobs)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {9999: 1.0}}, "logit_bias has token 9999, outside the vocabulary of 320"),
        ({"stop_token_ids": [40, 320], "min_tokens": 2}, "stop_token_ids has token 320, outside"),
        ({"stop_token_ids": [-1]}, "stop_token_ids has token -1, outside"),
        ({"stop_token_ids": range(320), "min_tokens": 1}, "nothing is left to sample"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_named(llm: LLM, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        complete(llm, [10, 11], **params)
    assert llm.stats()["sequences_open"] == 0


def test_the_ends_of_what_is_allowed_can_be_sampled(llm: LLM, prompt: list[int]) -> None:
    greedy = complete(llm, prompt, temperature=0).token_ids
    assert complete(llm, prompt, temperature=1e-8).token_ids == greedy
    free = complete(llm, prompt, seed=3).token_ids
    assert (
        complete(llm, prompt, seed=3, top_k=-1).token_ids == complete(llm, prompt, seed=3, top_k=320).token_ids == free
    )
    flat = complete(llm, prompt, temperature=1e10, seed=3)
    assert flat.entropies == pytest.approx([math.log(320)] * 12, abs=1e-5)
    for seed in (-(2**63), 2**63, 2**64 - 1, 2**70 + 5):  # 64 bits count
        assert complete(llm, prompt, seed=seed).token_ids == complete(llm, prompt, seed=seed % 2**64).token_ids
    extreme = {"repetition_penalty": 1e-8, "frequency_penalty": 1e10, "presence_penalty": -1e10}
    biased = complete(llm, prompt, temperature=1e-8, logit_bias={77: 1e10, 78: -1e10}, **extreme)
    assert biased.token_ids[0] == 77 and 78 not in biased.token_ids
    assert (
        complete(llm, prompt, bad_words="\n", seed=3).token_ids
        == complete(llm, prompt, bad_words=["\n"], seed=3).token_ids
    )


def test_an_end_of_sequence_that_the_model_cannot_say(text_checkpoint: Path, tmp_path: Path) -> None:
    """Its vocabulary may be smaller than the tokenizer's: such an id ends nothing, and `min_tokens` passes it over."""
    path = shutil.copytree(text_checkpoint, tmp_path / "cut")
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 320]}')
    llm = LLM(path, kv_cache_bytes=1 << 20)
    output = complete(llm, [10, 11], min_tokens=3, max_tokens=5, ignore_eos=False, logit_bias={1: 1e4})
    assert len(output.token_ids) == 4 and output.stop_reason == 1
