"""Seconds of a step by phase, from rooflines: what must be computed, read and sent, over what the device can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from axpo.plan.counts import Work, parameters, text_flops, training_flops, vision_flops
from axpo.plan.devices import Device
from axpo.plan.layout import Layout
from axpo.plan.memory import kv_token_bytes
from axpo.plan.shapes import Shape
from axpo.plan.workload import Workload

SLICES = 64  # of the decoding time, over which the number of live sequences falls


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of a step that every rank receives: within its node, and a rank's share of what comes from other nodes."""

    gather: float
    reduce: float
    weights: float

    @property
    def total(self) -> float:
        return self.gather + self.reduce + self.weights


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. bound: what limits decoding, 'memory' or 'compute'. concurrency: sequences that decode at once."""

    rollout: float
    resample: float
    train: float
    weights: float
    bound: str
    concurrency: int
    micro_batches: int
    exposed_communication: float
    train_flops: float
    """Model operations of a rank's training phase."""
    traffic: Traffic
    overlaps: bool

    @property
    def step(self) -> float:
        explore = self.rollout + self.resample
        return (max(explore, self.train) if self.overlaps else explore + self.train) + self.weights


def timing(shape: Shape, layout: Layout, device: Device, load: Workload) -> Timing:
    """Of one rank, which has its share of the questions."""
    share = 1 / layout.ranks
    kv = kv_token_bytes(shape, layout.itemsize)
    held = load.prompt / load.group_size + load.sampled + load.observed  # KV of a sequence, its prompt shared
    room = int(layout.kv_bytes / (kv * held)) if layout.has_engine else 0
    live = max(1, min(load.rollouts / layout.ranks, room, layout.max_batch_tokens))

    def decode(sequences: float, tokens: float, longest: float, at_once: float) -> float:
        return _decode(_step(shape, layout, device, load), sequences, tokens, longest, at_once)

    def prefill(work: Work) -> float:
        flops = text_flops(shape, work) + vision_flops(shape, work)
        return share * flops / (device.flops * device.prefill_efficiency)

    rollout = prefill(load.prompts(shape) + load.observations(shape))
    rollout += decode(load.rollouts * share, load.sampled, load.longest, live)
    resample = 0.0
    if load.continuations:
        mine = load.continuations * share
        longest = min(2 * load.resampled, load.longest)
        resample = prefill(load.resampled_observations(shape)) + decode(mine, load.resampled, longest, min(live, mine))
    flops, train, batches, exposed, traffic = _train(shape, layout, device, load.training(shape) * share)
    step = _step(shape, layout, device, load)
    return Timing(
        rollout if layout.has_engine else 0.0,
        resample if layout.has_engine else 0.0,
        train,
        _collective(traffic.weights, layout, device) + _copy_weights(shape, layout, device),
        step(live)[1],
        int(live),
        batches,
        exposed,
        flops,
        traffic,
        layout.overlaps,
    )


def _step(shape: Shape, layout: Layout, device: Device, load: Workload) -> Callable[[float], tuple[float, str]]:
    """Seconds of one engine step by the number of sequences that it decodes, and what bounds it."""
    weights = parameters(shape).decoded
    kv = kv_token_bytes(shape, layout.itemsize)
    own = (load.sampled + load.observed) / 2  # half-way, in the mean

    def step(count: float) -> tuple[float, str]:
        context = own + load.prompt / load.group_size
        read = weights * layout.itemsize + count * context * kv
        memory = read / (device.bandwidth * device.bandwidth_efficiency)
        work = Work(tokens=count, pairs=count * (own + load.prompt), predicted=count)
        compute = text_flops(shape, work) / (device.flops * device.prefill_efficiency)
        host = device.step_s + device.token_s * count
        return max(memory, compute) + host, "memory" if memory > compute else "compute"

    return step


def _decode(
    step: Callable[[float], tuple[float, str]], sequences: float, tokens: float, longest: float, live: float
) -> float:
    """Sequences whose lengths are spread evenly around `tokens`, up to `longest`; `live` run at once while others wait.

    While some wait, all places are taken; then the live ones fall evenly to none.
    """
    waiting = max(0.0, sequences - live)
    full = waiting * tokens / live * step(live)[0]
    shortest = max(0.0, 2 * tokens - longest)
    tail = shortest * step(live)[0]
    spread = longest - shortest
    tail += sum(spread / SLICES * step(live * (1 - (i + 0.5) / SLICES))[0] for i in range(SLICES))
    return full + tail


def _train(shape: Shape, layout: Layout, device: Device, work: Work) -> tuple[float, float, int, float, Traffic]:
    """(model operations, seconds, micro-batches, seconds of communication that are not hidden, traffic) of a rank."""
    count, size, shards = parameters(shape), layout.itemsize, layout.shards
    batches = max(1, -int(-work.tokens // layout.micro_batch_tokens))
    reference = layout.reference != "none"
    text, vision = text_flops(shape, work), vision_flops(shape, work)
    again = {"none": 0.0, "selective": 0.05, "full": 1.0}[layout.checkpointing]
    model = training_flops(shape, work, freeze_vision=layout.freeze_vision)
    done = model + reference * (text + vision) + again * (text + (0.0 if layout.freeze_vision else vision))
    compute = done / (device.flops * device.train_efficiency)
    part = (shards - 1) / shards
    trained = count.total - (count.vision if layout.freeze_vision else 0)
    gather = batches * size * count.total * part * (2 + reference)
    reduce = batches * 4 * trained * part
    if layout.replicas > 1:  # of the shards, over the replicas, after the last micro-batch
        reduce += 2 * 4 * trained / shards * (layout.replicas - 1) / layout.replicas
    if layout.reference == "cpu":
        compute += batches * 4 * count.total / shards / device.host_link
    traffic = Traffic(gather, reduce, size * count.total * part if layout.has_engine and not layout.aliased else 0.0)
    sent = _collective(gather + reduce, layout, device)
    exposed = max(0.0, sent - compute)
    update = 28 * trained / shards / (device.bandwidth * device.bandwidth_efficiency)
    if layout.optimizer_offload:
        update += 16 * trained / shards / device.host_link
    return model, compute + exposed + update, batches, exposed, traffic


def _collective(received: float, layout: Layout, device: Device) -> float:
    """Seconds in which every rank receives so many bytes: by the links of a node, or by its share of the network."""
    if layout.ranks == 1 or received == 0:
        return 0.0
    within = received / (device.link * device.link_efficiency)
    if layout.shards <= layout.ranks_per_node or layout.nodes == 1:
        return within
    between = received * (layout.nodes - 1) / layout.nodes / (layout.ranks_per_node * device.network)
    return max(within, between / device.link_efficiency)


def _copy_weights(shape: Shape, layout: Layout, device: Device) -> float:
    """Gathered weights into the engine's own, read and written once."""
    if not layout.has_engine or layout.aliased:
        return 0.0
    return 2 * layout.itemsize * parameters(shape).total / (device.bandwidth * device.bandwidth_efficiency)
