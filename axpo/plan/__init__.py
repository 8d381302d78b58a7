"""What a run needs and how long a step takes, before anything is rented or loaded: `python -m axpo.plan`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from axpo.config import Config, SftConfig
from axpo.plan.counts import Parameters, parameters
from axpo.plan.devices import Device
from axpo.plan.layout import Layout, layout
from axpo.plan.memory import Memory, kv_token_bytes, memory
from axpo.plan.shapes import Shape, model_shape
from axpo.plan.timing import Timing, timing
from axpo.plan.workload import Workload, assumed, assumed_sft

GIB = 2**30
SMALLEST_BATCH = 2048  # tokens of a micro-batch; shorter ones leave a GPU idle


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything of one recipe on one kind and number of devices. changes: (--field, value) with which it would fit."""

    shape: Shape
    layout: Layout
    device: Device
    load: Workload
    parameters: Parameters
    memory: Memory
    timing: Timing
    changes: list[tuple[str, str]]
    warnings: list[str]

    @property
    def fits(self) -> bool:
        return self.memory.free >= 0

    @property
    def kv_tokens(self) -> int:
        return self.layout.kv_bytes // kv_token_bytes(self.shape, self.layout.itemsize)

    @property
    def sequences(self) -> int:
        """That the KV cache of a rank holds at the workload's mean lengths, prompts shared by their groups."""
        load = self.load
        return int(self.kv_tokens / (load.prompt / load.group_size + load.sampled + load.observed))

    @property
    def mfu(self) -> float:
        return self.timing.train_flops / self.timing.train / self.device.flops


def make_plan(
    config: Config | SftConfig, device: Device, ranks: int, nodes: int = 1, load: Workload | None = None
) -> Plan:
    """Raises ValueError for a model whose shape is unknown, and for numbers that do not divide."""
    shape = model_shape(config.model.path)
    on_gpu = device.name != "cpu"
    where = layout(config, ranks, nodes, on_gpu=on_gpu)
    if load is None:
        load = assumed_sft(config, shape, {}) if isinstance(config, SftConfig) else assumed(config, shape, {})
    used = memory(shape, where, device, load)
    changes = [] if used.free >= 0 else _changes(config, shape, device, where, load)
    plan = Plan(shape, where, device, load, parameters(shape), used, timing(shape, where, device, load), changes, [])
    plan.warnings.extend(_warnings(config, plan))
    return plan


def _changes(
    config: Config | SftConfig, shape: Shape, device: Device, where: Layout, load: Workload
) -> list[tuple[str, str]]:
    """The first single change that fits, or else the shortest row of them; each costs more time than the one before."""
    ranks, nodes = where.ranks, where.nodes

    def free(changed: Config | SftConfig, ranks: int, nodes: int) -> float:
        return memory(shape, layout(changed, ranks, nodes, on_gpu=where.on_gpu), device, load).free

    options: list[tuple[str, object]] = []
    if config.train.activation_checkpointing == "none":
        options.append(("train.activation_checkpointing", "selective"))
    if config.train.activation_checkpointing != "full":
        options.append(("train.activation_checkpointing", "full"))
    tokens = config.train.micro_batch_tokens // 2
    while tokens >= SMALLEST_BATCH:
        options.append(("train.micro_batch_tokens", tokens))
        tokens //= 2
    if isinstance(config, Config):
        size = config.rollout.kv_cache_bytes // 2
        least = kv_token_bytes(shape, where.itemsize) * config.rollout.max_tokens
        while size >= max(least, 2**20):
            options.append(("rollout.kv_cache_bytes", size))
            size //= 2
        if config.loss.kl_coef > 0 and where.on_gpu and not config.train.reference_offload:
            options.append(("train.reference_offload", True))
    if where.on_gpu and not config.train.optimizer_offload:
        options.append(("train.optimizer_offload", True))
    singles = [(name, value) for name, value in options if free(_with(config, name, value), ranks, nodes) >= 0]
    found = [(f"--{name}", _text(value)) for name, value in singles[:1]]
    if not found:
        changed, row = config, {}
        for name, value in options:
            changed, row[name] = _with(changed, name, value), value
            if free(changed, ranks, nodes) >= 0:
                found = [(f"--{name}", _text(value)) for name, value in row.items()]
                break
    return found


def more_devices(config: Config | SftConfig, plan: Plan) -> int | None:
    """The least multiple of the present number of devices on which the recipe fits as it is, up to 4096."""
    where = plan.layout
    for factor in (2, 4, 8, 16, 32, 64, 128, 256, 512):
        ranks, nodes = where.ranks * factor, where.nodes * factor
        if ranks > 4096:
            break
        if where.ranks_per_node < 8:
            nodes = max(1, ranks // 8)
        try:
            spread = layout(config, ranks, nodes, on_gpu=where.on_gpu)
            if memory(plan.shape, spread, plan.device, plan.load).free >= 0:
                return ranks
        except ValueError:  # its questions do not divide
            continue
    return None


def _with(config: Config | SftConfig, name: str, value: object) -> Config | SftConfig:
    section, field = name.split(".")
    changed = getattr(config, section).model_copy(update={field: value})
    return config.model_copy(update={section: changed})


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _warnings(config: Config | SftConfig, plan: Plan) -> list[str]:
    said, used, where = [], plan.memory, plan.layout
    if not plan.fits:
        phase = max(("rollout", "train"), key=used.peak)
        what = " ".join(f"{name} {value}" for name, value in plan.changes)
        more = more_devices(config, plan)
        ways = [way for way in (what, f"--gpus {more}" if more else "") if way]
        said.append(
            f"does not fit: a rank needs {used.needed / GIB:.1f} GiB in {phase}, {plan.device.name} has "
            f"{used.available / GIB:.1f} GiB beside its context; "
            + (f"set {' , or '.join(ways)}" if ways else "take a larger device or a smaller model")
        )
    if isinstance(config, Config):
        rollout, algo = config.rollout, config.algo
        continuations = algo.resamples_per_prefix if algo.resampling_ratio else 0
        longest = rollout.max_tokens + continuations * rollout.max_new_tokens
        if plan.fits and longest > where.micro_batch_tokens:
            missing = -memory(plan.shape, replace(where, micro_batch_tokens=longest), plan.device, plan.load).free
            if missing > 0:
                said.append(
                    f"a rollout with its {continuations} continuations, which are not split, may be a micro-batch of "
                    f"{longest} tokens and {missing / GIB:.1f} GiB too much; --train.optimizer_offload true, "
                    "--train.reference_offload true or a lower --rollout.max_new_tokens leave more"
                )
        if plan.kv_tokens < rollout.max_tokens:
            least = -(-kv_token_bytes(plan.shape, where.itemsize) * rollout.max_tokens // GIB) * GIB
            said.append(
                f"rollout.kv_cache_bytes = {rollout.kv_cache_bytes} holds {plan.kv_tokens} tokens, less than one "
                f"trajectory of rollout.max_tokens = {rollout.max_tokens}; set --rollout.kv_cache_bytes {least}"
            )
        if rollout.max_tokens > plan.shape.text.context:
            said.append(
                f"rollout.max_tokens = {rollout.max_tokens}: the model's context is {plan.shape.text.context}; set it "
                "to that or less"
            )
    if where.nodes > 1 and where.replicas == 1 and plan.timing.exposed_communication > 0.1 * plan.timing.train:
        said.append(
            f"{plan.timing.exposed_communication:.1f} s of training wait for other nodes; "
            f"set --train.replicas {where.nodes}, so that weights are gathered inside a node"
        )
    return said
