"""A whole training step on packed trees, against the same trajectories packed side by side without sharing.

    python bench/packed_training.py

Both go through the same learner (forward, backward, clipping, AdamW, metrics) in the same run, under the same token
budget of a micro-batch; only the trees differ. The workload: a prompt of 2,048 tokens with an image in it, 8 rollouts
of 512, and a quarter as many continuations, forked half way from one rollout that failed with its tool. The losses
must agree, or the exit status is 1. Rounds are interleaved, so that a change in the machine's load meets both; figures
are the best round. The model is a Qwen3-VL of random weights: `--shape small` for a CPU, `--shape 2b` for a GPU.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from axpo.advantage import assign_credit
from axpo.config import Loss, Optim, Train
from axpo.distributed import finish, initialise
from axpo.learner import Learner
from axpo.packing import pack_trees
from axpo.trajectory import OBSERVATION, PROMPT, SAMPLED, ToolCall, Trajectory
from axpo.tree import PackedBatch, build_trees
from bench.command import add_json, add_rounds, clock, head, row, settings, write_json
from engine.images import ImageInput
from engine.models import ModelConfig
from engine.positions import place_image, positions

SPECIAL = 8  # of the vocabulary, from its end: no text has them
TEXT = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512},
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 8192},
    "2b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "vocab_size": 151_936},
}
HEADS = {"tiny": (4, 2, 16), "small": (8, 4, 64), "2b": (16, 8, 128)}
VISION = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "depth": 2, "num_heads": 2, "deepstack": [0]},
    "small": {"hidden_size": 256, "intermediate_size": 1024, "depth": 4, "num_heads": 4, "deepstack": [1]},
    "2b": {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16, "deepstack": [5, 11, 17]},
}


@dataclass(frozen=True, slots=True)
class Row:
    """tokens: computed in a step; tflops: of training on them, without what is computed again; step_s: the best."""

    system: str
    tokens: int
    micro_batches: int
    tflops: float
    step_s: float
    median_s: float


def write_config(path: Path, shape: str) -> None:
    text, vision = TEXT[shape], dict(VISION[shape])
    heads, kv_heads, head_dim = HEADS[shape]
    first = text["vocab_size"] - SPECIAL
    time_axis = head_dim // 2 - 2 * (head_dim // 6)
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [time_axis, head_dim // 6, head_dim // 6]}
    config = {
        "model_type": "qwen3_vl",
        "text_config": text
        | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
        | {"max_position_embeddings": 1 << 17, "rope_parameters": rope},
        "vision_config": {
            **{key: value for key, value in vision.items() if key != "deepstack"},
            "deepstack_visual_indexes": vision["deepstack"],
            "patch_size": 16,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 2304,
        },
        "image_token_id": first,
        "vision_start_token_id": first + 1,
        "vision_end_token_id": first + 2,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(config))


def question(args: argparse.Namespace, config: ModelConfig, rng: np.random.Generator, group: int) -> list[Trajectory]:
    """Rollouts of one question, and behind them the continuations of its first."""
    assert config.vision is not None and config.image_token_id is not None
    merge = config.vision.spatial_merge_size
    side = merge * round(args.image_tokens**0.5)
    patches = torch.from_numpy(rng.standard_normal((side * side, config.vision.patch_dim), dtype=np.float32))
    image = ImageInput(patches, (1, side, side), side * side // merge**2, b"")
    span = place_image([], 4, image.grid_thw, merge)

    def text(length: int) -> list[int]:
        return rng.integers(config.text.vocab_size - SPECIAL, size=length).tolist()

    picture = [config.image_token_id] * image.num_tokens
    prompt = [*text(4), *picture, *text(args.prompt - image.num_tokens - 4)]
    fork = args.response // 2
    call = ToolCall("image_zoom_in", {}, False, None, 0, args.prompt + fork - 1, args.prompt + fork + 32)

    def trajectory(name: str, response: list[int], reward: float, parent: str | None) -> Trajectory:
        tokens = prompt + response
        sampled = [PROMPT] * len(prompt) + [SAMPLED] * len(response)
        sampled[len(prompt) + fork + 32 : len(prompt) + fork + 64] = [OBSERVATION] * 32
        guess = -float(np.log(config.text.vocab_size))
        return Trajectory(
            step=1,
            question_id=f"q{group}",
            group=group,
            id=name,
            parent=parent,
            fork_token=None if parent is None else len(prompt) + fork,
            prompt_len=len(prompt),
            tokens=tokens,
            roles=sampled,
            loss_mask=[0] * len(tokens),
            logprobs=[guess if role == SAMPLED else None for role in sampled],
            entropies=[1.0 if role == SAMPLED else None for role in sampled],
            advantages=[0.0] * len(tokens),
            reward=reward,
            status="answered",
            tool_calls=[call] if parent or name.endswith(".0") else [],
            confidence=None,
            text="",
            images=[image],
            positions=positions([span], 0, len(tokens)),
        )

    rollouts = [trajectory(f"{group}.{i}", text(args.response), float(i % 2), None) for i in range(args.rollouts)]
    kept = rollouts[0].tokens[len(prompt) : len(prompt) + fork]
    children = [
        trajectory(f"{group}.0/{i}", kept + text(args.response - fork), float(i % 2), rollouts[0].id)
        for i in range(args.resamples)
    ]
    return rollouts + children


def workloads(args: argparse.Namespace, config: ModelConfig) -> dict[str, list[PackedBatch]]:
    rng = np.random.default_rng(0)
    questions = [question(args, config, rng, group) for group in range(args.questions)]
    groups = [[t for t in some if t.parent is None] for some in questions]
    resamples = {some[0].id: [t for t in some if t.parent] for some in questions if args.resamples}
    assign_credit(groups, resamples)
    # A path as a sequence of its own; what is trained of it stays.
    paths = [replace(t, parent=None, fork_token=None, loss_mask=list(t.loss_mask)) for some in questions for t in some]
    image = config.image_token_id
    return {
        "packed trees": [tree for group in groups for tree in build_trees(group, resamples, image)],
        "unshared": [tree for path in paths for tree in build_trees([path], {}, image)],
    }


def measure(args: argparse.Namespace, learner: Learner) -> tuple[list[Row], dict[str, float]]:
    trees = workloads(args, learner.config)
    now = clock(args)
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    losses, rows = {}, {}
    for turn in range(args.rounds + 1):  # the first warms up
        for name, some in trees.items():
            start = now()
            rows[name] = pack_trees(some, args.budget, learner.flops)
            losses[name] = learner.step(rows[name])["policy/loss"]
            took = now() - start
            if turn:
                seconds[name].append(took)
            print(f"round {turn}: {name}: {took:.2f} s", file=sys.stderr)
    table = [
        Row(
            name,
            sum(batch.num_tokens for batch in rows[name]),
            len(rows[name]),
            sum(learner.flops(batch) for batch in rows[name]) / 1e12,
            min(seconds[name]),
            float(np.median(seconds[name])),
        )
        for name in trees
    ]
    return table, losses


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=tuple(TEXT))
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--resamples", type=int, default=2, help="continuations of the first rollout, from its middle")
    parser.add_argument("--prompt", type=int, default=2048, help="shared tokens, with the image's")
    parser.add_argument("--image-tokens", type=int, default=256, help="a square number")
    parser.add_argument("--response", type=int, default=512, help="own tokens of a rollout")
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a micro-batch")
    parser.add_argument("--checkpointing", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    add_rounds(parser, 3)
    add_json(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    initialise(device)
    with tempfile.TemporaryDirectory() as directory:
        write_config(Path(directory), args.shape)
        learner = Learner(
            directory,
            dtype=getattr(torch, args.dtype),
            device=device,
            # So small a rate that both see the same weights throughout.
            optim=Optim(lr=1e-12),
            total_steps=10**6,
            loss=Loss(kl_coef=0.0),
            scratch_seed=0,
            train=Train(activation_checkpointing=args.checkpointing),
        )
        rows, losses = measure(args, learner)

    tree, unshared = rows
    ratios = {
        "speedup": unshared.step_s / tree.step_s,
        "speedup_median": unshared.median_s / tree.median_s,
        "ratio_of_tokens": unshared.tokens / tree.tokens,
        "ratio_of_operations": unshared.tflops / tree.tflops,
    }
    write_json(args.json, {"rows": [asdict(r) for r in rows], **ratios, "settings": settings(args)})
    print(head(["system", "tokens", "micro-batches", "TFLOP", "step s, best", "median", "GFLOP/s"]))
    for r in rows:
        figures = f"{r.tflops:.2f}", f"{r.step_s:.2f}", f"{r.median_s:.2f}", f"{1e3 * r.tflops / r.step_s:.0f}"
        print(row([r.system, r.tokens, r.micro_batches, *figures]))
    print(
        f"\npacked trees: {ratios['speedup']:.2f} times as fast (medians {ratios['speedup_median']:.2f}), with "
        f"1/{ratios['ratio_of_tokens']:.2f} of the tokens and 1/{ratios['ratio_of_operations']:.2f} of the operations"
    )
    tolerance = 1e-4 if args.dtype == "float32" else 0.05
    agree = abs(losses["unshared"] - losses["packed trees"]) <= tolerance * abs(losses["packed trees"])
    print(f"losses: {losses['packed trees']:.6f} and {losses['unshared']:.6f}", "" if agree else "DIFFER")
    return 0 if agree else 1


if __name__ == "__main__":
    status = main()
    finish()
    sys.exit(status)
