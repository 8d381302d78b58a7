"""Trains a policy with GRPO or AXPO: `torchrun -m axpo.train [recipe] [--section.field value …]`.

The loop reads in the order of the paper: roll out, trigger and rank, resample, credit, update.
"""

from typing import TYPE_CHECKING

from axpo.cli import exit_with, load_config
from axpo.config import Config

if TYPE_CHECKING:
    from axpo.inputs import Inputs
    from axpo.rundir import RunDir


def main() -> None:
    config = load_config(Config, prog="axpo.train", recipe="mini")
    # The configuration is right; only now the modules that take seconds to import.
    from axpo import distributed
    from axpo.inputs import check_inputs
    from axpo.rundir import continue_from, open_run_dir

    distributed.initialise(distributed.device())
    try:
        inputs = check_inputs(config)
        run = open_run_dir(config, rank=distributed.rank())
    except (ValueError, OSError) as error:
        exit_with("axpo.train", error)
    distributed.barrier()
    train(config, inputs, continue_from(run.path))
    distributed.finish()


def train(config: Config, inputs: "Inputs", directory: "RunDir") -> None:
    """Runs to `run.steps` from wherever the run directory stands, then exports, evaluates and reports."""
    from axpo.advantage import assign_credit
    from axpo.diagnostics import exploration_metrics, packing_metrics, rank_metrics, resample_metrics, rollout_metrics
    from axpo.distributed import gather_objects
    from axpo.explore import StepAhead
    from axpo.packing import pack_trees
    from axpo.resample import find_candidates
    from axpo.run import Run
    from axpo.tree import build_trees

    algo = config.algo
    with Run(config, inputs, directory) as state, StepAhead(state.explore) as ahead:
        learner, spans = state.learner, state.spans
        state.evaluate_before()
        for step in range(state.step + 1, config.run.steps + 1):
            with spans("rollout"):
                # Rollouts; all-wrong tool-using subgroups; the least confident call of each, breadth before depth;
                # continuations of it. Each starts as soon as it can.
                explored = ahead.result(step)
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
                if not ahead.running:
                    state.release_kv()

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
                batches = pack_trees(trees, config.train.micro_batch_tokens, learner.flops)
                metrics = learner.step(batches)

            if not ahead.running:
                with spans("weights"):
                    state.push_weights()

            with spans("log"):
                record = state.gather(groups, resamples)
                packed = gather_objects([[(batch.num_tokens, learner.flops(batch)) for batch in batches]])
                metrics |= rollout_metrics(record.groups)
                metrics |= packing_metrics(record.trajectories, packed, config.train.micro_batch_tokens)
                if explored.budget:
                    candidates = gather_objects(find_candidates(groups))
                    metrics |= resample_metrics(record.groups, record.resamples, explored.budget)
                    metrics |= rank_metrics(candidates)
                metrics |= exploration_metrics(explored)
            state.finish_step(step, record, metrics)
        state.finish_run()


if __name__ == "__main__":
    main()
