"""Trains a policy with GRPO or AXPO: `torchrun -m axpo.train [recipe] [--section.field value …]`.

The loop reads in the order of the paper: roll out, trigger and rank, resample, credit, update.
"""

from typing import TYPE_CHECKING

from axpo.cli import exit_with, load_config
from axpo.config import Config

if TYPE_CHECKING:
    from axpo.heartbeat import Heartbeat
    from axpo.inputs import Inputs
    from axpo.rundir import RunDir
    from axpo.stopping import Stop


def main() -> None:
    config = load_config(Config, prog="axpo.train", recipe="mini")
    # The configuration is right; only now the modules that take seconds to import.
    from axpo import distributed
    from axpo.checkpoint_record import CheckpointError
    from axpo.heartbeat import Heartbeat
    from axpo.inputs import check_inputs
    from axpo.rundir import RunDirError
    from axpo.start import open_run
    from axpo.stopping import Stop
    from axpo.tasks import fingerprint

    stop = Stop(config.run.time_limit_s)
    try:
        distributed.initialise(distributed.device(), config.run.timeout_s)
        inputs = check_inputs(config)
        run = open_run(config, lambda: fingerprint(inputs.task))
    except (ValueError, OSError) as error:
        exit_with("axpo.train", error)
    try:
        with Heartbeat(run.ranks, "axpo.train") as heartbeat:
            train(config, inputs, run, stop, heartbeat)
    except (CheckpointError, RunDirError) as error:
        exit_with("axpo.train", error)
    distributed.finish()


def train(config: Config, inputs: "Inputs", directory: "RunDir", stop: "Stop", heartbeat: "Heartbeat") -> None:
    """Runs to `run.steps` from wherever the run directory stands, then exports, evaluates and reports.

    Asked to stop, it leaves the rollouts of the step in flight, or ends its update, and saves the last whole step.
    """
    from axpo.advantage import assign_credit
    from axpo.diagnostics import packing_metrics, rank_metrics, resample_metrics, rollout_metrics
    from axpo.distributed import gather_objects, rank, world_size
    from axpo.resample import find_candidates, prefix_budget, select_prefixes
    from axpo.rollout import Limits
    from axpo.run import Run
    from axpo.tree import build_trees, pack_trees

    algo, rollout = config.algo, config.rollout
    limits = Limits(
        max_turns=rollout.max_turns,
        max_new_tokens=rollout.max_new_tokens,
        max_tokens=rollout.max_tokens,
        temperature=rollout.temperature,
    )
    prefixes = prefix_budget(
        algo.resampling_ratio, rollout.questions_per_step, algo.group_size, algo.resamples_per_prefix
    )
    with Run(config, inputs, directory, stop, heartbeat) as state:
        agent, learner, spans = state.agent, state.learner, state.spans
        state.evaluate_before()
        for step in state.life.steps():
            with spans("rollout"):
                questions = state.questions()[rank() :: world_size()]
                branches = agent.rollouts(step, questions, algo.group_size, limits)
                if state.life.stopping():
                    return state.life.save_and_stop()
                groups = [[agent.trajectory(branch, step) for branch in group] for group in branches]

            with spans("resample"):
                # All-wrong tool-using subgroups, over all ranks; the least confident call first, breadth before depth.
                candidates = gather_objects(find_candidates(groups))
                selected = select_prefixes(
                    candidates,
                    prefixes,
                    rank=algo.rank,
                    question_order=algo.question_order,
                    seed=config.run.seed,
                    step=step,
                )
                sources = {branch.id: branch for group in branches for branch in group}
                continued = agent.resample(
                    step, [c for c in selected if c.source in sources], sources, algo.resamples_per_prefix, limits
                )
                if state.life.stopping():
                    return state.life.save_and_stop()
                resamples = {source: [agent.trajectory(b, step) for b in bs] for source, bs in continued.items()}

            with spans("credit"):
                assign_credit(
                    groups,
                    resamples,
                    eps=algo.std_eps,
                    prefix_reward=algo.prefix_reward,
                    mask_failed_suffix=algo.mask_failed_suffix,
                )
                agent.close([*sources.values(), *(b for bs in continued.values() for b in bs)])

            with spans("train"):
                trees = [
                    tree
                    for group in groups
                    for tree in build_trees(
                        group,
                        resamples,
                        agent.llm.config.image_token_id,
                        aggregation=config.loss.aggregation,
                        budget=config.train.micro_batch_tokens,
                    )
                ]
                batches = pack_trees(trees, config.train.micro_batch_tokens)
                metrics = learner.step(batches)

            with spans("weights"):
                state.push_weights()

            with spans("log"):
                record = state.gather(groups, resamples)
                packed = sum(gather_objects([batch.num_tokens for batch in batches]))
                metrics |= rollout_metrics(record.groups) | packing_metrics(record.trajectories, packed)
                if prefixes:
                    budget = prefixes * algo.resamples_per_prefix
                    metrics |= resample_metrics(record.groups, record.resamples, budget) | rank_metrics(candidates)
            state.finish_step(step, record, metrics)
            if state.life.stopping():
                return state.life.save_and_stop()
        state.finish_run()


if __name__ == "__main__":
    main()
