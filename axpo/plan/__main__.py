"""`python -m axpo.plan [recipe …] [--gpu h100] [--gpus 8] [--nodes 1] [--json] [--section.field value …]`

Exit status: 0 when the recipe fits, 1 when it does not, 2 for a mistake on the command line or in the recipe.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from axpo.cli import ConfigError, exit_with, read_recipe, recipe_names, resolve
from axpo.config import Config, SftConfig
from axpo.plan import make_plan
from axpo.plan.devices import NAMES, find_device
from axpo.plan.shapes import model_shape
from axpo.plan.show import show, to_json
from axpo.plan.workload import assumed, assumed_sft, measured, measured_phases

PROG = "axpo.plan"
LENGTHS = {"prompt": "prompt_tokens", "sampled": "sampled_tokens", "observed": "observed_tokens"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PROG}",
        description="Parameters, memory by kind, communication and seconds of a step, before anything is loaded.",
        usage="%(prog)s [recipe.toml or recipe name ...] [options] [--section.field value ...]",
        epilog=f"Recipes: {', '.join(recipe_names())}. Fields: those of axpo.train or axpo.sft (--help). "
        "Exit status: 0 it fits, 1 it does not, 2 a mistake.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(NAMES)} (default: h100)")
    parser.add_argument("--gpus", type=int, default=8, help="devices in all, one rank each (default: 8)")
    parser.add_argument("--nodes", type=int, help="machines (default: of eight devices)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--prompt-tokens", type=float, help="of a question, images included, in the mean")
    parser.add_argument("--sampled-tokens", type=float, help="of a rollout, in the mean")
    parser.add_argument("--observed-tokens", type=float, help="tool responses of a rollout, in the mean over all")
    parser.add_argument("--image-share", type=float, help="image tokens among prompts and tool responses")
    parser.add_argument("--from-run", type=Path, metavar="DIR", help="lengths of this run, and its seconds beside ours")
    options, rest = parser.parse_known_args(argv)
    recipes = [word for word in rest if word.endswith(".toml") or word in recipe_names()] or ["mini"]
    try:
        schema = SftConfig if any("sft" in read_recipe(recipe) for recipe in recipes) else Config
        config = resolve(schema, rest, recipe="mini")
        _check(options)
        nodes = options.nodes or -(-options.gpus // 8)
        shape = model_shape(config.model.path)
        given = {name: value for name, flag in LENGTHS.items() if (value := getattr(options, flag)) is not None}
        if options.image_share is not None:
            given["image_share"] = options.image_share
        if options.from_run is not None:
            load, seconds = measured(options.from_run, shape), measured_phases(options.from_run)
        else:
            load = assumed_sft(config, shape, given) if isinstance(config, SftConfig) else assumed(config, shape, given)
            seconds = None
        plan = make_plan(config, find_device(options.gpu, options.gpus), options.gpus, nodes, load)
    except (ConfigError, ValueError, OSError) as error:
        exit_with(PROG, error)
    if options.json:
        print(json.dumps(to_json(plan, seconds), indent=1))
    else:
        show(plan, " ".join(recipes), seconds)
    return 0 if plan.fits else 1


def _check(options: argparse.Namespace) -> None:
    """ValueError, by its name, for an option out of its range."""
    for name in ("gpus", "nodes"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be 1 or more")
    for name in (*LENGTHS.values(), "image_share"):
        value, most = getattr(options, name), 1.0 if name == "image_share" else math.inf
        if value is not None and not (0 <= value <= most and math.isfinite(value)):
            allowed = "between 0 and 1" if name == "image_share" else "a finite number from 0 on"
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: must be {allowed}")


if __name__ == "__main__":
    raise SystemExit(main())
