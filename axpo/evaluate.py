"""Pass@1, Pass@k and tool use: `[torchrun] -m axpo.evaluate [recipe …] [--section.field value …]`.

On held-out questions of the task, as a run does before and after; on benchmarks with `--eval.benchmarks`.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from axpo.cli import exit_with, load_config
from axpo.config import Config

if TYPE_CHECKING:
    from rich.table import Table

    from axpo.rollout import Agent
    from axpo.tasks import Task

_BATCH = 64  # questions that are rolled out at once, which bounds the KV that is held
_Z = 1.96  # of a 95 % interval


@dataclass(frozen=True, slots=True)
class QuestionResult:
    """One held-out question: reward and tool use of each of its samples."""

    id: str
    rewards: list[float]
    used_tool: list[bool]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results at a training step; `summary` is what tables and the report show."""

    step: int
    questions: list[QuestionResult]

    def summary(self) -> dict[str, float | None]:
        """Means with 95 % intervals `_low`, `_high` over questions, since a question's samples are not independent.

        pass@1 is the mean reward (normal interval), pass@k the share of questions with any right sample (Wilson's
        interval); accuracies are over samples.
        """
        samples = len(self.questions[0].rewards)
        by_tool: dict[bool, list[float]] = {True: [], False: []}
        for question in self.questions:
            for reward, used in zip(question.rewards, question.used_tool, strict=True):
                by_tool[used].append(reward)
        return {
            **_interval("pass@1", (sum(q.rewards) / samples for q in self.questions)),
            **_wilson(f"pass@{samples}", [max(q.rewards) > 0 for q in self.questions]),
            **_interval("tool/rate", (sum(q.used_tool) / samples for q in self.questions)),
            "tool/accuracy": _mean(by_tool[True]),
            "no_tool/accuracy": _mean(by_tool[False]),
            "questions": len(self.questions),
            "samples": samples,
        }

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "summary": self.summary(), "questions": [asdict(q) for q in self.questions]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Evaluation":
        return cls(record["step"], [QuestionResult(**question) for question in record["questions"]])


def evaluate(agent: "Agent", task: "Task", config: Config, step: int) -> Evaluation | None:
    """Rolls out `eval.samples` times on the first `eval.questions` held-out questions; ranks share the work.

    The noise is the same at every evaluation of a run, so that before and after differ by the policy alone.
    None on every rank when the agent of any was interrupted before its questions were done.
    """
    from axpo.benchmarks import eval_limits
    from axpo.distributed import gather_objects, rank, world_size
    from axpo.rollout import InterruptedRollouts

    limits = eval_limits(config)
    mine = list(range(config.eval.questions))[rank() :: world_size()]
    results: list[tuple[int, QuestionResult]] = []
    for start in range(0, len(mine), _BATCH):
        questions = [(index, task.question("heldout", index)) for index in mine[start : start + _BATCH]]
        try:
            groups = agent.rollouts(0, questions, config.eval.samples, limits)
        except InterruptedRollouts:
            break
        for branches in groups:
            rewards, used = [branch.reward for branch in branches], [bool(branch.calls) for branch in branches]
            results.append((branches[0].group, QuestionResult(branches[0].question.id, rewards, used)))
            agent.close(branches)
    ordered = sorted(gather_objects(results), key=lambda result: result[0])
    if len(ordered) < config.eval.questions:
        return None
    return Evaluation(step, [question for _, question in ordered])


def comparison(evaluations: Iterable[tuple[str, Evaluation]]) -> "Table":
    """A table with one column an evaluation."""
    from axpo.metrics import table

    named = [(name, evaluation.summary()) for name, evaluation in evaluations]
    rows = []
    for metric in [key for key in named[0][1] if not key.endswith(("_low", "_high")) and key not in _COUNTS]:
        label = _LABELS.get(metric, metric.replace("pass@", "Pass@"))
        rows.append([label, *(_cell(summary, metric) for _, summary in named)])
    first = named[0][1]
    title = f"{first['questions']} held-out questions, {first['samples']} samples each (95 % intervals)"
    return table(title, ["", *(name for name, _ in named)], rows)


_COUNTS = ("questions", "samples")
_LABELS = {
    "tool/rate": "tool-use rate",
    "tool/accuracy": "accuracy with tool",
    "no_tool/accuracy": "accuracy without tool",
}


def _cell(summary: dict[str, float | None], metric: str) -> str:
    value, low, high = (summary.get(f"{metric}{suffix}") for suffix in ("", "_low", "_high"))
    if value is None:
        return "–"
    return f"{value:.1%}" if low is None or high is None else f"{value:.1%}  [{low:.1%}, {high:.1%}]"


def _interval(name: str, values: Iterable[float]) -> dict[str, float | None]:
    values = list(values)
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    half = _Z * math.sqrt(variance / len(values))
    return {name: mean, f"{name}_low": max(0.0, mean - half), f"{name}_high": min(1.0, mean + half)}


def _wilson(name: str, successes: list[bool]) -> dict[str, float | None]:
    """Wilson's score interval of a proportion; unlike the normal one it has a width at 0 % and 100 %."""
    n, share = len(successes), sum(successes) / len(successes)
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return {name: share, f"{name}_low": max(0.0, centre - half), f"{name}_high": min(1.0, centre + half)}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def main() -> None:
    """Evaluates `model.path`, on `eval.benchmarks` or on held-out questions of the task, and prints the table."""
    config = load_config(Config, prog="axpo.evaluate", recipe="mini")
    from rich.console import Console

    from axpo import distributed
    from axpo.benchmarks import Results, open_benchmarks, run_benchmarks
    from axpo.inputs import check_heldout, check_sampling, make_agent
    from axpo.outfolder import OutFolderError
    from axpo.scores import scores_sheet, tools_sheet
    from axpo.sheet import print_sheets

    try:
        distributed.initialise(distributed.device(), config.run.timeout_s)
        inputs = check_sampling(config)
        benchmarks = open_benchmarks(config)
        if not benchmarks:
            check_heldout(config, inputs.task)
        for benchmark in benchmarks.values():
            inputs.grader.check(benchmark.task.kinds())
        results = Results(config) if benchmarks else None
    except (ValueError, OSError) as error:
        exit_with("axpo.evaluate", error)
    agent = make_agent(config, inputs)
    if results is None:
        evaluated = evaluate(agent, inputs.task, config, step=0)
        assert evaluated is not None  # nothing interrupts it
        if distributed.rank() == 0:
            Console().print(comparison([(config.model.path, evaluated)]))
    else:
        try:
            made = run_benchmarks(agent, benchmarks, config, results)
        except OutFolderError as error:
            exit_with("axpo.evaluate", error, every_rank=True)
        if distributed.rank() == 0:
            print_sheets([scores_sheet(made, config.model.path), tools_sheet(made)])
            print(f"results {results.path}")
    distributed.finish()


if __name__ == "__main__":
    main()
