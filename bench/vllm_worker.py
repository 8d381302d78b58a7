"""The fork benchmark's workload in vLLM: a program of its own, run by vLLM's interpreter, as versions may not mix.

    python vllm_worker.py JOB.json RESULT.json

Imports nothing of this repository. vLLM's prefix cache holds the prefix when the branches begin, so a fork is a hit on
its whole blocks.
"""

import importlib
import itertools
import json
import sys
import time
from pathlib import Path


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch, vllm = (importlib.import_module(name) for name in ("torch", "vllm"))

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    # Beside what the benchmark itself still holds on the GPU.
    memory = {"gpu_memory_utilization": 0.8} if torch.cuda.is_available() else {}
    llm = vllm.LLM(
        model=job["model"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=job["eager"],
        max_model_len=job["longest"] + 16,
        max_num_seqs=max(job["forks"], 16),
        enable_prefix_caching=True,
        seed=0,
        **memory,
    )

    engine, numbers = llm.llm_engine, itertools.count()

    def run(prompts: list[list[int]], count: int, n: int = 1) -> dict:
        """Seconds until every branch had a token and from then on, tokens in the latter, all tokens, and how many of
        a prompt's tokens were found in the cache."""
        if not job["temperature"]:
            prompts, n = prompts * n, 1  # vLLM refuses n > 1 where sampling is greedy; it makes n requests of it itself
        params = vllm.SamplingParams(
            n=n, temperature=job["temperature"], max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False
        )
        said: dict[tuple[str, int], list[int]] = {}
        first, before, cached = None, 0, 0
        names = [str(next(numbers)) for _ in prompts]
        start = now = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params.clone())
        while engine.has_unfinished_requests():
            for answer in engine.step():
                cached = max(cached, answer.num_cached_tokens or 0)
                said |= {(answer.request_id, output.index): list(output.token_ids) for output in answer.outputs}
            now = time.perf_counter()
            if first is None and len(said) == len(prompts) * n:
                first, before = now, sum(map(len, said.values()))
        outputs = [said[name, index] for name in names for index in range(n)]
        assert first is not None, "vLLM ended without a token of every branch"
        decoded = sum(map(len, outputs)) - before
        times = {"first_token_s": first - start, "decode_s": now - first}
        return {**times, "decode_tokens": decoded, "outputs": outputs, "cached": cached}

    warm = [token + 1 for token in range(min(64, len(job["prefix"])))]
    run([warm], 4, job["forks"])
    result: dict = {"vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    cpu = time.process_time()
    result["prefill_s"] = run([job["prefix"]], 1)["first_token_s"]
    result["end"] = run([job["prefix"]], job["new_tokens"], job["forks"])
    said = job["continuation"] or result["end"]["outputs"][0]
    kept = job["prefix"] + said[: job["inside_at"] - len(job["prefix"])]
    inside = [[*kept, token] for token in job["own_tokens"]]
    result["inside"] = run(inside, job["inside_tokens"])
    result["cpu_s"] = time.process_time() - cpu
    config = getattr(getattr(llm.llm_engine, "vllm_config", None), "cache_config", None)
    result["block_size"] = getattr(config, "block_size", None)
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
