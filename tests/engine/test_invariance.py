"""Nothing that happens beside a sequence changes it: bit for bit, in fp32 and bf16."""

import random
from pathlib import Path

import pytest
import torch

from engine import LLM, CompletionOutput, SamplingParams
from kernels._library import LOADED

pytestmark = pytest.mark.skipif(not LOADED, reason="torch's own matrix product depends on the batch")


def said(outputs: list[CompletionOutput]) -> list[tuple[list[int], list[float], list[float]]]:
    return [(list(output.token_ids), list(output.logprobs), list(output.entropies)) for output in outputs]


def run(llm: LLM, prompts: list[list[int]], params: list[SamplingParams], together: bool) -> list:
    llm.reset_prefix_cache()
    if together:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return said([output.outputs[0] for output in outputs])
    alone = []
    for prompt, one in zip(prompts, params, strict=True):
        llm.reset_prefix_cache()
        alone += said(llm.generate([prompt], [one], use_tqdm=False)[0].outputs)
    return alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharing_batch_chunks_and_neighbours_change_nothing(dtype: torch.dtype, vl_checkpoint: Path) -> None:
    """Sharing on, off, batch one; any chunk of a prefill; neighbours with top-p or penalties, which need the logits."""
    seed = random.randrange(2**31)
    print(f"seed = {seed}")
    rng = random.Random(seed)
    root = [rng.randrange(7, 260) for _ in range(rng.randint(20, 40))]
    prompts = [root + [rng.randrange(7, 260) for _ in range(rng.randint(0, 9))] for _ in range(12)]
    params = [
        SamplingParams(
            max_tokens=rng.randint(4, 12),
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 1.0, 0.8]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
            seed=index,
            ignore_eos=True,
        )
        for index in range(len(prompts))
    ]
    sizes = {"dtype": dtype, "kv_cache_bytes": 1 << 22, "block_size": 8}
    alone = run(LLM(vl_checkpoint, share_prefixes=False, **sizes), prompts, params, together=False)
    for share in (True, False):
        for chunk in (rng.randint(5, 25), 4096):
            llm = LLM(vl_checkpoint, share_prefixes=share, max_batch_tokens=max(chunk, len(prompts)), **sizes)
            assert run(llm, prompts, params, together=True) == alone, f"sharing {share}, chunk {chunk}"
    plain = [index for index, one in enumerate(params) if one.top_p == 1 and one.repetition_penalty == 1]
    some = run(llm, [prompts[i] for i in plain], [params[i] for i in plain], together=True)
    assert some == [alone[i] for i in plain], "without neighbours that need the logits"
