"""The paper's pipeline: `python -m axpo.pipeline [recipe] [--pipeline.field value …]`; the same again goes on.

A teacher's trajectories on the training questions; fine-tuning of the student on the right ones; the student's outcomes
on the same questions, and the filter by both; RL from the fine-tuned student on what is left; evaluation of all
checkpoints, and the table of them.
"""

import shlex
import time
from contextlib import closing
from pathlib import Path

from axpo.cli import ConfigError, exit_with, load_config
from axpo.config import CollectConfig, Config, PipelineConfig, SftConfig, Stages
from axpo.paths import model_directory
from axpo.snapshot import snapshot
from axpo.stages import Record, Runner, Stage, locked
from axpo.tasks import task_names


def stages(config: Stages) -> list[Stage]:
    """The stages in their order.

    Raises:
        ConfigError: a stage's words set a field that the pipeline sets.
    """
    out = Path(config.dir) / config.name
    made: list[Stage] = []
    questions, heldout = config.questions, config.heldout
    asked: tuple[str, ...] = ()
    if config.questions in task_names() or config.count:
        questions, asked = str(out / "questions.parquet"), ("questions",)
        words = ["export", config.questions, questions, "--count", str(config.count)]
        made.append(Stage("questions", "axpo.data", words, Path(questions)))
    if config.heldout in task_names():
        heldout = str(out / "heldout.parquet")
        words = ["export", config.heldout, heldout, "--split", "heldout"]
        made.append(Stage("heldout", "axpo.data", words, Path(heldout)))

    rows = {"data.task": "jsonl", "data.path": questions}
    teacher, student, sft = out / "teacher", out / "student", out / "sft"
    told = {"model.path": config.teacher, "collect.out": str(teacher), **rows}
    words = _words("collect", f"{config.collect} {config.teacher_fields}", told)
    made.append(Stage("teacher", "axpo.collect", words, teacher / "outcomes", CollectConfig, needs=asked))

    told = {"model.path": config.base, "data.task": "jsonl", "data.path": str(teacher / "rows")}
    words = _words("sft", config.sft, {**told, **_run(config, "sft")})
    made.append(Stage("sft", "axpo.sft", words, sft / "policy", SftConfig, "mini-sft", ("teacher",), sft))

    models = {"teacher": (config.teacher, ()), "base": (config.base, ()), "sft": (str(sft / "policy"), ("sft",))}
    if config.rl:
        told = {"model.path": str(sft / "policy"), "collect.out": str(student), "collect.rows": "false", **rows}
        words = _words("collect", config.collect, told)
        made.append(Stage("student", "axpo.collect", words, student / "outcomes", CollectConfig, needs=("sft", *asked)))
        left = str(out / "rl.parquet")
        words = ["filter", "--student", str(student), "--teacher", str(teacher), questions, left]
        words += [word for file in config.more for word in ("--add", file)]
        made.append(Stage("filter", "axpo.data", words, Path(left), needs=("teacher", "student")))
    for entry in config.rl:
        name, _, given = entry.partition("=")
        told = {"model.path": str(sft / "policy"), "data.task": "jsonl", "data.path": str(out / "rl.parquet")}
        told |= {"data.heldout_path": heldout} if heldout else {"eval.questions": "0"}
        words = _words("rl", given, {**told, **_run(config, name)})
        run, needs = out / name, ("sft", "filter", *(("heldout",) if config.heldout in task_names() else ()))
        made.append(Stage(name, "axpo.train", words, run / "report.html", Config, needs=needs, resumes=run))
        models[f"sft+{name}"] = (str(run / "policy"), (name,))

    for name, folder in evaluations(config).items():
        path, needs = models[name]
        given = f"{config.evaluate} {config.teacher_fields}" if name == "teacher" else config.evaluate
        words = _words("evaluate", given, {"model.path": path, "eval.out": str(folder)})
        made.append(Stage(f"evaluate-{name}", "axpo.evaluate", words, folder / "summary.json", Config, needs=needs))
    return made


def evaluations(config: Stages) -> dict[str, Path]:
    """Where the results of each evaluated checkpoint are, in the order of the table."""
    return {name: Path(config.dir) / config.name / "evaluated" / name for name in config.checkpoints}


def check(config: Stages, planned: list[Stage]) -> None:
    """What the last stages need, before the first one starts.

    Raises:
        ValueError, FileNotFoundError: a checkpoint or a benchmark is not there, or a benchmark's grader is not.
    """
    from axpo.benchmarks import open_benchmarks
    from axpo.grading import Grader

    for field in ("teacher", "base"):
        try:
            model_directory(getattr(config, field))
        except FileNotFoundError as error:
            raise ValueError(f"pipeline.{field}: {error}") from None
    settings = planned[-1].config()
    assert isinstance(settings, Config)
    with closing(Grader(settings.judge)) as grader:
        benchmarks = open_benchmarks(settings)
        for benchmark in benchmarks.values():
            grader.check(benchmark.task.kinds())
    if not benchmarks:
        raise ValueError(f"pipeline.evaluate = {config.evaluate!r}: names no benchmarks; give --eval.benchmarks")


def _run(config: Stages, name: str) -> dict[str, str]:
    return {"run.dir": str(Path(config.dir) / config.name), "run.name": name}


def _words(field: str, given: str, told: dict[str, str]) -> list[str]:
    """A command's words: those of the field, then what the pipeline tells it."""
    words = shlex.split(given)
    own = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
    if taken := [name for name in own if name in told]:
        raise ConfigError(f"pipeline.{field} = {given!r}: the pipeline sets {taken[0]} itself; leave it out")
    return [*words, *(word for name, value in told.items() for word in (f"--{name}", value))]


def main() -> None:
    config = load_config(PipelineConfig, prog="axpo.pipeline", recipe="pipeline").pipeline
    folder = Path(config.dir) / config.name
    try:
        planned = stages(config)
        with locked(folder) as lock:
            record = Record(folder / "stages", planned)
            if len(record.finished) < len(planned):
                check(config, planned)
            run_stages(planned, record, Runner(lock), config.nproc)
    except (ValueError, OSError) as error:
        exit_with("axpo.pipeline", error)
    from axpo.compare import compare, show

    print("\n" + "\n".join(f"{stage.name:20} {record.finished[stage.name]['seconds']:8.0f} s" for stage in planned))
    show(compare(evaluations(config)), folder / "comparison")


def run_stages(planned: list[Stage], record: Record, runner: Runner, nproc: int) -> None:
    """Runs what is not finished; ends the process where a stage fails or is stopped."""
    for number, stage in enumerate(planned, 1):
        title = f"stage {number} of {len(planned)}, {stage.name}"
        if stage.name in record.finished:
            print(f"{title}: finished before", flush=True)
            continue
        command = stage.command(nproc)
        print(f"\n{title}: {shlex.join(['python', *command[1:]])}", flush=True)
        begun, read = time.monotonic(), snapshot(stage.reads())
        code = runner.run(command)
        if runner.stopped is not None:
            print(f"stopped by {runner.stopped.name} in stage {stage.name}; the same command goes on", flush=True)
            raise SystemExit(128 + runner.stopped)
        if code or not stage.made.exists():
            why = f"ended with {code}; its message is above" if code else f"ended early: {stage.made} is not there"
            exit_with("axpo.pipeline", ValueError(f"stage {stage.name} {why}; the same command goes on there"), 1)
        record.finish(stage, time.monotonic() - begun, read)


if __name__ == "__main__":
    main()
