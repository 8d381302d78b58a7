"""A trajectory line: exactly DESIGN.md's fields, and back."""

import json
import random
from dataclasses import replace

import pytest

from axpo.advantage import assign_credit
from axpo.trajectory import Trajectory
from tests.axpo.factory import random_group, random_resamples

FIELDS = [
    *("step", "question_id", "group", "id", "parent", "fork_token", "prompt_len", "tokens", "roles", "loss_mask"),
    *("logprobs", "entropies", "advantages", "reward", "status", "tool_calls", "confidence", "text"),
]


def test_round_trip():
    rng = random.Random(random.getrandbits(32))
    group = random_group(rng, tool_rate=1.0)
    resamples = random_resamples(rng, group[0])
    assign_credit([group], {group[0].id: resamples})
    for trajectory in [*group, *resamples]:
        line = trajectory.to_json()
        assert "\n" not in line and list(json.loads(line)) == FIELDS
        assert list(json.loads(line)["tool_calls"][0]) == ["name", "arguments", "ok", "error", "turn", "start", "end"]
        assert Trajectory.from_json(line) == replace(trajectory, images=[], positions=None)


def test_bad_lines_name_the_field():
    record = json.loads(random_group(random.Random(1))[0].to_json())
    with pytest.raises(ValueError, match=r"\['reward'\]"):
        Trajectory.from_json(json.dumps({k: v for k, v in record.items() if k != "reward"}))
    with pytest.raises(ValueError, match=r"\['extra'\]"):
        Trajectory.from_json(json.dumps({**record, "extra": 1}))
    with pytest.raises(ValueError, match="roles has 1 entries"):
        Trajectory.from_json(json.dumps({**record, "roles": [0]}))
    with pytest.raises(ValueError, match="fork_token"):
        Trajectory.from_json(json.dumps({**record, "parent": "x"}))
