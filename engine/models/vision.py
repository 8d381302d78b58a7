"""Qwen3-VL's vision tower with DeepStack, over packed patches of any number of images."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.config import VisionConfig
from engine.models.linear import Linear
from kernels import linear, rotary


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the tower says of some images: one row a language-model token.

    embeds: [N, H] replaces the image tokens' embeddings; deepstack: one [N, H] a level, added after the first layers.
    """

    embeds: Tensor
    deepstack: tuple[Tensor, ...]

    def rows(self, start: int, stop: int) -> "VisionFeatures":
        return VisionFeatures(self.embeds[start:stop], tuple(level[start:stop] for level in self.deepstack))

    @staticmethod
    def cat(parts: list["VisionFeatures"]) -> "VisionFeatures":
        levels = zip(*(part.deepstack for part in parts), strict=True)
        return VisionFeatures(torch.cat([part.embeds for part in parts]), tuple(torch.cat(level) for level in levels))


@dataclass(frozen=True, slots=True)
class VisionInput:
    """The images of a packed batch.

    token_index: [N] int64, packed positions of the image tokens, in the order of the images.
    Either raw patches (`pixel_values` [P, patch_dim], `grid_thw` [I, 3] int64 on the CPU, in patches), or `features`
    that were encoded before.
    """

    pixel_values: Tensor | None
    grid_thw: Tensor | None
    token_index: Tensor
    features: VisionFeatures | None = None


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, norm_after_merge=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, norm_after_merge=True) for _ in config.deepstack_visual_indexes
        )

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> VisionFeatures:
        """pixel_values [P, patch_dim], grid_thw [I, 3] (CPU int64) -> features of P / merge² tokens."""
        frames = [(height, width) for time, height, width in grid_thw.tolist() for _ in range(time)]
        segments = [height * width for height, width in frames]
        # Frames of one size share what depends on the size alone.
        tables = {frame: self.tables(*frame, pixel_values.device) for frame in dict.fromkeys(frames)}
        positions, cos, sin = (torch.cat([tables[frame][i] for frame in frames]) for i in range(3))
        x = self.patch_embed(pixel_values)
        x = x + positions.to(x.dtype)
        deepstack, levels = [], self.config.deepstack_visual_indexes
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, segments)
            if index in levels:
                deepstack.append(self.deepstack_merger_list[levels.index(index)](x))
        return VisionFeatures(self.merger(x), tuple(deepstack))

    def tables(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of a frame of height x width patches: learned positions [P, hidden], and cos, sin [P, head_dim / 2]."""
        rows, cols = (axis.to(device) for axis in frame_layout(height, width, self.config.spatial_merge_size))
        return self._positions(rows, cols, height, width), *self._rope(rows, cols)

    def _positions(self, rows: Tensor, cols: Tensor, height: int, width: int) -> Tensor:
        """Learned position table resampled bilinearly (corners aligned) to a frame's own grid: [P, hidden]."""
        side = int(self.config.num_position_embeddings**0.5)
        y = rows * (side - 1) / max(height - 1, 1)
        x = cols * (side - 1) / max(width - 1, 1)
        y0, x0 = y.floor().long(), x.floor().long()
        y1, x1 = (y0 + 1).clamp(max=side - 1), (x0 + 1).clamp(max=side - 1)
        fy, fx = (y - y0)[:, None], (x - x0)[:, None]
        table = self.pos_embed
        top = table(y0 * side + x0) * (1 - fx) + table(y0 * side + x1) * fx
        bottom = table(y1 * side + x0) * (1 - fx) + table(y1 * side + x1) * fx
        return top * (1 - fy) + bottom * fy

    def _rope(self, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
        """Axial rotary angles, half of the pairs for the row and half for the column: cos, sin [P, head_dim / 2]."""
        axis_dim = self.config.hidden_size // self.config.num_heads // 2
        exponent = torch.arange(0, axis_dim, 2, dtype=torch.float32, device=rows.device) / axis_dim
        frequencies = self.config.rope_theta**-exponent
        angles = torch.cat([rows[:, None] * frequencies, cols[:, None] * frequencies], dim=1)
        return angles.cos(), angles.sin()


@lru_cache(maxsize=256)
def frame_layout(height: int, width: int, merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of a frame's patches in the order the processor emits them: merge×merge blocks, row-major."""
    with torch.inference_mode(False):  # what is kept must also serve training
        row = torch.arange(height)[:, None].expand(height, width)
        col = torch.arange(width)[None, :].expand(height, width)
        blocks = (height // merge, merge, width // merge, merge)
        return row.reshape(blocks).transpose(1, 2).flatten(), col.reshape(blocks).transpose(1, 2).flatten()


class PatchEmbed(nn.Module):
    """The checkpoints hold a Conv3d whose stride is its kernel; on flattened patches it is a matrix product."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, pixel_values: Tensor) -> Tensor:
        weight = self.proj.weight
        return linear(pixel_values.to(weight.dtype), weight.flatten(1), self.proj.bias)


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, segments)
        return x + self.mlp(self.norm2(x))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: list[int]) -> Tensor:
        """x [P, hidden]; `segments` are the patch counts of the frames, each of which attends to itself only."""
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.num_heads, -1).unbind(1)
        q, k = rotary(q, k, cos, sin)
        out, start = [], 0
        # Frames of one size are one batched call: a step's crops cost as many calls as there are sizes in a row.
        for length, run in groupby(segments):
            count = len(list(run))
            stop = start + count * length
            shape = (count, length, self.num_heads, -1)
            qs, ks, vs = (t[start:stop].view(shape).transpose(1, 2) for t in (q, k, v))
            out.append(F.scaled_dot_product_attention(qs, ks, vs).transpose(1, 2).reshape(count * length, -1))
            start = stop
        return self.proj(torch.cat(out) if len(out) > 1 else out[0])


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.linear_fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class PatchMerger(nn.Module):
    """Merges merge×merge neighbouring patches into one language-model token."""

    def __init__(self, config: VisionConfig, norm_after_merge: bool):
        super().__init__()
        self.merged = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_merge = norm_after_merge
        self.norm = nn.LayerNorm(self.merged if norm_after_merge else config.hidden_size, eps=1e-6)
        self.linear_fc1 = Linear(self.merged, self.merged)
        self.linear_fc2 = Linear(self.merged, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, self.merged)) if self.norm_after_merge else self.norm(x).view(-1, self.merged)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))
