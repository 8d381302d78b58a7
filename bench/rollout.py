"""Rollout tokens per second against transformers' `generate`, and where a training step's time goes.

    python bench/rollout.py [--questions 32] [--rollouts 8] [--turns 3] [--repeats 3] [--json FILE]

Both sides roll the same questions out to the end: up to `--turns` turns with the real tool between them, with the same
weights, dtype, threads, prompts with images, sampling (temperature 1) and stop rules. Ours is the trainer's own agent
loop, which also returns the log-prob and exact entropy of each token, parses and grades. transformers gets what its
`generate` offers: `num_return_sequences` on the first turn, and on later turns the whole conversation of every rollout
that called a tool, longest together. It runs with each of the given batch sizes and its best one counts. Warm-up runs
are not timed; the median of the repeats is. One row is the floor: the matrix products of the same rollout and nothing
else, by torch, which is also the largest ratio that this machine allows.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from axpo.branch import Limits
from axpo.conversation import Conversation
from axpo.metrics import table
from axpo.paths import model_directory
from axpo.rollout import Agent
from axpo.tasks import Question, get_task
from axpo.tools import ToolResult, get_tools
from bench.command import add_json, write_json
from bench.rollout_floor import Products
from engine import LLM, ImageInput

MAX_TOKENS = 512  # of a trajectory, as in recipe mini
PHASES = ("rollout", "resample", "train", "weights")


@dataclass(slots=True)
class Dialogue:
    """A rollout on transformers' side: its tokens and images so far, and how many of the tokens were sampled."""

    tokens: list[int]
    inputs: list[ImageInput]
    images: list[Image.Image]
    sampled: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--turns", type=int, default=3, help="turns of a rollout; 1 leaves the tool out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[32, 64, 128], help="transformers' batch sizes")
    parser.add_argument("--steps", type=int, default=4, help="training steps whose time is split; 0 leaves that out")
    add_json(parser)
    args = parser.parse_args()

    path = model_directory(args.model)
    llm = LLM(path, dtype=torch.float32, kv_cache_bytes=1 << 28, enable_prefix_caching=False)  # as in training
    conversation = Conversation(llm.processor, get_tools(["image_zoom_in"]))
    task = get_task("mini")
    questions = [task.question("train", index) for index in range(args.questions)]
    limits = Limits(max_turns=args.turns, max_new_tokens=args.max_new_tokens, max_tokens=MAX_TOKENS)
    run = ours(llm, conversation, questions, limits, args.rollouts)
    rows = [{"system": "axpo", **measure(run, args.repeats)}, floor(llm, run, args.repeats)]
    for batch in args.peer_batches:
        run = transformers_generate(path, conversation, questions, limits, args.rollouts, batch)
        rows.append({"system": f"transformers generate, batch {batch}", **measure(run, args.repeats)})
    best = max(row["tokens_per_s"] for row in rows if row["system"].startswith("transformers"))
    for row in rows:
        row["ratio"] = row["tokens_per_s"] / best
    shares = step_shares(args.model, args.steps) if args.steps else {}
    show(rows, shares, args)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "python": sys.version.split()[0]}
    write_json(args.json, {"rows": rows, "step_shares": shares, "versions": versions})


def measure(run: Callable[[int], int], repeats: int) -> dict[str, float]:
    """Median tokens per second of `run(seed)`, which returns how many tokens it sampled."""
    run(0)
    rates, tokens = [], 0
    for seed in range(1, repeats + 1):
        start = time.perf_counter()
        tokens = run(seed)
        rates.append(tokens / (time.perf_counter() - start))
    return {"tokens": tokens, "tokens_per_s": statistics.median(rates)}


def floor(llm: LLM, run: Callable[[int], int], repeats: int) -> dict[str, Any]:
    """What the matrix products of the last timed run allow at most; the rest of a rollout comes on top."""
    counts: list[int] = []
    products = Products.of(llm, lambda: counts.append(run(repeats)))
    best = min(products.seconds(llm) for _ in range(repeats + 1))
    return {"system": "axpo's matrix products alone", "tokens": counts[0], "tokens_per_s": counts[0] / best}


def ours(
    llm: LLM, conversation: Conversation, questions: list[Question], limits: Limits, rollouts: int
) -> Callable[[int], int]:
    def run(seed: int) -> int:
        llm.runner.vision.clear()  # a training step meets every image for the first time
        agent = Agent(llm, conversation, seed)
        groups = agent.rollouts(1, list(enumerate(questions)), rollouts, limits)
        branches = [branch for group in groups for branch in group]
        agent.close(branches)
        return sum(branch.sampled for branch in branches)

    return run


def transformers_generate(
    path: Path, conversation: Conversation, questions: list[Question], limits: Limits, rollouts: int, batch: int
) -> Callable[[int], int]:
    """`generate` over `batch` sequences at a time, left-padded."""
    from transformers import Qwen3VLForConditionalGeneration

    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    config, processor = model.config, conversation.processor
    pad, end = processor.tokenizer.pad_token_id, conversation.end_of_turn
    banned = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]

    def generate(dialogues: list[Dialogue], copies: int) -> list[list[int]]:
        """`copies` continuations of each dialogue, in order, each through its end of turn."""
        longest = max(len(dialogue.tokens) for dialogue in dialogues)
        padding = [longest - len(dialogue.tokens) for dialogue in dialogues]
        ids = torch.tensor([[pad] * n + d.tokens for n, d in zip(padding, dialogues, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
        images = [image for dialogue in dialogues for image in dialogue.inputs]
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=torch.cat([image.pixel_values for image in images]),
            image_grid_thw=torch.tensor([image.grid_thw for image in images]),
            mm_token_type_ids=(ids == config.image_token_id).int(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=limits.max_new_tokens - min(dialogue.sampled for dialogue in dialogues),
            num_return_sequences=copies,
            suppress_tokens=banned,
            eos_token_id=[end],
            pad_token_id=pad,
        )[:, longest:].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in out]

    def observe(dialogue: Dialogue, turn: list[int]) -> bool:
        """Appends a turn and what its calls gave. False when the rollout has ended."""
        dialogue.tokens += turn
        dialogue.sampled += len(turn)
        calls = conversation.calls(turn)
        if turn[-1] != end or not calls:
            return False
        results = []
        for call in calls:
            if call.error is None and call.name is not None and call.arguments is not None:
                results.append(conversation.tools[call.name].call(call.arguments, dialogue.images))
            else:
                results.append(ToolResult.failure(call.error or "the tool call is malformed"))
            dialogue.images += results[-1].images
        inputs = [processor.image(image) for result in results for image in result.images]
        dialogue.inputs += inputs
        dialogue.tokens += conversation.observation(results, inputs)
        room = min(MAX_TOKENS - len(dialogue.tokens), limits.max_new_tokens - dialogue.sampled)
        return room > 0

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        live: list[Dialogue] = []
        sampled = 0
        for start in range(0, len(questions), max(1, batch // rollouts)):
            roots = []
            for question in questions[start : start + max(1, batch // rollouts)]:
                inputs = [processor.image(image) for image in question.images]
                roots.append(Dialogue(conversation.prompt(question.messages, inputs), inputs, question.images))
            turns = generate(roots, rollouts)
            for index, turn in enumerate(turns):
                root = roots[index // rollouts]
                dialogue = Dialogue(list(root.tokens), list(root.inputs), list(root.images))
                sampled += len(turn)
                if limits.max_turns > 1 and observe(dialogue, turn):
                    live.append(dialogue)
        for turn_number in range(1, limits.max_turns):
            live.sort(key=lambda dialogue: len(dialogue.tokens))
            going: list[Dialogue] = []
            for start in range(0, len(live), batch):
                dialogues = live[start : start + batch]
                for dialogue, turn in zip(dialogues, generate(dialogues, 1), strict=True):
                    sampled += len(turn)
                    if turn_number + 1 < limits.max_turns and observe(dialogue, turn):
                        going.append(dialogue)
            live = going
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
    title = (
        f"{args.questions} questions x {args.rollouts} rollouts, up to {args.turns} turns, "
        f"{torch.get_num_threads()} threads"
    )
    cells = [[row["system"], str(row["tokens"]), f"{row['tokens_per_s']:.0f}", f"{row['ratio']:.1f}x"] for row in rows]
    console.print(table(title, ["system", "tokens", "tokens/s", "to best transformers"], cells))
    if shares:
        seconds = shares["seconds_per_step"]
        cells = [[name, f"{share:.1%}"] for name, share in shares.items() if name != "seconds_per_step"]
        console.print(table(f"a training step of recipe mini ({seconds:.1f} s)", ["phase", "share"], cells))


if __name__ == "__main__":
    main()
