"""Teacher trajectories: `[torchrun] -m axpo.collect [recipe …] [--section.field value …]`.

`model.path` rolls out on the training questions with `eval`'s sampling; what it gets right becomes conversations for
axpo.sft. The outcomes of a student and of a teacher choose the questions of RL: `python -m axpo.data filter`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axpo.cli import exit_with, load_config
from axpo.config import CollectConfig

if TYPE_CHECKING:
    from rich.table import Table

    from axpo.branch import Branch
    from axpo.rollout import Agent
    from axpo.tasks import Task


class Collection:
    """A folder of outcomes/*.jsonl (a line a question) and rows/*.parquet, one of each a batch of questions.

    A batch is there whole or not at all, whatever the number of ranks: rows first, then its outcomes.

    Raises:
        OutFolderError: the folder holds a collection with other settings, or cannot be written to; also later.
    """

    def __init__(self, config: CollectConfig):
        from axpo.outfolder import open_folder

        self.path = Path(config.collect.out or Path(config.run.dir) / config.run.name / "collected")
        free = {"collect": {"out", "limit"}, "run": {"name", "dir", "steps", "resume"}}
        sections = ("model", "data", "rollout", "eval", "python", "search", "image_search", "judge", "collect", "run")
        open_folder(self.path, config, {name: free.get(name, set()) for name in sections}, "collect.out")

    def has(self, batch: int) -> bool:
        return self._outcomes(batch).exists()

    def write(self, batch: int, outcomes: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> None:
        from axpo.data.write import write_rows
        from axpo.outfolder import writing

        path = self._outcomes(batch)
        with writing(self.path):
            if rows:
                write_rows(rows, self.path / "rows" / f"{batch:08d}.parquet")
            path.parent.mkdir(exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(outcome) + "\n" for outcome in outcomes))
            part.replace(path)

    def _outcomes(self, batch: int) -> Path:
        return self.path / "outcomes" / f"{batch:08d}.jsonl"


def read_outcomes(path: str | Path) -> Iterator[dict[str, Any]]:
    """The outcome lines of a collection's folder, in the order of its questions.

    Raises:
        ValueError: there are none.
    """
    files = sorted(Path(path).glob("outcomes/*.jsonl"))
    if not files:
        raise ValueError(f"{path}: no outcomes/*.jsonl; it must be a folder that axpo.collect has written")
    for file in files:
        for line in file.read_text().splitlines():
            yield json.loads(line)


def collect(agent: "Agent", task: "Task", config: CollectConfig, into: Collection) -> None:
    """Rolls out on every batch of training questions that is not there yet; ranks share them."""
    from axpo.benchmarks import eval_limits
    from axpo.distributed import rank, world_size

    count = min(config.collect.limit or task.size("train"), task.size("train"))
    size = config.collect.batch_size
    missing = [batch for batch in range(-(-count // size)) if not into.has(batch)]
    for batch in missing[rank() :: world_size()]:
        docs = range(batch * size, min((batch + 1) * size, count))
        questions = [(doc, task.question("train", doc)) for doc in docs]
        groups = agent.rollouts(0, questions, config.collect.samples, eval_limits(config))
        right = [b for group in groups for b in group if b.reward > 0] if config.collect.rows else []
        into.write(batch, [_outcome(group) for group in groups], [conversation(agent, b) for b in right])
        agent.close(branch for group in groups for branch in group)


def conversation(agent: "Agent", branch: "Branch") -> dict[str, Any]:
    """The finished branch as a row: `axpo.tasks.conversations.conversation_row` makes its tokens again.

    What the model said is kept as text. Where it did not choose the tokenizer's own tokens for that text, the row has
    those; `meta.exact` says whether it did.
    """
    from axpo.data import Row
    from axpo.images import png_bytes

    processor, tokens, roles = agent.conversation.processor, branch.sequence.token_ids, branch.roles
    messages = [dict(message) for message in branch.question.messages]
    exact = True
    observations = iter(branch.observations)
    for start, end in _sampled_runs(roles):
        turn = tokens[start:end]
        turn = turn[:-1] if turn[-1] == agent.conversation.end_of_turn else turn
        said = processor.decode(turn)
        exact = exact and agent.conversation.turn(said)[:-1] == list(turn)
        messages.append({"role": "assistant", "content": said})
        for result in next(observations, ()):
            text = [{"type": "text", "text": result.text}] if result.text else []
            messages.append({"role": "tool", "content": text + [{"type": "image"}] * len(result.images)})
    meta = {"question": branch.question.id, "tools": [call.name for call in branch.calls], "exact": exact}
    return Row(branch.id, messages, tuple(map(png_bytes, branch.images)), branch.question.rubric, meta).record()


def summary(outcomes: Sequence[dict[str, Any]]) -> "Table":
    """What was collected: accuracy, and the share of trajectories, and of right ones, that call a tool."""
    from axpo.metrics import table

    rewards = [reward for one in outcomes for reward in one["rewards"]]
    tools = [names for one in outcomes for names in one["tools"]]
    right = [names for names, reward in zip(tools, rewards, strict=True) if reward > 0]
    solved = sum(any(one["rewards"]) for one in outcomes)
    rows = [
        ["questions", str(len(outcomes))],
        ["trajectories", str(len(rewards))],
        ["right", f"{len(right)} ({len(right) / len(rewards):.1%})"],
        ["questions with a right one", f"{solved} ({solved / len(outcomes):.1%})"],
        ["questions all right", f"{sum(all(one['rewards']) for one in outcomes)}"],
        ["with a tool call", f"{sum(map(bool, tools)) / len(tools):.1%}"],
        ["right ones with a tool call", f"{sum(map(bool, right)) / len(right):.1%}" if right else "–"],
    ]
    called = Counter(name or "malformed" for names in right for name in set(names))
    rows += [[f"right ones with {name}", f"{count / len(right):.1%}"] for name, count in sorted(called.items())]
    return table("collected", ["", ""], rows)


def _outcome(group: "Sequence[Branch]") -> dict[str, Any]:
    return {
        "id": group[0].question.id,
        "doc_id": group[0].group,
        "rewards": [branch.reward for branch in group],
        "tools": [[call.name for call in branch.calls] for branch in group],
        "errors": [branch.grade_error for branch in group],
    }


def _sampled_runs(roles: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of each turn's sampled tokens."""
    from axpo.trajectory import SAMPLED

    start = None
    for index, role in enumerate([*roles, None]):
        if role == SAMPLED and start is None:
            start = index
        elif role != SAMPLED and start is not None:
            yield start, index
            start = None


def main() -> None:
    config = load_config(CollectConfig, prog="axpo.collect", recipe="mini")
    from rich.console import Console

    from axpo import distributed
    from axpo.inputs import check_sampling, make_agent
    from axpo.outfolder import OutFolderError

    try:
        distributed.initialise(distributed.device(), config.run.timeout_s)
        inputs = check_sampling(config)
        into = Collection(config)
    except (ValueError, OSError) as error:
        exit_with("axpo.collect", error)
    agent = make_agent(config, inputs)
    try:
        collect(agent, inputs.task, config, into)
    except OutFolderError as error:
        exit_with("axpo.collect", error, every_rank=True)
    distributed.barrier()
    if distributed.rank() == 0:
        outcomes = list(read_outcomes(into.path))
        Console().print(summary(outcomes))
        print(f"rows     {into.path / 'rows'}\noutcomes {into.path / 'outcomes'}")
    distributed.finish()


if __name__ == "__main__":
    main()
