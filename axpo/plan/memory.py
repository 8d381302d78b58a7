"""Bytes of one rank by kind, in the phase in which they are held (docs/plan.md derives every line)."""

from __future__ import annotations

from dataclasses import dataclass

from axpo.plan.counts import Parameters, parameters
from axpo.plan.devices import Device
from axpo.plan.layout import Checkpointing, Layout
from axpo.plan.shapes import Shape, TextShape, VisionShape
from axpo.plan.workload import Workload

ROLLOUT, TRAIN, BOTH = ("rollout",), ("train",), ("rollout", "train")
HEAD_CHUNK = 256 << 20  # kernels.linear_logprob_entropy.triton's logits, and their gradient


@dataclass(frozen=True, slots=True)
class Item:
    """`bytes` on the device while one of `phases` runs; on the host instead where `host`."""

    kind: str
    bytes: float
    phases: tuple[str, ...]
    host: bool = False


@dataclass(frozen=True, slots=True)
class Memory:
    items: list[Item]
    available: float
    """Bytes of the device, less its context."""

    def peak(self, phase: str) -> float:
        return sum(item.bytes for item in self.items if phase in item.phases and not item.host)

    @property
    def needed(self) -> float:
        return max(self.peak("rollout"), self.peak("train"))

    @property
    def host(self) -> float:
        """Bytes of main memory that a rank holds beside its device."""
        return sum(item.bytes for item in self.items if item.host)

    @property
    def free(self) -> float:
        """Negative where it does not fit."""
        return self.available - self.needed

    def of(self, kind: str) -> float:
        return sum(item.bytes for item in self.items if item.kind == kind)


def memory(shape: Shape, layout: Layout, device: Device, load: Workload) -> Memory:
    """Of one rank, in its worst moment of each phase."""
    count = parameters(shape)
    total, shards, size = count.total, layout.shards, layout.itemsize
    trained = total - (count.vision if layout.freeze_vision else 0)
    tokens = layout.micro_batch_tokens
    patches = _patches(shape, load, tokens)
    gathered = layout.ranks > 1 or size != 4
    items = [
        Item("fp32 masters", 4 * total / shards, BOTH),
        Item("optimizer", 8 * trained / shards, BOTH, host=layout.optimizer_offload and layout.on_gpu),
        Item("gradients", 4 * trained / shards, TRAIN),
        Item("gathered weights", size * _gathered(count) if gathered else 0, TRAIN),
        Item("unreduced gradients", (size + 4) * count.root if gathered else 0, TRAIN),
        Item("activations", activations(shape, layout, tokens, patches), TRAIN),
        Item("LM head workspace", _head_workspace(shape.text, tokens, size, layout.on_gpu), TRAIN),
    ]
    if layout.reference != "none":
        host = layout.reference == "cpu" and layout.on_gpu
        items.append(Item("reference policy", 4 * total / shards, BOTH, host=host))
    if layout.has_engine:
        items += [
            Item("engine weights", 0 if layout.aliased else size * total, BOTH),
            Item("KV cache", layout.kv_bytes, ROLLOUT if layout.sleeps else BOTH),
            Item(
                "engine activations",
                _step_bytes(shape.text, layout.max_batch_tokens, size),
                BOTH if layout.overlaps else ROLLOUT,
            ),
        ]
    return Memory(items, device.memory - device.context)


def _patches(shape: Shape, load: Workload, tokens: int) -> float:
    """Of a micro-batch: the workload's share of image tokens in its packed trees, at least one prompt's."""
    if shape.vision is None:
        return 0.0
    tree = load.prompt + load.group_size * (load.sampled + load.observed)
    image = load.prompt_image + load.group_size * load.observed_image
    return max(load.prompt_image, tokens * image / tree) * shape.vision.merge**2


def kv_token_bytes(shape: Shape, itemsize: int) -> int:
    """K and V of one token in all layers."""
    return 2 * shape.text.layers * shape.text.kv_width * itemsize


def activations(shape: Shape, layout: Layout, tokens: int, patches: float) -> float:
    """What autograd keeps of a micro-batch of `tokens` and `patches`, and a layer's gradients on the way back."""
    text, size, mode = shape.text, layout.itemsize, layout.checkpointing
    layer = layer_bytes(text, size)
    kept = text.layers * layer_bytes(text, size, mode) + (0 if mode == "none" else layer) + layer
    if shape.vision is None or layout.freeze_vision:
        return kept * tokens
    block = block_bytes(shape.vision, size)
    tower = shape.vision.depth * block_bytes(shape.vision, size, mode) + (0 if mode == "none" else block)
    return kept * tokens + (tower + _merger_bytes(shape.vision, size)) * patches


def layer_bytes(text: TextShape, itemsize: int, mode: Checkpointing = "none") -> int:
    """What a decoder layer keeps for its backward pass, a token.

    none: two sums, two norms, q and k before and after norm and rotary, v, attention's output and its LSE, gate, up and
    their product. selective: the sum, and outputs of products and of attention. full: its two inputs.
    """
    hidden, q, kv, inner = text.hidden, text.q_width, text.kv_width, text.intermediate
    if mode == "full":
        return itemsize * 2 * hidden
    if mode == "selective":
        return itemsize * (3 * hidden + 2 * q + 2 * kv + 2 * inner) + 4 * text.heads
    return itemsize * (4 * hidden + 3 * q + 3 * kv + 3 * inner) + 4 * text.heads


def block_bytes(vision: VisionShape, itemsize: int, mode: Checkpointing = "none") -> int:
    """What a vision block keeps, a patch.

    none: two inputs and two norms with their statistics, qkv, q and k turned, attention's output and its LSE, the MLP
    before and after GELU. selective: its input, and outputs of products and of attention. full: its input.
    """
    if mode == "full":
        return itemsize * vision.hidden
    if mode == "selective":
        return itemsize * (7 * vision.hidden + vision.intermediate) + 4 * vision.heads
    return itemsize * (10 * vision.hidden + 2 * vision.intermediate) + 4 * (4 + vision.heads)


def _merger_bytes(vision: VisionShape, itemsize: int) -> float:
    """A patch: each merger's norm, first product and GELU."""
    return itemsize * 3 * vision.hidden * (1 + vision.levels)


def _gathered(count: Parameters) -> int:
    """The root group for the whole pass, and two of the groups under it: one that computes, one that comes."""
    return count.root + 2 * count.largest_group


def _head_workspace(text: TextShape, tokens: int, itemsize: int, on_gpu: bool) -> float:
    """Predicted rows of hidden states, their fp32 gradient, and chunks of logits and of their gradient."""
    chunk = HEAD_CHUNK if on_gpu else 4 * min(tokens, 1024) * min(text.vocabulary, 4096)
    return tokens * text.hidden * (itemsize + 4) + 2 * chunk


def _step_bytes(text: TextShape, tokens: int, itemsize: int) -> float:
    """Of one engine step: the stream, one layer's projections, and fp32 logits of at most 1024 rows."""
    values = 4 * text.hidden + 2 * text.q_width + 2 * text.kv_width + 3 * text.intermediate
    return tokens * values * itemsize + 4 * min(tokens, 1024) * text.vocabulary
