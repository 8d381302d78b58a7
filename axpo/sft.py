"""Supervised fine-tuning on a teacher's trajectories: `torchrun -m axpo.sft [recipe] [--section.field value …]`."""

import shutil
from pathlib import Path

from axpo.cli import exit_with, load_config
from axpo.config import SftConfig


def main() -> None:
    config = load_config(SftConfig, prog="axpo.sft", recipe="mini-sft")
    # After the configuration is known to be right: these take seconds to import.
    import torch

    from axpo import distributed
    from axpo.checkpoint import Progress, export_policy, latest, load_checkpoint, save_checkpoint
    from axpo.fit import check_devices, check_fits
    from axpo.learner import Learner
    from axpo.metrics import MetricsLogger, Spans, check_sinks
    from axpo.packing import pack_trees
    from axpo.paths import model_directory
    from axpo.rundir import continue_from, open_run_dir
    from axpo.sft_data import SftData
    from axpo.sharding import check_replicas
    from axpo.telemetry import Telemetry
    from engine.weights import check_weights

    try:
        check_devices()
        device = distributed.device()
        distributed.initialise(device)
        source = model_directory(config.model.path)
        if not config.sft.from_scratch:
            check_weights(source)
        check_replicas(config.train.replicas)
        check_fits(config, device)
        check_sinks(config.log)
        dataset = SftData(source, config, distributed.rank(), distributed.world_size())
        run = open_run_dir(config, rank=distributed.rank())
    except (ValueError, OSError) as error:
        exit_with("axpo.sft", error)
    distributed.barrier()
    run = continue_from(run.path)
    learner = Learner(
        source,
        dtype=getattr(torch, config.model.dtype),
        device=device,
        optim=config.optim,
        total_steps=config.run.steps,
        scratch_seed=config.run.seed if config.sft.from_scratch else None,
        train=config.train,
    )
    checkpoints = run.path / "checkpoints"
    start = load_checkpoint(found, learner).step if (found := latest(checkpoints)) else 0
    log = MetricsLogger(
        run,
        steps=config.run.steps,
        rank=distributed.rank(),
        tensorboard=config.log.tensorboard,
        console=config.log.console,
        wandb=config.log.wandb_project if config.log.wandb else "",
        columns=(("loss", "policy/loss", "{:.3f}"), ("s/step", "perf/step_s", "{:.2f}")),
    )
    spans = Spans(torch.cuda.synchronize if device.type == "cuda" else None)
    telemetry = Telemetry(device)
    with log:
        for step in range(start + 1, config.run.steps + 1):
            with spans("data"):
                batches = pack_trees(dataset.batch(step), config.train.micro_batch_tokens, learner.flops)
            with spans("train"):
                metrics = learner.sft_step(batches)
            if step == config.run.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                with spans("checkpoint"):
                    progress = Progress(step, step * config.sft.batch_size)
                    save_checkpoint(checkpoints, learner, progress, config.checkpoint.keep)
            seconds = spans.metrics()
            flops = distributed.all_reduce(sum(map(learner.flops, batches)), device)
            log.log(step, metrics | telemetry.metrics(seconds, flops) | seconds)
    export_policy(learner, source, run.policy)
    if config.sft.export and distributed.rank() == 0:
        for file in run.policy.iterdir():
            shutil.copy2(file, Path(config.sft.export) / file.name)
    distributed.finish()


if __name__ == "__main__":
    main()
