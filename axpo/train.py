"""Trains a policy with GRPO or AXPO: `torchrun -m axpo.train [recipe …] [--section.field value …]`.

The loop reads in the order of the paper: roll out, trigger and rank, resample, credit, update.
"""

from functools import partial
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
    from axpo.fit import check_devices
    from axpo.heartbeat import Heartbeat
    from axpo.inputs import check_inputs
    from axpo.learner import NonFiniteError
    from axpo.replay import NON_FINITE, replay
    from axpo.rundir import RunDirError
    from axpo.start import open_run
    from axpo.stopping import Stop
    from axpo.tasks import fingerprint

    if config.debug.replay:
        raise SystemExit(replay(config.debug.replay))
    stop = Stop(config.run.time_limit_s)
    try:
        check_devices()
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
    except NonFiniteError as error:
        exit_with("axpo.train", error, NON_FINITE)
    distributed.finish()


def train(config: Config, inputs: "Inputs", directory: "RunDir", stop: "Stop", heartbeat: "Heartbeat") -> None:
    """Runs to `run.steps` from wherever the run directory stands, then exports, evaluates and reports.

    Asked to stop, it gives up the rollouts of the step in flight, or ends its update, and saves the last whole step.
    """
    from axpo.advantage import advantage_std, assign_credit, shaped_reward
    from axpo.diagnostics import (
        exploration_metrics,
        packing_metrics,
        rank_metrics,
        resample_metrics,
        rollout_metrics,
        tool_metrics,
    )
    from axpo.distributed import gather_objects
    from axpo.explore import StepAhead
    from axpo.packing import pack_trees
    from axpo.run import Run
    from axpo.tree import build_trees

    algo, rollout = config.algo, config.rollout
    shape = partial(
        shaped_reward,
        max_new_tokens=rollout.max_new_tokens,
        buffer=algo.overlong_buffer,
        penalty=algo.overlong_penalty,
        tool_reward=algo.tool_reward,
    )
    with Run(config, inputs, directory, stop, heartbeat) as state, StepAhead(state.explore) as ahead:
        learner, spans = state.learner, state.spans
        state.evaluate_before()
        for step in state.life.steps():
            with spans("rollout"):
                # Rollouts; all-wrong tool-using subgroups; the least confident call of each, breadth before depth;
                # continuations of it (an ablation may take others). Each starts as soon as it can.
                explored = state.unless_stopped(ahead.result, step)
                if explored is None:
                    return state.life.save_and_stop()
                groups, resamples = explored.groups, explored.resamples
            spans.move("rollout", "resample", explored.seconds[1])

            if rollout.overlap and not state.evaluates_after(step):
                with spans("weights"):
                    state.push_weights()  # of the update before this one
                ahead.begin(step + 1)

            with spans("credit"):
                sampled = [t for group in [*groups, *resamples.values()] for t in group]
                rewards = gather_objects([shape(t) for t in sampled])
                assign_credit(
                    groups,
                    resamples,
                    eps=algo.std_eps,
                    std=advantage_std(algo.advantage_scale, rewards, algo.std_eps),
                    shape=shape,
                    prefix_reward=algo.prefix_reward,
                    mask_failed_suffix=algo.mask_failed_suffix,
                    mask_recovered_suffix=algo.mask_recovered_suffix,
                    merge=algo.merge_continuations,
                    drop_equal=algo.drop_equal_groups,
                )
                if not ahead.running:
                    state.release_kv()

            with spans("train"):
                parts = [[] for _ in range(config.train.minibatches)]
                for group in groups:
                    part = group[0].group * config.train.minibatches // rollout.questions_per_step
                    parts[part] += build_trees(
                        group,
                        resamples,
                        learner.config.image_token_id,
                        aggregation=config.loss.aggregation,
                        budget=config.train.micro_batch_tokens,
                    )
                minibatches = [pack_trees(trees, config.train.micro_batch_tokens, learner.flops) for trees in parts]
                metrics = learner.step(*minibatches)

            if not ahead.running:
                with spans("weights"):
                    state.push_weights()

            with spans("log"):
                record = state.gather(groups, resamples)
                packed = gather_objects(
                    [[(row.num_tokens, learner.flops(row)) for rows in minibatches for row in rows]]
                )
                metrics |= rollout_metrics(record.groups)
                metrics |= tool_metrics(record.trajectories)
                metrics |= packing_metrics(record.trajectories, packed, config.train.micro_batch_tokens)
                if explored.budget:
                    metrics |= resample_metrics(record.groups, record.resamples, explored.budget, algo.trigger)
                    metrics |= rank_metrics(gather_objects(explored.candidates))
                metrics |= exploration_metrics(explored)
            state.finish_step(step, record, metrics)
            if state.life.stopping():
                return state.life.save_and_stop()
        state.finish_run()


if __name__ == "__main__":
    main()
