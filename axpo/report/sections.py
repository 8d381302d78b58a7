"""What the report shows, from top to bottom: every figure with its metrics, its colours and its caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from axpo.report.axis import number, percent
from axpo.report.data import Run
from axpo.report.figures import (
    BLUE,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    TEAL,
    Figure,
    confidence,
    curves,
    histogram,
    phases,
    plane,
    tool_names,
    whiskers,
)
from axpo.resample import Candidate

_TONES = (BLUE, ORANGE, TEAL, PURPLE, RED, GREY)


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    lead: str
    figures: list[Figure]


def sections(run: Run, failed_calls: Sequence[Candidate]) -> list[Section]:
    """All sections that the run has numbers for. `failed_calls`: first calls of wrong tool-using rollouts."""
    made = [
        Section(
            "Learning",
            "Thin lines are the steps, thick ones a light average. Numbers beside a name: its mean over the first and "
            "over the last tenth of the steps.",
            _learning(run),
        ),
        Section(
            "The thinking–acting gap",
            "A policy that thinks well may still fail when it acts. These figures follow the attempts to use a tool.",
            _gap(run, failed_calls),
        ),
        Section(
            "Tools",
            "Every call that reached a tool, by rollouts and resamples; a call that could not be read reached none.",
            _tools(run),
        ),
        Section("Time", "Where the seconds of a step went.", _time(run)),
        Section(
            "Policy health", "Signs that an update went too far, or that sampler and trainer disagree.", _health(run)
        ),
    ]
    return [section for section in made if section.figures]


def _learning(run: Run) -> list[Figure]:
    return _present(
        curves(
            run,
            "Reward",
            "Share of right answers among the step’s rollouts. Points with a bar: Pass@1 on held-out questions and its "
            "95 % interval, sampled as the config's eval section says.",
            [("reward/mean", "reward", BLUE)],
            percent,
            floor=0.0,
            whiskers=whiskers(run, "pass@1", "held-out Pass@1", TEAL),
        ),
        curves(
            run,
            "Tool use",
            "Share of rollouts with at least one tool call, well-formed or not. Points: held-out questions.",
            [("tool/rate", "tool use", BLUE)],
            percent,
            floor=0.0,
            whiskers=whiskers(run, "tool/rate", "held-out", TEAL),
        ),
        curves(
            run,
            "Right with and without a tool",
            "Share of right answers among the rollouts that called a tool, and among those that did not.",
            [("tool/accuracy", "with a tool", BLUE), ("no_tool/accuracy", "without", ORANGE)],
            percent,
            floor=0.0,
        ),
    )


def _gap(run: Run, failed_calls: Sequence[Candidate]) -> list[Figure]:
    k = run.setting("algo.resamples_per_prefix", "K")
    return _present(
        histogram(run),
        curves(
            run,
            "All-wrong subgroups",
            "Of the questions with an attempt to use a tool: the share where every such attempt was wrong, before and "
            "after resampling. For comparison, the same for the rollouts without a tool.",
            [
                ("tool/all_wrong_rate", "with a tool", BLUE),
                ("tool/all_wrong_rate_after", "after resampling", PURPLE),
                ("no_tool/all_wrong_rate", "without", ORANGE),
                ("no_tool/all_wrong_rate_after", "without, after resampling", TEAL),
            ],
            percent,
            floor=0.0,
        ),
        curves(
            run,
            "Restored by resampling",
            "Of the all-wrong subgroups, the share for which at least one resample was right; and the share of right "
            "resamples. Gaps: no subgroup was all wrong, or none was resampled.",
            [("resample/restore_rate", "restored", PURPLE), ("resample/success_rate", "resamples right", TEAL)],
            percent,
            floor=0.0,
        ),
        curves(
            run,
            "Distinct calls",
            f"How many different tool calls the {k} resamples of one prefix made, on average: by exact arguments, and "
            f"in clusters of calls that ask for the same.{_collapsed(run)}",
            [
                ("resample/distinct_calls", "distinct calls", PURPLE),
                ("resample/call_clusters", "clusters", TEAL),
            ],
            number,
            floor=1.0,
        ),
        confidence(failed_calls),
        plane(run),
        curves(
            run,
            "Calls that failed",
            "Share of calls that gave an error (a box outside the image, say), and of those that could not be read as "
            "a call at all; and of the resampled ones that could not.",
            [
                ("tool/failed_rate", "failed", ORANGE),
                ("tool/malformed_rate", "malformed", RED),
                ("resample/malformed_rate", "malformed, resamples", PURPLE),
            ],
            percent,
            floor=0.0,
        ),
        curves(
            run,
            "Budget",
            f"All-wrong subgroups in a step, and prefixes resampled: one a question, then a second.{_budget(run)}",
            [("resample/triggered", "all-wrong subgroups", BLUE), ("resample/prefixes", "prefixes", PURPLE)],
            number,
            floor=0.0,
        ),
        curves(
            run,
            "Questions without a signal",
            "Share of questions whose rollouts all have the same reward: the group’s advantages are 0 there.",
            [("reward/zero_std_fraction", "no signal", GREY)],
            percent,
            floor=0.0,
        ),
    )


def _tools(run: Run) -> list[Figure]:
    def by_tool(metric: str, *more: tuple[str, str]) -> list[tuple[str, str, int]]:
        lines = [(name, part, suffix) for name in tool_names(run) for part, suffix in [(metric, ""), *more]]
        return [(f"tool/{n}/{part}", f"{n}{suffix}", tone) for (n, part, suffix), tone in zip(lines, cycle(_TONES))]

    return _present(
        curves(run, "Calls", "Calls in a step.", by_tool("calls"), number, floor=0.0),
        curves(
            run,
            "Right with each tool",
            "Share of right answers among the trajectories that called the tool.",
            by_tool("accuracy"),
            percent,
            floor=0.0,
        ),
        curves(
            run,
            "Errors and timeouts",
            "Share of a tool’s calls that failed, for whatever reason, and that failed because their time was up.",
            by_tool("error_rate", ("timeout_rate", ", timeouts")),
            percent,
            floor=0.0,
            span=0.01,
        ),
        curves(
            run,
            "Latency",
            "Seconds of a call in its tool, without waiting for a worker: median and 95th percentile. Logarithmic.",
            by_tool("latency_median_s", ("latency_p95_s", ", 95 %")),
            number,
            log=True,
        ),
    )


def _time(run: Run) -> list[Figure]:
    return _present(
        phases(run),
        curves(
            run,
            "Throughput",
            f"Tokens sampled, and tokens trained, for each second of their own phases.{_saving(run)}",
            [
                ("perf/rollout_tokens_per_s", "rollout, tokens/s", BLUE),
                ("perf/train_tokens_per_s", "training, tokens/s", ORANGE),
            ],
            number,
            floor=0.0,
        ),
        curves(
            run,
            "Length",
            "Tokens that the policy wrote in a rollout, on average.",
            [("length/sampled_tokens", "sampled tokens", BLUE)],
            number,
            floor=0.0,
        ),
    )


def _health(run: Run) -> list[Figure]:
    return _present(
        curves(
            run,
            "Distance from the start",
            "KL divergence, per token, from the checkpoint that the run began with.",
            [("policy/kl", "KL", BLUE)],
            number,
            floor=0.0,
        ),
        curves(
            run,
            "Entropy",
            "How undecided the policy is about its next token, in nats. A fall to 0 means that it stopped exploring.",
            [("policy/entropy", "entropy", BLUE)],
            number,
            floor=0.0,
        ),
        curves(run, "Gradient norm", "Before clipping.", [("policy/grad_norm", "norm", BLUE)], number, floor=0.0),
        curves(
            run,
            "Clipped tokens",
            "Share of trained tokens whose update was cut because their probability had already moved far enough, down "
            "or up.",
            [("policy/clip_low_fraction", "below", BLUE), ("policy/clip_high_fraction", "above", ORANGE)],
            percent,
            floor=0.0,
            span=0.01,
        ),
        curves(
            run,
            "Engine against trainer",
            "Difference of the log-probabilities that the engine sampled with and the trainer computed for the same "
            "tokens: largest, 95th percentile and mean of a step. Logarithmic.",
            [
                ("mismatch/logprob_diff_max", "largest", RED),
                ("mismatch/logprob_diff_p95", "95 %", ORANGE),
                ("mismatch/logprob_diff_mean", "mean", BLUE),
            ],
            number,
            log=True,
        ),
        curves(
            run,
            "Largest probability ratio",
            "New over old probability of a token, the step’s largest. 1 is no change.",
            [("policy/ratio_max", "ratio", BLUE)],
            "{:.3f}".format,
            floor=1.0,
            span=0.01,
        ),
    )


def _collapsed(run: Run) -> str:
    share = run.mean("resample/collapsed_rate")
    return "" if share is None else f" Over the run, {percent(share)} of the prefixes collapsed to a single call."


def _budget(run: Run) -> str:
    budget, used = run.mean("resample/budget"), run.mean("resample/continuations")
    if not budget or used is None:
        return ""
    return f" Of the {number(budget)} extra continuations that a step may have, {number(used)} were made on average."


def _saving(run: Run) -> str:
    share = run.mean("pack/shared_saving")
    return "" if share is None else f" Packed as trees, {percent(share)} of the training tokens need not be computed."


def _present(*figures: Figure | None) -> list[Figure]:
    return [figure for figure in figures if figure is not None]
