"""Exact parameter counts of a shape, and the floating-point operations of its passes."""

from __future__ import annotations

from dataclasses import dataclass

from axpo.plan.shapes import Shape, TextShape, VisionShape


@dataclass(frozen=True, slots=True)
class Parameters:
    """embedding: V·H. layer: one decoder layer. norm: the last one. vision: the tower, made of `depth` vision_blocks
    and a rest. head: V·H, 0 where it is the embedding."""

    embedding: int
    layer: int
    layers: int
    norm: int
    vision: int
    vision_block: int
    depth: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.layer * self.layers + self.norm + self.vision + self.head

    @property
    def root(self) -> int:
        """Of FSDP's root group: what is neither a decoder layer nor the vision tower."""
        return self.embedding + self.norm + self.head

    @property
    def largest_group(self) -> int:
        """Of FSDP's groups below the root: a decoder layer, a vision block, or what is left of the tower."""
        return max(self.layer, self.vision_block, self.vision - self.depth * self.vision_block)

    @property
    def decoded(self) -> int:
        """Read for every decoded token: layers, last norm and LM head; of the embedding one row, which is nothing."""
        return self.layer * self.layers + self.norm + (self.head or self.embedding)


def parameters(shape: Shape) -> Parameters:
    text = shape.text
    head = 0 if text.tied else text.vocabulary * text.hidden
    embedding, layer, tower = text.vocabulary * text.hidden, _layer_parameters(text), shape.vision
    if tower is None:
        return Parameters(embedding, layer, text.layers, text.hidden, 0, 0, 0, head)
    block = _block_parameters(tower)
    vision = tower.depth * block + _other_tower_parameters(tower)
    return Parameters(embedding, layer, text.layers, text.hidden, vision, block, tower.depth, head)


def _layer_parameters(text: TextShape) -> int:
    attention = text.hidden * (text.q_width + 2 * text.kv_width) + text.q_width * text.hidden
    biases = (text.q_width + 2 * text.kv_width + text.hidden) if text.bias else 0
    norms = 2 * text.hidden + 2 * text.head_dim  # two of the stream, one each of a head's query and key
    return attention + biases + norms + 3 * text.hidden * text.intermediate


def _block_parameters(vision: VisionShape) -> int:
    hidden, inner = vision.hidden, vision.intermediate
    attention = (3 * hidden * hidden + 3 * hidden) + (hidden * hidden + hidden)
    return 4 * hidden + attention + 2 * hidden * inner + inner + hidden


def _other_tower_parameters(vision: VisionShape) -> int:
    hidden, merged = vision.hidden, vision.merged
    embed = vision.patch_dim * hidden + hidden + vision.positions * hidden
    projections = merged * merged + merged + merged * vision.out_hidden + vision.out_hidden
    return embed + (projections + 2 * hidden) + vision.levels * (projections + 2 * merged)


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass over packed tokens computes, summed over whatever it describes.

    tokens: through the decoder layers. pairs: (query, visible key) pairs, a token and itself among them; in a packed
    tree Σ_t subtree_end[t] − t. predicted: tokens through the LM head. patches: through the vision tower.
    patch_pairs: Σ patches² of the frames.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    predicted: float = 0.0
    patches: float = 0.0
    patch_pairs: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.predicted + other.predicted,
            self.patches + other.patches,
            self.patch_pairs + other.patch_pairs,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(
            self.tokens * factor,
            self.pairs * factor,
            self.predicted * factor,
            self.patches * factor,
            self.patch_pairs * factor,
        )


def text_flops(shape: Shape, work: Work) -> float:
    """One forward pass of the language model: 2 operations a weight and token, 4·heads·head_dim a pair and layer."""
    text = shape.text
    weights = text.hidden * (2 * text.q_width + 2 * text.kv_width) + 3 * text.hidden * text.intermediate
    layers = text.layers * (2.0 * weights * work.tokens + 4.0 * text.q_width * work.pairs)
    return layers + 2.0 * text.hidden * text.vocabulary * work.predicted


def vision_flops(shape: Shape, work: Work) -> float:
    """One forward pass of the vision tower."""
    vision = shape.vision
    if vision is None:
        return 0.0
    block = 2.0 * (4 * vision.hidden**2 + 2 * vision.hidden * vision.intermediate)
    mergers = (1 + vision.levels) * 2.0 * (vision.merged**2 + vision.merged * vision.out_hidden) / vision.merge**2
    each = 2.0 * vision.patch_dim * vision.hidden + vision.depth * block + mergers
    return each * work.patches + 4.0 * vision.hidden * vision.depth * work.patch_pairs


def training_flops(shape: Shape, work: Work, *, freeze_vision: bool = False) -> float:
    """Model operations of an update over `work`: a forward pass and a backward one of twice as many.

    A frozen tower has no backward pass. The reference policy's forward and what activation checkpointing computes again
    are not counted: they take time, and so lower the MFU.
    """
    return 3 * text_flops(shape, work) + (1 if freeze_vision else 3) * vision_flops(shape, work)
