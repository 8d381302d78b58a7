"""One step's rollouts and resamples, its questions dealt over the ranks; run by the tests under torchrun.

`python -m torch.distributed.run --nproc-per-node 2 tests/axpo/explore_worker.py OUT`
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from axpo.branch import Limits
from axpo.config import Algo
from axpo.conversation import Conversation
from axpo.distributed import finish, initialise, rank, world_size
from axpo.explore import explore
from axpo.paths import model_directory
from axpo.rollout import Agent
from axpo.tasks import get_task
from axpo.tools import get_tools
from engine import LLM

LIMITS = Limits(max_turns=3, max_new_tokens=96, max_tokens=512)
ALGO = Algo(group_size=4, resamples_per_prefix=3, budget_ratio=0.5)
QUESTIONS = 12

Made = dict[str, tuple[list[int], list[float | None]]]
"""Trajectory id -> tokens and log-probs."""


def roll_out(backwards: bool = False, **engine: Any) -> tuple[Made, dict[str, int]]:
    """This rank's trajectories with an engine of these options, and the engine's counters."""
    llm = LLM(model_directory("mini"), dtype=torch.float32, **{"kv_cache_bytes": 1 << 26, **engine})
    task = get_task("mini")
    questions = [(index, task.question("train", index)) for index in range(QUESTIONS)][rank() :: world_size()]
    agent = Agent(llm, Conversation(llm.processor, get_tools(["image_zoom_in"])), seed=0)
    made = explore(agent, 1, questions[:: -1 if backwards else 1], QUESTIONS, LIMITS, ALGO, seed=0)
    everything = [*made.groups, *made.resamples.values()]
    return {t.id: (t.tokens, t.logprobs) for some in everything for t in some}, llm.stats()


def main(out: Path) -> None:
    initialise(torch.device("cpu"))
    made, _ = roll_out()
    (out / f"rank_{rank()}.json").write_text(json.dumps(made))
    finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
