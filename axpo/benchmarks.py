"""A checkpoint on benchmarks: every finished question is on disk, so that an evaluation goes on where it ended.

A line a sample, in the words of both common toolkits (docs/evaluation.md): lmms-eval's doc_id, doc_hash, input, target,
resps and filtered_resps, VLMEvalKit's index, question, answer, prediction and hit.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axpo.branch import Limits
from axpo.config import Config
from axpo.data.adapters import ADAPTERS
from axpo.distributed import barrier, rank, world_size
from axpo.grading import final_answer
from axpo.outfolder import open_folder, writing
from axpo.rundir import write_json, write_text
from axpo.scores import SUMMARY, Scores, average, families, scores, scores_sheet, spread, tools_sheet
from axpo.tasks import Task, get_task, task_names

if TYPE_CHECKING:
    from axpo.branch import Branch
    from axpo.rollout import Agent

FAMILIES = {
    **{name: adapter.family for name, adapter in ADAPTERS.items() if adapter.family},
    **{name: name for name in ("reasoning", "perception", "search")},
    "mini": "perception",
}
"""The family of the published benchmarks and of the embedded tasks, by name."""

_BATCH = 64  # questions that are rolled out at once, which bounds the KV that is held
# What may differ between the parts of an evaluation: which questions, and how often.
_SETTINGS: dict[str, set[str]] = {
    "eval": {"benchmarks", "limit", "repeats", "out", "questions", "every", "k"},
    "run": {"name", "dir", "steps", "resume"},
    **{section: set() for section in ("model", "rollout", "python", "search", "image_search", "judge")},
}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """family: what its results are averaged with (reasoning, perception, search); its own name where none is known."""

    task: Task
    family: str


def open_benchmarks(config: Config) -> dict[str, Benchmark]:
    """The benchmarks of `eval.benchmarks` by name; their questions are the held-out split.

    Raises:
        ValueError: an entry names neither an embedded task nor rows, two have one name, or a row is wrong.
    """
    opened: dict[str, Benchmark] = {}
    for entry in config.eval.benchmarks:
        given, equals, source = entry.partition("=")
        if not equals:
            given, source = "", entry
        family, _, name = given.rpartition("/")
        embedded = source in task_names()
        name = name or (source if embedded else Path(source).stem)
        if "/" in family or (equals and not given):
            raise ValueError(f"eval.benchmarks = {entry!r}: before the = stands FAMILY/NAME or NAME")
        if name in opened:
            raise ValueError(f"eval.benchmarks = {entry!r}: there is a {name!r} already; write another name=path")
        if not embedded and not Path(source).exists():
            raise ValueError(
                f"eval.benchmarks = {entry!r}: no such file, nor an embedded task: {', '.join(task_names())}"
            )
        try:
            options = {"path": "", "heldout_path": source, "check_rows": config.data.check_rows}
            task = get_task(source) if embedded else get_task("jsonl", **options)
        except ValueError as error:
            raise ValueError(f"eval.benchmarks = {entry!r}: {error}") from None
        opened[name] = Benchmark(task, family or FAMILIES.get(name) or FAMILIES.get(Path(source).stem) or name)
    return opened


def eval_limits(config: Config) -> Limits:
    """Sampling and limits of an evaluation."""
    return Limits(
        max_turns=config.eval.max_turns,
        max_new_tokens=config.rollout.max_new_tokens,
        max_tokens=config.rollout.max_tokens,
        max_observation_tokens=config.rollout.max_observation_tokens,
        max_images=config.rollout.max_images,
        tool_timeout_s=config.rollout.tool_timeout_s,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        top_k=config.eval.top_k,
        presence_penalty=config.eval.presence_penalty,
    )


class Results:
    """The folder of an evaluation: <benchmark>.jsonl when it is whole, <benchmark>.<rank>.jsonl until then.

    Raises:
        OutFolderError: the folder holds results of other settings, or cannot be written to; also later.
    """

    def __init__(self, config: Config):
        self.path = Path(config.eval.out or Path(config.run.dir) / config.run.name / "benchmarks")
        self._samples = config.eval.samples
        open_folder(self.path, config, _SETTINGS, "eval.out")

    def lines(self, benchmark: str) -> dict[tuple[int, int], list[dict[str, Any]]]:
        """The samples of each whole (repeat, question), in order."""
        found: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
        for file in [self.path / f"{benchmark}.jsonl", *sorted(self.path.glob(f"{benchmark}.[0-9]*.jsonl"))]:
            for line in _read(file):
                found.setdefault((line["repeat"], line["doc_id"]), {})[line["sample"]] = line
        whole = {key: some for key, some in found.items() if len(some) == self._samples}
        return {key: [some[sample] for sample in sorted(some)] for key, some in sorted(whole.items())}

    def append(self, benchmark: str, lines: Sequence[dict[str, Any]]) -> None:
        """Adds a question's samples to this rank's file, in one write behind the last whole line."""
        text = "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines)
        path = self.path / f"{benchmark}.{rank()}.jsonl"
        with writing(path), path.open("ab") as file:
            file.write(text.encode())

    def mend(self, benchmark: str) -> None:
        """Drops a last line that was cut when an earlier evaluation was killed."""
        path = self.path / f"{benchmark}.{rank()}.jsonl"
        if path.exists():
            with path.open("rb+") as file:
                file.truncate(file.read().rfind(b"\n") + 1)

    def finish(self, benchmark: str) -> list[dict[str, Any]]:
        """All samples, now in one file (rank 0 writes it)."""
        lines = [line for some in self.lines(benchmark).values() for line in some]
        barrier()  # all have read
        if rank() == 0:
            part = self.path / f"{benchmark}.part"
            with writing(part):
                part.write_text("".join(json.dumps(line) + "\n" for line in lines))
                part.replace(self.path / f"{benchmark}.jsonl")
            for file in self.path.glob(f"{benchmark}.[0-9]*.jsonl"):
                file.unlink()
        barrier()
        return lines


def run_benchmarks(
    agent: "Agent", benchmarks: dict[str, Benchmark], config: Config, results: Results
) -> dict[str, Scores]:
    """Samples what is missing, over all ranks, and scores every benchmark; writes summary.json and summary.md."""
    made: dict[str, Scores] = {}
    for name, benchmark in benchmarks.items():
        task = benchmark.task
        done = results.lines(name)
        results.mend(name)
        barrier()  # all ranks have seen the same before any adds to it
        count = min(config.eval.limit or task.size("heldout"), task.size("heldout"))
        wanted = [(repeat, doc) for repeat in range(config.eval.repeats) for doc in range(count)]
        missing = [pair for pair in wanted if pair not in done]
        for repeat, docs in _batches(missing[rank() :: world_size()]):
            questions = [(doc, task.question("heldout", doc)) for doc in docs]
            for branches in agent.rollouts(repeat, questions, config.eval.samples, eval_limits(config)):
                results.append(name, [_line(agent, name, repeat, i, branch) for i, branch in enumerate(branches)])
                agent.close(branches)
        barrier()
        asked = set(wanted)
        lines = [line for line in results.finish(name) if (line["repeat"], line["doc_id"]) in asked]
        made[name] = scores(lines, config.eval.k or config.eval.samples, benchmark.family)
    if rank() == 0:
        write_json(results.path / SUMMARY, _summary(made))
        sheets = (scores_sheet(made, config.model.path), tools_sheet(made))
        write_text(results.path / "summary.md", "\n".join(sheet.markdown() for sheet in sheets))
    return made


def _summary(made: dict[str, Scores]) -> dict[str, Any]:
    means = {family: asdict(average(members.values())) for family, members in families(made).items()}
    summary = {
        "benchmarks": {name: asdict(one) for name, one in made.items()},
        "families": means,
        "average": asdict(average(made.values())),
    }
    for record in (*summary["benchmarks"].values(), *means.values(), summary["average"]):
        for measure in ("pass_1", "pass_k"):
            mean, deviation = spread(record[measure])
            record[measure] = {"mean": mean, "std": deviation, "repeats": record[measure]}
    return summary


def _batches(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    """(repeat, questions) with as many questions as are rolled out at once."""
    for repeat in sorted({repeat for repeat, _ in pairs}):
        docs = [doc for other, doc in pairs if other == repeat]
        for start in range(0, len(docs), _BATCH):
            yield repeat, docs[start : start + _BATCH]


def _line(agent: "Agent", benchmark: str, repeat: int, sample: int, branch: "Branch") -> dict[str, Any]:
    processor, tokens = agent.conversation.processor, branch.sequence.token_ids
    last = processor.decode(tokens[branch.turn_start :])
    given = final_answer(last, thinking=agent.conversation.thinks) if branch.status == "answered" else None
    asked = json.dumps([branch.question.id, branch.question.text, branch.question.answer])
    return {
        "benchmark": benchmark,
        "doc_id": branch.group,
        "doc_hash": hashlib.sha256(asked.encode()).hexdigest(),
        "index": branch.question.id,
        "repeat": repeat,
        "sample": sample,
        "input": branch.question.text,
        "question": branch.question.text,
        "answer": branch.question.answer,
        "target": branch.question.answer,
        "prediction": given or "",
        "filtered_resps": [given or ""],
        "resps": [[processor.decode(tokens[branch.prompt_len :])]],
        "hit": int(branch.reward),
        "score": branch.score,
        "grader": branch.question.rubric.kind,
        "error": branch.grade_error,
        "used_tool": bool(branch.calls),
        "tools": [call.name for call in branch.calls],
        "turns": branch.turn,
        "tokens": branch.sampled,
        "status": branch.status,
        "meta": branch.question.meta,
    }


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines; the last may have been cut short."""
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)
