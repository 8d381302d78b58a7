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

    Asked to stop, it gives up the rollouts of the step in flight, or ends its update, and saves the last whole step.
    """
    from axpo.advantage import assign_credit
    from axpo.diagnostics import exploration_metrics, packing_metrics, rank_metrics, resample_metrics, rollout_metrics
    from axpo.distributed import gather_objects
    from axpo.explore import StepAhead
    from axpo.resample import find_candidates
    from axpo.run import Run
    from axpo.tree import build_trees, pack_trees

    algo = config.algo
    with Run(config, inputs, directory, stop, heartbeat) as state, StepAhead(state.explore) as ahead:
        learner, spans = state.learner, state.spans
        state.evaluate_before()
        for step in state.life.steps():
            with spans("rollout"):
                # Rollouts; all-wrong tool-using subgroups; the least confident call of each, breadth before depth;
                # continuations of it. Each starts as soon as it can.
                explored = state.unless_stopped(ahead.result, step)
                if explored is None:
                    return state.life.save_and_stop()
                groups, resamples = explored.groups, explored.resamples
            spans.move("rollout", "resample", explored.seconds[1])

            if config.rollout.overlap and not state.evaluates_after(step):
                with spans("weights"):
                    state.push_weights()  # of the update before this one
                ahead.begin(step + 1)

            with spans("credit"):
                assign_credit(
                    groups,
                    resamples,
                    eps=algo.std_eps,
                    prefix_reward=algo.prefix_reward,
                    mask_failed_suffix=algo.mask_failed_suffix,
                )

            with spans("train"):
                trees = [
                    tree
                    for group in groups
                    for tree in build_trees(
                        group,
                        resamples,
                        learner.config.image_token_id,
                        aggregation=config.loss.aggregation,
                        budget=config.train.micro_batch_tokens,
                    )
                ]
                batches = pack_trees(trees, config.train.micro_batch_tokens)
                metrics = learner.step(batches)

            if not ahead.running:
                with spans("weights"):
                    state.push_weights()

            with spans("log"):
                record = state.gather(groups, resamples)
                packed = sum(gather_objects([batch.num_tokens for batch in batches]))
                metrics |= rollout_metrics(record.groups) | packing_metrics(record.trajectories, packed)
                if explored.budget:
                    candidates = gather_objects(find_candidates(groups))
                    metrics |= resample_metrics(record.groups, record.resamples, explored.budget)
                    metrics |= rank_metrics(candidates)
                metrics |= exploration_metrics(explored)
            state.finish_step(step, record, metrics)
            if state.life.stopping():
                return state.life.save_and_stop()
        state.finish_run()


if __name__ == "__main__":
    main()
