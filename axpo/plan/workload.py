"""How long the trajectories of a step are: assumed from a recipe's limits, given, or read from a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from axpo.config import Config, SftConfig
from axpo.plan.counts import Work
from axpo.plan.shapes import Shape
from axpo.resample import prefix_budget
from axpo.trajectory import OBSERVATION, SAMPLED, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Means over the trajectories of a step, in tokens; a step has questions · group_size rollouts.

    prompt, prompt_image: of a question, all of it and its image tokens. sampled, longest: of a rollout, in the mean and
    at most. observed, observed_image: tool responses of a rollout. continuations: resamples of a step, in groups of
    resamples_per_prefix. kept: what a continuation has in common with its source behind the prompt. resampled,
    reobserved: what it samples and observes of its own. left_out: of a source's ending, whose place in training its
    continuations take.
    """

    questions: int
    group_size: int
    prompt: float
    prompt_image: float
    sampled: float
    longest: float
    observed: float
    observed_image: float
    continuations: float
    resamples_per_prefix: int
    kept: float
    left_out: float
    resampled: float
    reobserved: float

    @property
    def rollouts(self) -> int:
        return self.questions * self.group_size

    @property
    def sampled_in_all(self) -> float:
        return self.rollouts * self.sampled + self.continuations * self.resampled

    def prompts(self, shape: Shape) -> Work:
        """Prefill of the prompts, each once."""
        return _sequence(self.prompt, 0.0, self.prompt_image, shape) * self.questions

    def observations(self, shape: Shape) -> Work:
        """Prefill of the rollouts' tool responses."""
        return _sequence(self.observed, self.prompt + self.sampled, self.observed_image, shape) * self.rollouts

    def resampled_observations(self, shape: Shape) -> Work:
        share = self.reobserved / self.observed if self.observed else 0.0
        images = share * self.observed_image
        work = _sequence(self.reobserved, self.prompt + self.sampled, images, shape)
        return work * self.continuations

    def training(self, shape: Shape) -> Work:
        """The packed trees: prompts once, rollouts and continuations behind them, sampled tokens predicted."""
        own = self.sampled + self.observed
        behind = _sequence(own, self.prompt, self.observed_image, shape) * self.rollouts
        more = self.resampled + self.reobserved
        forked = _sequence(more, self.prompt + self.kept, 0.0, shape) * self.continuations
        sources = self.continuations / self.resamples_per_prefix
        masked = _sequence(self.left_out, self.prompt + self.kept, 0.0, shape) * sources
        work = self.prompts(shape) + behind + forked + masked * -1
        return Work(work.tokens, work.pairs, self.sampled_in_all, work.patches, work.patch_pairs)


def assumed(config: Config, shape: Shape, given: dict[str, float]) -> Workload:
    """From a recipe's limits: half of the tokens that may be sampled are; of what the context has beside them a quarter
    is the prompt; three rollouts in ten observe half as much again; four tokens in five of prompts and observations are
    an image's; half of the resampling budget is used, a continuation samples half of what a rollout does, or all of it
    from the prompt, and half of the prefixes recover.

    given: other values of `prompt`, `sampled`, `observed`, `image_share`.
    """
    rollout, algo = config.rollout, config.algo
    prompt = given.get("prompt", (rollout.max_tokens - rollout.max_new_tokens) / 4)
    sampled = given.get("sampled", rollout.max_new_tokens / 2)
    uses_tools = bool(rollout.tools) and rollout.max_turns > 1
    observed = given.get("observed", 0.3 * prompt / 2 if uses_tools else 0.0)
    images = given.get("image_share", 0.8) if shape.vision else 0.0
    questions, k = rollout.questions_per_step, algo.resamples_per_prefix
    prefixes = prefix_budget(algo.resampling_ratio, questions, algo.group_size, k)
    from_prompt = algo.fork_at == "prompt"  # such sources are trained to their end
    masked = 0.0 if from_prompt else (algo.mask_failed_suffix + algo.mask_recovered_suffix) / 2
    resampled, reobserved = sampled if from_prompt else sampled / 2, min(observed / 0.3, prompt / 2)
    return Workload(
        questions=questions,
        group_size=algo.group_size,
        prompt=prompt,
        prompt_image=images * prompt,
        sampled=sampled,
        longest=max(sampled, min(2 * sampled, rollout.max_new_tokens)),
        observed=observed,
        observed_image=images * observed,
        continuations=prefixes * k / 2,
        resamples_per_prefix=k,
        kept=0.0 if from_prompt else sampled / 2,
        left_out=masked * (resampled + reobserved),
        resampled=resampled,
        reobserved=reobserved,
    )


def assumed_sft(config: SftConfig, shape: Shape, given: dict[str, float]) -> Workload:
    """Of teacher trajectories: 1024 prompt and 1024 sampled tokens, a quarter of them with 512 of observations.

    given: as for `assumed`.
    """
    prompt, sampled = given.get("prompt", 1024.0), given.get("sampled", 1024.0)
    observed = given.get("observed", 128.0)
    images = given.get("image_share", 0.8) if shape.vision else 0.0
    return Workload(
        questions=config.sft.batch_size,
        group_size=1,
        prompt=prompt,
        prompt_image=images * prompt,
        sampled=sampled,
        longest=2 * sampled,
        observed=observed,
        observed_image=images * observed,
        continuations=0.0,
        resamples_per_prefix=1,
        kept=0.0,
        left_out=0.0,
        resampled=0.0,
        reobserved=0.0,
    )


def measured(run: Path, shape: Shape) -> Workload:
    """Of a run directory, over all its steps but the first. Raises ValueError when it has no trajectories."""
    files = sorted((run / "trajectories").glob("step_*.jsonl"))
    files = files[1:] or files
    everything = [Trajectory.from_json(line) for file in files for line in file.read_text().splitlines()]
    rollouts = [t for t in everything if t.parent is None]
    resamples = [t for t in everything if t.parent is not None]
    if not rollouts:
        raise ValueError(f"--from-run {run}: no trajectories there; give a run directory, <run.dir>/<run.name>")
    groups = {(t.step, t.group) for t in rollouts}
    forks = {(t.step, t.parent): t.fork_token for t in resamples}
    endings = [t.loss_mask[forks[t.step, t.id] :] for t in rollouts if (t.step, t.id) in forks]

    def mean(trajectories: list[Trajectory], role: int) -> float:
        own = [t.roles[t.fork_token or 0 :].count(role) for t in trajectories]
        return sum(own) / len(own) if own else 0.0

    def images(trajectory: Trajectory, start: int, stop: int | None) -> int:
        return trajectory.tokens[start:stop].count(shape.image_token)

    count = len(rollouts)
    return Workload(
        questions=round(len(groups) / len(files)),
        group_size=round(count / len(groups)),
        prompt=sum(t.prompt_len for t in rollouts) / count,
        prompt_image=sum(images(t, 0, t.prompt_len) for t in rollouts) / count,
        sampled=mean(rollouts, SAMPLED),
        longest=max(t.roles.count(SAMPLED) for t in rollouts),
        observed=mean(rollouts, OBSERVATION),
        observed_image=sum(images(t, t.prompt_len, None) for t in rollouts) / count,
        continuations=len(resamples) / len(files),
        resamples_per_prefix=round(len(resamples) / max(1, len({t.parent for t in resamples}))) or 1,
        kept=sum((t.fork_token or 0) - t.prompt_len for t in resamples) / max(1, len(resamples)),
        left_out=sum(len(mask) for mask in endings if not any(mask)) / max(1, len(endings)),
        resampled=mean(resamples, SAMPLED),
        reobserved=mean(resamples, OBSERVATION),
    )


def measured_phases(run: Path) -> dict[str, float]:
    """Median seconds of the run's phases and of its steps, and of its processors; the first step left out."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = rows[1:] or rows
    names = ("rollout", "resample", "train", "weights", "step", "cpu")
    return {name: sorted(row.get(f"perf/{name}_s", 0.0) for row in rows)[len(rows) // 2] for name in names}


def _sequence(tokens: float, before: float, image_tokens: float, shape: Shape) -> Work:
    """Forward work of `tokens` that follow `before` others which are there already, with one image among them."""
    merge = shape.vision.merge if shape.vision else 0
    patches = image_tokens * merge**2
    pairs = tokens * (tokens + 1) / 2 + tokens * before
    return Work(tokens=tokens, pairs=pairs, patches=patches, patch_pairs=patches**2)
