"""How a run lies on its devices: ranks, shards and replicas, dtypes, what is offloaded and what is recomputed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from axpo.config import Config, SftConfig

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """ranks: one a device. shards: ranks over which a parameter is split. replicas: of the shards.

    itemsize: bytes of a value in the compute dtype. kv_bytes: of the KV cache of a rank; 0 for SFT, which has no
    engine. sleeps: the cache's memory is given to training. overlaps: the next step is rolled out meanwhile.
    reference: where the fixed policy is. aliased: the engine reads the trainer's own weights.
    """

    ranks: int
    nodes: int
    replicas: int
    itemsize: int
    on_gpu: bool
    micro_batch_tokens: int
    max_batch_tokens: int
    kv_bytes: int
    sleeps: bool
    overlaps: bool
    checkpointing: Checkpointing
    optimizer_offload: bool
    reference: Literal["none", "device", "cpu"]
    freeze_vision: bool

    @property
    def shards(self) -> int:
        return self.ranks // self.replicas

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    @property
    def has_engine(self) -> bool:
        return self.kv_bytes > 0

    @property
    def aliased(self) -> bool:
        return self.ranks == 1 and self.itemsize == 4 and not self.overlaps


def layout(config: Config | SftConfig, ranks: int, nodes: int, *, on_gpu: bool) -> Layout:
    """Of a recipe on `ranks` devices, spread evenly over `nodes`.

    Raises:
        ValueError: the ranks do not divide into nodes or replicas, or the questions not into ranks.
    """
    train = config.train
    if ranks % nodes:
        raise ValueError(f"--gpus {ranks}: not a multiple of --nodes {nodes}")
    if ranks % train.replicas:
        raise ValueError(
            f"train.replicas = {train.replicas}: not a divisor of {ranks} ranks; set --train.replicas {nodes}"
        )
    shared = Layout(
        ranks=ranks,
        nodes=nodes,
        replicas=train.replicas,
        itemsize=2 if config.model.dtype == "bfloat16" else 4,
        on_gpu=on_gpu,
        micro_batch_tokens=train.micro_batch_tokens,
        checkpointing=train.activation_checkpointing,
        optimizer_offload=train.optimizer_offload,
        freeze_vision=train.freeze_vision,
        max_batch_tokens=0,
        kv_bytes=0,
        sleeps=False,
        overlaps=False,
        reference="none",
    )
    if isinstance(config, SftConfig):
        return shared
    questions = config.rollout.questions_per_step
    if questions % ranks:
        near = max(ranks, round(questions / ranks) * ranks)
        raise ValueError(
            f"rollout.questions_per_step = {questions}: not a multiple of {ranks} ranks, which share the questions "
            f"evenly; set --rollout.questions_per_step {near}"
        )
    sleep = config.rollout.sleep_in_training
    return replace(
        shared,
        max_batch_tokens=config.rollout.max_batch_tokens,
        kv_bytes=config.rollout.kv_cache_bytes,
        sleeps=not config.rollout.overlap and (sleep == "always" or (sleep == "auto" and on_gpu)),
        overlaps=config.rollout.overlap,
        reference="none" if config.loss.kl_coef == 0 else "cpu" if train.reference_offload else "device",
    )
