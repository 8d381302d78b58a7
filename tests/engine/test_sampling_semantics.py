"""What is sampled against transformers' processors and vLLM's rules: distributions, ends of runs, stop strings, n."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf

from engine import LLM, SamplingParams
from engine.stopping import met_stop_string, text_of

DRAWS = 1000
EOS = 1


@pytest.fixture(scope="module")
def llm(text_checkpoint: Path) -> LLM:
    return LLM(text_checkpoint, kv_cache_bytes=1 << 22)


def reference(params: SamplingParams, prompt: int, likely: list[int]) -> LogitsProcessorList:
    """transformers' processors in vLLM's order: bias, repetition, bad words, least length, then the truncations."""
    chosen: list = []
    if params.logit_bias:
        chosen.append(hf.SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias.items()}))
    if params.repetition_penalty != 1:
        chosen.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.bad_words:
        chosen.append(hf.NoBadWordsLogitsProcessor([likely], eos_token_id=torch.tensor([EOS])))
    if params.min_tokens:
        stop = torch.tensor([EOS, *params.stop_token_ids])
        chosen.append(hf.MinNewTokensLengthLogitsProcessor(prompt, params.min_tokens, stop))  # type: ignore[arg-type]
    chosen.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.min_p:
        chosen.append(hf.MinPLogitsWarper(params.min_p))
    if params.top_k:
        chosen.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chosen.append(hf.TopPLogitsWarper(params.top_p))
    return LogitsProcessorList(chosen)


def p_value(observed: Counter[int], expected: Tensor) -> float:
    """Of Pearson's chi-square; cells that expect fewer than five draws are one cell."""
    counts = torch.zeros(len(expected), dtype=torch.float64)
    for token, count in observed.items():
        counts[token] = count
    expected = expected.double() * counts.sum()
    large = expected >= 5
    cells = [(counts[large], expected[large])]
    if expected[~large].sum() > 0:
        cells.append((counts[~large].sum()[None], expected[~large].sum()[None]))
    seen, wanted = (torch.cat(column) for column in zip(*cells, strict=True))
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), statistic / 2).item()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 1.5, "top_k": 12},
        {"temperature": 0.8, "top_p": 0.8},
        {"temperature": 1.4, "min_p": 0.01, "top_k": 30, "top_p": 0.9},
        {"repetition_penalty": 1.7, "logit_bias": {20: 3.0, 21: -4.0, EOS: 5.0}},
        {"bad_words": ["likely"], "min_p": 0.02},
        {"min_tokens": 1, "stop_token_ids": ["likely"]},
    ],
    ids=lambda given: "+".join(given) or "plain",
)
def test_frequencies_and_logprobs_are_those_of_the_processed_distribution(llm: LLM, given: dict) -> None:
    rng = random.Random(str(given))  # fixed: the test is deterministic
    prompt = [rng.randrange(7, 260) for _ in range(12)]
    with llm.open(prompt) as root:
        llm.prefill([root])
        assert root.last_hidden is not None
        logits = llm.model.logits(root.last_hidden[None]).clone()
        likely = int(logits[0, 33:200].argmax()) + 33  # a token that is one visible character
        likely = {"bad_words": [llm.processor.decode([likely])], "stop_token_ids": [likely]}
        params = SamplingParams(
            max_tokens=1,
            processed_logprobs=True,
            detokenize=False,
            **{name: likely.get(name, value) for name, value in given.items()},
        )
        expected = reference(params, len(prompt), likely["stop_token_ids"])(torch.tensor([prompt]), logits)
        expected = expected.log_softmax(-1)[0]
        branches = root.fork(DRAWS)
        outputs = llm.run(branches, [replace(params, seed=rng.getrandbits(62)) for _ in branches])
        for branch in branches:
            branch.close()
    raw = (logits[0] / params.temperature).log_softmax(-1)
    for output in outputs:
        assert output.processed_logprobs is not None
        (token,), (logprob,), (processed,) = output.token_ids, output.logprobs, output.processed_logprobs
        assert abs(processed - expected[token].item()) < 1e-4
        assert abs(logprob - raw[token].item()) < 1e-4
    observed = Counter(output.token_ids[0] for output in outputs)
    assert p_value(observed, expected.exp()) > 1e-3
    if given:
        assert p_value(observed, raw.exp()) < 1e-6, "the test could not tell them apart"


def test_ends_of_runs(llm: LLM) -> None:
    """vLLM's rules for end-of-sequence, stop tokens and the two lengths."""

    def end(**given):
        output = llm.generate([[10, 11, 12]], SamplingParams(max_tokens=5, **given), use_tqdm=False)[0].outputs[0]
        return output.token_ids, output.finish_reason, output.stop_reason

    always = {"logit_bias": {EOS: 1e4}}
    assert end(**always) == ([EOS], "stop", EOS)
    assert end(**always, ignore_eos=True) == ([EOS] * 5, "length", None)
    assert end(**always, ignore_eos=True, stop_token_ids=[EOS]) == ([EOS], "stop", EOS)
    assert end(logit_bias={30: 1e4}, stop_token_ids=[29, 30]) == ([30], "stop", 30)
    tokens, reason, cause = end(**always, min_tokens=3)
    assert (len(tokens), tokens[-1], reason, cause) == (4, EOS, "stop", EOS) and EOS not in tokens[:-1]
    assert end(**always, min_tokens=5)[1:] == ("length", None)
    room = llm.config.text.max_position_embeddings
    output = llm.generate([[10] * (room - 2)], SamplingParams(max_tokens=9, ignore_eos=True), use_tqdm=False)[0]
    assert len(output.outputs[0].token_ids) == 2 and output.outputs[0].finish_reason == "length"


def test_n_continuations_do_not_depend_on_n(llm: LLM) -> None:
    def continuations(n: int, seed: int) -> list[list[int]]:
        params = SamplingParams(n=n, seed=seed, max_tokens=8, ignore_eos=True)
        outputs = llm.generate([[10, 11, 12]], params, use_tqdm=False)[0].outputs
        assert [output.index for output in outputs] == list(range(n))
        return [output.token_ids for output in outputs]

    four = continuations(4, seed=5)
    assert four[:3] == continuations(3, seed=5) and four == continuations(4, seed=5)
    assert len({tuple(tokens) for tokens in four}) == 4
    assert not {tuple(tokens) for tokens in four} & {tuple(tokens) for tokens in continuations(4, seed=6)}


PIECES = ["a", "b", "c", "ab", "abab", "ca", "", "日", "本", "é"]  # "": a special token


def test_stop_strings_end_where_vllm_ends_them() -> None:
    """Pieces of several characters, or none: a run ends with the first token that completes a stop string behind the
    first `min_tokens`, and the text before (or with) the first such occurrence."""
    rng = random.Random(7)
    ends = 0

    def decode(ids, _skip_special_tokens):
        return "".join(PIECES[i] for i in ids)

    for _ in range(3000):
        tokens = [rng.randrange(len(PIECES)) for _ in range(rng.randint(1, 14))]
        stops = ["".join(rng.choice("aabc日é") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        keep, least = rng.random() < 0.5, rng.choice([0, 0, 3, 6])
        params = SamplingParams(stop=stops, min_tokens=least, max_tokens=20, include_stop_str_in_output=keep)
        expected = None
        for count in range(least + 1, len(tokens) + 1):
            text, before = decode(tokens[:count], True), decode(tokens[: count - 1], True)
            new = [(s, at) for s in stops for at in range(len(text)) if text.startswith(s, at)]
            new = [(s, at) for s, at in new if at + len(s) > len(before)]
            if new:
                stop = next(s for s in stops if s in dict(new))
                at = min(at for s, at in new if s == stop)
                expected = (count, stop, text[: at + len(stop)] if keep else text[:at])
                break
        prompt = [rng.randrange(len(PIECES)) for _ in range(3)]  # its text does not count
        actual = None
        for count in range(1, len(tokens) + 1):
            stop = met_stop_string(decode, prompt + tokens[:count], len(prompt), params)
            if stop is not None:
                actual = (count, stop, text_of(decode, tokens[:count], params, stop))
                break
        assert actual == expected, (tokens, params)
        ends += expected is not None
    assert 500 < ends < 2900


def test_a_stop_string_of_many_bytes_split_over_tokens(llm: LLM) -> None:
    """One byte a token: halves of characters are neither found nor in the way."""
    decode = llm.processor.decode
    tokens = llm.processor.encode_text("naïve 日本語 ende")
    params = SamplingParams(stop="本語", max_tokens=50)
    found = [met_stop_string(decode, tokens[:count], 0, params) for count in range(1, len(tokens) + 1)]
    end = len("naïve 日本語".encode())
    assert found.index("本語") + 1 == end
    assert text_of(decode, tokens[:end], params, "本語") == "naïve 日"
