"""Whole training steps (rollout, reference, update) against TRL's GRPOTrainer, on the mini model and two CPU cores.

    python bench/trl_step.py --setup-peers                     # once: build/peers/trl
    python bench/trl_step.py [--questions 64] [--group-size 8] [--steps 4] [--peer-batches 64,128] [--json FILE]

Equal on both sides: checkpoint, fp32, threads, questions with images in their order, prompts token for token (checked),
group size, sampling at temperature 1 up to --max-new-tokens or the end of the turn, banned tokens, reward, advantages
normalised by group, clip range, KL to a fixed reference, mean over all tokens, AdamW, learning rate, gradient norm, one
update a step. Not equal: the sampled tokens, which each draws itself; ours also records trajectories, exact entropies
and metrics. One turn without a tool, since TRL's own loop for tools was not tried here. TRL runs with each of the given
batch sizes and its best one counts. The first step of either is a warm-up; the median of the others is taken.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from axpo.cli import read_recipe
from axpo.metrics import table
from axpo.order import shuffled
from axpo.paths import model_directory
from axpo.tasks import get_task
from bench.command import add_json, write_json
from engine import Processor

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "build" / "peers" / "trl"
WORKER = Path(__file__).with_name("trl_worker.py")
PACKAGES = ("trl==1.16.0", "transformers==5.23.0", "pillow>=11")
RECIPE = "mini-grpo"
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup-peers", action="store_true", help="make TRL's environment and exit")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--peer-batches", default="64,128", help="rollouts of one forward and backward pass in TRL")
    add_json(parser)
    args = parser.parse_args()
    if args.setup_peers:
        set_up()
        return
    with tempfile.TemporaryDirectory() as directory:
        rows = [ours(args, Path(directory))]
        for batch in map(int, args.peer_batches.split(",")):
            rows.append(trl(args, batch, Path(directory)))
    best = min(row["step_s"] for row in rows[1:])
    least = min(row["cpu_s"] for row in rows[1:])
    for row in rows:
        row["ratio"], row["cpu_ratio"] = best / row["step_s"], least / row["cpu_s"]
    title = f"{args.questions} questions x {args.group_size} rollouts, {torch.get_num_threads()} threads"
    cells = [
        [
            row["system"],
            f"{row['step_s']:.1f}",
            f"{row['ratio']:.1f}x",
            f"{row['cpu_s']:.1f}",
            f"{row['cpu_ratio']:.1f}x",
            f"{row['sampled']:.1f}",
            f"{row['reward']:.2f}",
        ]
        for row in rows
    ]
    columns = ["system", "s/step", "to best TRL", "CPU s/step", "to best TRL", "tokens a rollout", "reward"]
    Console(width=110).print(table(title, columns, cells))
    write_json(args.json, {"rows": rows, "threads": torch.get_num_threads()})


def set_up() -> None:
    """torch first and alone, or TRL's requirements choose another build. TORCH: what pip is told for it."""
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    pip = [str(_interpreter()), "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-compile"]
    subprocess.run([*pip, *os.environ.get("TORCH", "torch==2.13.0").split()], check=True)
    subprocess.run([*pip, *PACKAGES], check=True)


def ours(args: argparse.Namespace, directory: Path) -> dict:
    """The trainer's own program, recipe mini-grpo with one turn and no tools."""
    options = {"run.dir": str(directory), "run.name": "ours", "run.steps": args.steps, "run.seed": SEED}
    options |= {"rollout.questions_per_step": args.questions, "rollout.max_new_tokens": args.max_new_tokens}
    options |= {"algo.group_size": args.group_size, "rollout.max_turns": 1, "rollout.tools": "[]"}
    options |= {"eval.questions": 0, "checkpoint.every": 0, "log.tensorboard": "false", "log.console": "false"}
    options |= {"optim.warmup_steps": 0, "log.trees_in_report": 0}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "axpo.train", RECIPE, *arguments], check=True, cwd=ROOT, env=_environment())
    lines = (directory / "ours" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines][1:]
    return {
        "system": "axpo",
        "step_s": statistics.median(step["perf/step_s"] for step in steps),
        "cpu_s": statistics.median(step["perf/cpu_s"] for step in steps),
        "sampled": statistics.mean(step["length/sampled_tokens"] for step in steps),
        "reward": statistics.mean(step["reward/mean"] for step in steps),
        "phases": {n: statistics.median(s[f"perf/{n}_s"] for s in steps) for n in ("rollout", "train", "unaccounted")},
    }


def trl(args: argparse.Namespace, batch: int, directory: Path) -> dict:
    """Raises ValueError when its prompts are not ours, CalledProcessError when it fails."""
    if not _interpreter().is_file():
        raise SystemExit("TRL is not installed: python bench/trl_step.py --setup-peers makes its environment")
    if args.questions * args.group_size % batch:
        raise SystemExit(
            f"--peer-batches {batch}: {args.questions * args.group_size} rollouts are not a multiple of it"
        )
    questions = _questions(args, directory)
    recipe = read_recipe(RECIPE)
    job = {
        "model": str(model_directory("mini")),
        "directory": str(directory / "trl"),
        "threads": torch.get_num_threads(),
        "questions": questions,
        "questions_per_step": args.questions,
        "group_size": args.group_size,
        "max_new_tokens": args.max_new_tokens,
        "steps": args.steps,
        "batch": batch,
        "kl_coef": 1e-3,
        "lr": recipe["optim"]["lr"],
        "answers": str(ROOT / "axpo" / "grading" / "answer.py"),
    }
    job_file, result_file = directory / "job.json", directory / "result.json"
    job_file.write_text(json.dumps(job))
    # -P: or this folder, whose kernels.py is not Hugging Face's kernels, would be searched first.
    command = [str(_interpreter()), "-P", str(WORKER), str(job_file), str(result_file)]
    subprocess.run(command, check=True, cwd=directory, env=_environment() | {"HF_HUB_OFFLINE": "1"})
    result = json.loads(result_file.read_text())
    _check_prompt(result["prompt"])
    return {
        "system": f"TRL {result['versions']['trl']}, batch {batch}",
        "step_s": statistics.median(result["seconds"][1:]),
        "cpu_s": statistics.median(result["cpu"][1:]),
        "sampled": statistics.mean(result["sampled"][1:]),
        "reward": statistics.mean(result["reward"][1:]),
        "versions": result["versions"],
    }


def _questions(args: argparse.Namespace, directory: Path) -> list[dict]:
    """The questions of our steps in our order."""
    task, rows = get_task("mini"), []
    for position in range(args.steps * args.questions):
        question = task.question("train", shuffled(SEED, position, task.size("train")))
        file = directory / f"{position}.png"
        question.images[0].save(file)
        rows.append({"image": str(file), "question": _words(question.messages), "answer": question.answer})
    return rows


def _check_prompt(prompt: list[int]) -> None:
    processor, task = Processor.from_pretrained(model_directory("mini")), get_task("mini")
    question = task.question("train", shuffled(SEED, 0, task.size("train")))
    wanted = processor.encode(processor.render(question.messages), [processor.image(i) for i in question.images])
    if prompt != wanted:
        raise ValueError(f"TRL's prompt differs from ours: {prompt} and {wanted}")


def _words(messages: list[dict]) -> str:
    return next(part["text"] for part in messages[0]["content"] if part["type"] == "text")


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": ""}


def _interpreter() -> Path:
    return ENVIRONMENT / "bin" / "python"


if __name__ == "__main__":
    main()
