"""Rollout tokens per second against transformers' `generate`, and where a training step's time goes.

    python bench/rollout.py [--questions 32] [--rollouts 8] [--repeats 3] [--json FILE]

Both sides get the same weights, dtype, threads, prompts with images, sampling (temperature 1), stop rules, and sample
one turn for every rollout. Ours also returns log-prob and exact entropy of each token. transformers runs with each of
the given batch sizes and its best one counts. Warm-up runs are not timed; the median of the repeats is.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from axpo.conversation import Conversation
from axpo.metrics import table
from axpo.paths import model_directory
from axpo.tasks import get_task
from axpo.tools import get_tools
from engine import LLM, ImageInput, SamplingParams

Prompts = list[tuple[list[int], list[ImageInput]]]
PHASES = ("rollout", "resample", "train", "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[64, 256], help="transformers' batch sizes")
    parser.add_argument("--steps", type=int, default=4, help="training steps whose time is split; 0 leaves that out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    path = model_directory(args.model)
    llm = LLM(path, dtype=torch.float32, kv_cache_bytes=1 << 28)
    conversation = Conversation(llm.processor, get_tools(["image_zoom_in"]))
    prompts = make_prompts(llm, conversation, args.questions)
    rows = [{"system": "axpo engine", **measure(ours(llm, conversation, prompts, args), args.repeats)}]
    for batch in args.peer_batches:
        run = transformers_generate(path, conversation, prompts, args, batch)
        rows.append({"system": f"transformers generate, batch {batch}", **measure(run, args.repeats)})
    best = max(row["tokens_per_s"] for row in rows[1:])
    for row in rows:
        row["ratio"] = row["tokens_per_s"] / best
    shares = step_shares(args.model, args.steps) if args.steps else {}
    show(rows, shares, args)
    if args.json:
        versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "python": sys.version.split()[0]}
        args.json.write_text(json.dumps({"rows": rows, "step_shares": shares, "versions": versions}, indent=1))


def make_prompts(llm: LLM, conversation: Conversation, count: int) -> Prompts:
    task = get_task("mini")
    prompts = []
    for index in range(count):
        question = task.question("train", index)
        images = llm.image_inputs(question.images)
        prompts.append((conversation.prompt(question.messages, images), images))
    return prompts


def measure(run: Callable[[int], int], repeats: int) -> dict[str, float]:
    """Median tokens per second of `run(seed)`, which returns how many tokens it sampled."""
    run(0)
    rates, tokens = [], 0
    for seed in range(1, repeats + 1):
        start = time.perf_counter()
        tokens = run(seed)
        rates.append(tokens / (time.perf_counter() - start))
    return {"tokens": tokens, "tokens_per_s": statistics.median(rates)}


def ours(llm: LLM, conversation: Conversation, prompts: Prompts, args: argparse.Namespace) -> Callable[[int], int]:
    def run(seed: int) -> int:
        llm.runner.vision.clear()
        llm.reset_prefix_cache()
        params = [
            SamplingParams(
                n=args.rollouts,
                max_tokens=args.max_new_tokens,
                stop_token_ids=(conversation.end_of_turn,),
                seed=seed * len(prompts) + index,
            )
            for index in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": ids, "multi_modal_data": {"image": images}} for ids, images in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return sum(len(completion.token_ids) for output in outputs for completion in output.outputs)

    return run


def transformers_generate(
    path: Path, conversation: Conversation, prompts: Prompts, args: argparse.Namespace, batch: int
) -> Callable[[int], int]:
    """`generate(num_return_sequences=rollouts)` over `batch` sequences at a time, left-padded."""
    from transformers import Qwen3VLForConditionalGeneration

    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    image_token = model.config.image_token_id
    pad = conversation.processor.tokenizer.pad_token_id
    end = [conversation.end_of_turn]
    banned = [
        image_token,
        model.config.video_token_id,
        model.config.vision_start_token_id,
        model.config.vision_end_token_id,
    ]
    at_once = max(1, batch // args.rollouts)

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        sampled = 0
        for start in range(0, len(prompts), at_once):
            chunk = prompts[start : start + at_once]
            longest = max(len(ids) for ids, _ in chunk)
            ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids, _ in chunk])
            mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in chunk])
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=torch.cat([image.pixel_values for _, images in chunk for image in images]),
                image_grid_thw=torch.tensor([image.grid_thw for _, images in chunk for image in images]),
                mm_token_type_ids=(ids == image_token).int(),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=args.max_new_tokens,
                num_return_sequences=args.rollouts,
                suppress_tokens=banned,
                eos_token_id=end,
                pad_token_id=pad,
            )[:, longest:]
            ended = (out == end[0]).int()
            sampled += int((ended.cumsum(1) - ended == 0).sum())
        return sampled

    return run


def step_shares(model: str, steps: int) -> dict[str, float]:
    """Mean share of each phase in the steps of a short real run, the first left out."""
    with tempfile.TemporaryDirectory() as directory:
        options = {"run.dir": directory, "run.steps": steps + 1, "model.path": model, "eval.questions": 0}
        options |= {"log.tensorboard": "false", "log.console": "false", "log.trees_in_report": 0}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "axpo.train", *arguments], check=True)
        (metrics,) = Path(directory).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()][1:]
    total = sum(row["perf/step_s"] for row in rows)
    shares = {phase: sum(row[f"perf/{phase}_s"] for row in rows) / total for phase in PHASES}
    return {**shares, "everything else": 1 - sum(shares.values()), "seconds_per_step": total / len(rows)}


def show(rows: list[dict], shares: dict[str, float], args: argparse.Namespace) -> None:
    console = Console()
    title = f"{args.questions} questions x {args.rollouts} rollouts, one turn, {torch.get_num_threads()} threads"
    cells = [[row["system"], str(row["tokens"]), f"{row['tokens_per_s']:.0f}", f"{row['ratio']:.1f}x"] for row in rows]
    console.print(table(title, ["system", "tokens", "tokens/s", "to best transformers"], cells))
    if shares:
        seconds = shares["seconds_per_step"]
        cells = [[name, f"{share:.1%}"] for name, share in shares.items() if name != "seconds_per_step"]
        console.print(table(f"a training step of recipe mini ({seconds:.1f} s)", ["phase", "share"], cells))


if __name__ == "__main__":
    main()
