"""A small vision tower's weights as the C++ step reads them: packed once for every version of the weights."""

import torch
from torch import Tensor, nn

from engine.models.vision import PatchMerger, VisionBlock, VisionFeatures, VisionTower
from kernels.packed import PANEL, can_pack_tensors, pack_bias, pack_panels, packed_vision

BLOCK_BYTES = 4 << 20
"""Of a block's weights, as LAYER_BYTES of a decoder layer."""


class PackedVision:
    """`VisionTower` for inference in fp32 on the CPU, where `serves` says so: the same function, other bits."""

    def __init__(self, tower: VisionTower):
        self.tower = tower
        self.release()

    @staticmethod
    def serves(tower: VisionTower) -> bool:
        config = tower.config
        parameters = list(tower.blocks[0].parameters())
        whole = config.hidden_size % PANEL == 0 and config.intermediate_size % PANEL == 0
        even = config.hidden_size // config.num_heads % 2 == 0
        small = sum(parameter.nbytes for parameter in parameters) <= BLOCK_BYTES
        return whole and even and small and can_pack_tensors(*parameters)

    def release(self) -> None:
        """Gives the packed weights back; they are packed anew when they are next used, with what they are then."""
        self._weights: list[Tensor] = []
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights held now."""
        return sum(weight.nbytes for weight in self._weights)

    @torch.no_grad()
    def _pack(self) -> list[Tensor]:
        if self._weights:
            return self._weights
        tower = self.tower
        patch = tower.patch_embed.proj
        assert patch.bias is not None
        weights = [pack_panels(patch.weight.flatten(1)), pack_bias(patch.bias)]
        for block in tower.blocks:
            assert isinstance(block, VisionBlock)
            weights += [*_norm(block.norm1), *_linear(block.attn.qkv), *_linear(block.attn.proj)]
            weights += [*_norm(block.norm2), *_linear(block.mlp.linear_fc1), *_linear(block.mlp.linear_fc2)]
        levels = tower.config.deepstack_visual_indexes
        in_order = [tower.deepstack_merger_list[levels.index(level)] for level in sorted(levels)]
        for merger in (tower.merger, *in_order):
            assert isinstance(merger, PatchMerger)
            weights += [*_norm(merger.norm), *_linear(merger.linear_fc1), *_linear(merger.linear_fc2)]
        self._weights = weights
        return weights

    def __call__(self, pixel_values: Tensor, grid_thw: list[tuple[int, int, int]]) -> VisionFeatures:
        """pixel_values [P, patch_dim] -> features of P / merge² tokens."""
        config = self.tower.config
        frames = [(height, width) for time, height, width in grid_thw for _ in range(time)]
        out = packed_vision(
            pixel_values,
            torch.tensor([height * width for height, width in frames]),
            [table for frame in frames for table in self._table(frame)],
            self._pack(),
            sorted(config.deepstack_visual_indexes),
            config.depth,
            config.num_heads,
            config.spatial_merge_size**2,
            config.out_hidden_size,
            1e-6,
        )
        return VisionFeatures(out[0], tuple(out[1:]))

    def _table(self, frame: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        if frame not in self._tables:
            self._tables[frame] = self.tower.tables(*frame, torch.device("cpu"))
        return self._tables[frame]


def _linear(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return pack_panels(linear.weight), pack_bias(linear.bias)


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    return norm.weight.detach().clone(), norm.bias.detach().clone()
