"""The shipped models of the suite: small, of one vocabulary, and able to use every tool."""

from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open

from axpo.cli import resolve
from axpo.config import Config
from axpo.inputs import check_sampling, make_agent
from axpo.paths import MODELS, model_directory
from axpo.rollout import Agent, Limits
from axpo.tasks import get_task
from axpo.tasks.suite import TOOLS

SUITE = [name for name in MODELS if name.startswith("suite/")]


@pytest.mark.parametrize("name", SUITE)
def test_a_shipped_model_is_small_and_in_bfloat16(name: str):
    folder = model_directory(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    base = model_directory("suite/base")
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            assert file.read_bytes() == (folder / file.name).read_bytes(), file.name


@pytest.fixture(scope="module", params=SUITE)
def agent(request: pytest.FixtureRequest) -> Iterator[Agent]:
    config = resolve(Config, [f"--model.path={request.param}"], recipe="suite")
    inputs = check_sampling(config)
    assert list(inputs.conversation.tools) == list(TOOLS)
    yield make_agent(config, inputs)
    for tool in inputs.conversation.tools.values():
        tool.close()


@pytest.mark.parametrize(("family", "wanted"), list(zip(("perception", "reasoning", "search"), TOOLS, strict=True)))
def test_it_calls_the_tool_of_the_family_and_is_right_with_it(agent: Agent, family: str, wanted: str):
    task = get_task(family)
    questions = [(index, task.question("heldout", index)) for index in range(24)]
    groups = agent.rollouts(0, questions, 4, Limits(max_turns=3, max_new_tokens=128, max_tokens=640))
    branches = [branch for group in groups for branch in group]
    calls = [call for branch in branches for call in branch.calls]
    assert sum(call.name in (wanted, None) for call in calls) >= 0.9 * len(calls), "one without a name is malformed"
    assert sum(call.ok for call in calls) >= 0.7 * len(calls) > 5
    assert sum(branch.reward for branch in branches if branch.calls) >= 0.1 * sum(bool(b.calls) for b in branches)
    assert sum(branch.status == "answered" for branch in branches) >= 0.9 * len(branches)
    agent.close(branches)
