"""Supervised fine-tuning on a teacher's trajectories: `torchrun -m axpo.sft [recipe …] [--section.field value …]`."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from axpo.cli import exit_with, load_config
from axpo.config import SftConfig

if TYPE_CHECKING:
    from axpo.heartbeat import Heartbeat
    from axpo.rundir import RunDir
    from axpo.sft_data import SftData
    from axpo.stopping import Stop


def main() -> None:
    config = load_config(SftConfig, prog="axpo.sft", recipe="mini-sft")
    # After the configuration is known to be right: these take seconds to import.
    from axpo import distributed
    from axpo.checkpoint_record import CheckpointError
    from axpo.fit import check_devices, check_fits
    from axpo.heartbeat import Heartbeat
    from axpo.learner import NonFiniteError
    from axpo.metrics import check_sinks
    from axpo.paths import model_directory
    from axpo.replay import NON_FINITE
    from axpo.rundir import RunDirError
    from axpo.sft_data import SftData
    from axpo.sharding import check_replicas
    from axpo.start import open_run
    from axpo.stopping import Stop
    from engine.weights import check_weights

    stop = Stop(config.run.time_limit_s)
    try:
        check_devices()
        device = distributed.device()
        distributed.initialise(device, config.run.timeout_s)
        source = model_directory(config.model.path)
        if not config.sft.from_scratch:
            check_weights(source)
        check_replicas(config.train.replicas)
        check_fits(config, device)
        check_sinks(config.log)
        dataset = SftData(source, config, distributed.rank(), distributed.world_size())
        run = open_run(config, dataset.fingerprint)
    except (ValueError, OSError) as error:
        exit_with("axpo.sft", error)
    try:
        with Heartbeat(run.ranks, "axpo.sft") as heartbeat:
            tune(config, source, dataset, run, stop, heartbeat)
    except (CheckpointError, RunDirError) as error:
        exit_with("axpo.sft", error)
    except NonFiniteError as error:
        exit_with("axpo.sft", error, NON_FINITE)
    distributed.finish()


def tune(
    config: SftConfig, source: Path, dataset: "SftData", run: "RunDir", stop: "Stop", heartbeat: "Heartbeat"
) -> None:
    """Runs to `run.steps` from wherever the run directory stands, then exports; or saves when it is asked to stop."""
    import torch

    from axpo.checkpoint import export_policy
    from axpo.distributed import all_reduce, rank
    from axpo.distributed import device as this_device
    from axpo.heartbeat import TracedSpans
    from axpo.learner import Learner
    from axpo.lifecycle import Lifecycle
    from axpo.metrics import MetricsLogger
    from axpo.packing import pack_trees
    from axpo.telemetry import Telemetry

    device = this_device()
    learner = Learner(
        source,
        dtype=getattr(torch, config.model.dtype),
        device=device,
        optim=config.optim,
        total_steps=config.run.steps,
        scratch_seed=config.run.seed if config.sft.from_scratch else None,
        train=config.train,
    )
    life = Lifecycle(config, run, learner, stop, heartbeat)
    log = MetricsLogger(
        run,
        steps=config.run.steps,
        rank=rank(),
        tensorboard=config.log.tensorboard,
        console=config.log.console,
        wandb=config.log.wandb_project if config.log.wandb else "",
        columns=(("loss", "policy/loss", "{:.3f}"), ("s/step", "perf/step_s", "{:.2f}")),
    )
    spans = TracedSpans(heartbeat, torch.cuda.synchronize if device.type == "cuda" else None)
    telemetry = Telemetry(device)
    with log:
        for step in life.steps():
            with spans("data"):
                batches = pack_trees(dataset.batch(step), config.train.micro_batch_tokens, learner.flops)
            with spans("train"):
                metrics = learner.sft_step(batches)
            every = config.sft.heldout_every
            if config.sft.heldout_examples and (step in (1, config.run.steps) or (every and step % every == 0)):
                with spans("heldout"):
                    rows = pack_trees(dataset.heldout(), config.train.micro_batch_tokens, learner.flops)
                    metrics["heldout/loss"] = learner.sft_loss(rows)
            seconds = spans.metrics()
            flops = all_reduce(sum(map(learner.flops, batches)), device)
            log.log(step, metrics | telemetry.metrics(seconds, flops) | seconds)
            life.advance(config.sft.batch_size)
            if life.save_due:
                with spans("checkpoint"):
                    life.save()
            if life.stopping():
                return life.save_and_stop()
    life.wait()
    export_policy(learner, source, run.policy, getattr(torch, config.sft.policy_dtype))
    if config.sft.export and rank() == 0:
        for file in run.policy.iterdir():
            shutil.copy2(file, Path(config.sft.export) / file.name)


if __name__ == "__main__":
    main()
