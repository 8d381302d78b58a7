"""The fork benchmark's workload in vLLM: a program of its own, run by vLLM's interpreter, as versions may not mix.

    python vllm_worker.py JOB.json RESULT.json

Imports nothing of this repository. The first token's time is that of the same call asked for one token; the rest of the
time of the full call is decoding. vLLM's prefix cache holds the prefix by then, so a fork is a hit on its whole blocks.
"""

import importlib
import json
import sys
import time
from pathlib import Path


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch, vllm = (importlib.import_module(name) for name in ("torch", "vllm"))

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    llm = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=job["eager"],
        max_model_len=job["longest"] + 16,
        max_num_seqs=max(job["forks"], 16),
        enable_prefix_caching=True,
        seed=0,
    )

    def run(prompts: list[list[int]], count: int, n: int = 1) -> tuple[float, list[list[int]], float]:
        """(seconds, tokens of every branch, prompt tokens that were found in the cache, mean over prompts)."""
        if not job["temperature"]:
            prompts, n = prompts * n, 1  # vLLM refuses n > 1 where sampling is greedy; it makes n requests of it itself
        params = vllm.SamplingParams(
            n=n, temperature=job["temperature"], max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        answers = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        took = time.perf_counter() - start
        cached = sum(answer.num_cached_tokens or 0 for answer in answers) / len(answers)
        return took, [list(o.token_ids) for answer in answers for o in answer.outputs], cached

    warm = [token + 1 for token in range(min(64, len(job["prefix"])))]
    run([warm], 4, job["forks"])
    result: dict = {"vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    cpu = time.process_time()
    result["prefill_s"] = run([job["prefix"]], 1)[0]

    def branches(prompts: list[list[int]], count: int, n: int) -> dict:
        first, _, cached = run(prompts, 1, n)
        took, outputs, _ = run(prompts, count, n)
        return {"first_token_s": first, "total_s": took, "outputs": outputs, "cached": cached}

    result["end"] = branches([job["prefix"]], job["new_tokens"], job["forks"])
    said = job["continuation"] or result["end"]["outputs"][0]
    kept = job["prefix"] + said[: job["inside_at"] - len(job["prefix"])]
    inside = [[*kept, token] for token in job["own_tokens"]]
    result["inside"] = branches(inside, job["inside_tokens"], 1)
    result["cpu_s"] = time.process_time() - cpu
    config = getattr(getattr(llm.llm_engine, "vllm_config", None), "cache_config", None)
    result["block_size"] = getattr(config, "block_size", None)
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
