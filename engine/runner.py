"""One step on the device: scheduled chunks → packed batch → model → sampler."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention import PagedAttention
from engine.memory import KVCache
from engine.models import Qwen3VL, VisionFeatures, VisionInput
from engine.positions import positions
from engine.processor import ImageInput
from engine.scheduler import Chunk, Request
from kernels import sample


@dataclass(frozen=True, slots=True)
class Sampled:
    """One new token of each of `requests`: token [B] int64, logprob and entropy [B] fp32, as Python lists."""

    requests: list[Request]
    tokens: list[int]
    logprobs: list[float]
    entropies: list[float]


class Runner:
    def __init__(self, model: Qwen3VL, kv: KVCache, block_size: int, vision_cache_bytes: int):
        self.model = model
        self.kv = kv
        self.block_size = block_size
        self.device = next(model.parameters()).device
        self.vision = VisionCache(model, vision_cache_bytes)
        self._banned = torch.tensor(model.config.banned_token_ids, dtype=torch.int64, device=self.device)
        self._scale = model.config.text.head_dim**-0.5

    @torch.inference_mode()
    def step(self, chunks: list[Chunk]) -> Sampled:
        """Computes the chunks' tokens and samples a token for every request that is complete and wants one."""
        token_ids: list[int] = []
        index, rope, context, slots, writes, row = [], [], [], [], [], 0
        last_rows: list[int] = []
        samplers: list[Request] = []
        size = self.block_size
        for chunk in chunks:
            sequence, start, stop = chunk.request.sequence, chunk.start, chunk.stop
            token_ids.extend(sequence.token_ids[start:stop])
            if stop - start == 1 and (not sequence.spans or start >= sequence.spans[-1].stop):
                # Decode: all three axes are the token's own position.
                index.append(start + (sequence.spans[-1].delta if sequence.spans else 0))
            else:
                rope.append((row, positions(sequence.spans, start, stop)))
                index.extend([0] * (stop - start))
            context.append(stop)
            if chunk.writes:
                table = sequence.block_table
                slots.extend(table[at // size] * size + at % size for at in range(start, stop))
                writes.extend(range(row, row + stop - start))
            row += stop - start
            if stop == len(sequence) and chunk.request.limit > stop:
                last_rows.append(row - 1)
                samplers.append(chunk.request)
        position_ids = np.tile(np.asarray(index, dtype=np.int64), (3, 1))
        for at, block in rope:
            position_ids[:, at : at + block.shape[1]] = block
        hidden = self.model(
            self._tensor(token_ids),
            self._tensor(position_ids),
            self._attention(chunks, context, slots, writes if len(writes) < row else None),
            self._vision(chunks),
        )
        for chunk in chunks:
            chunk.request.sequence.num_computed = chunk.stop
        return self._sample(hidden, last_rows, samplers)

    def _attention(
        self, chunks: list[Chunk], context: list[int], slots: list[int], writes: list[int] | None
    ) -> PagedAttention:
        tables = [chunk.request.sequence.block_table for chunk in chunks]
        block_tables = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
        for table, out in zip(tables, block_tables, strict=True):
            out[: len(table)] = table
        cu_seqlens = np.zeros(len(chunks) + 1, dtype=np.int32)
        np.cumsum([chunk.stop - chunk.start for chunk in chunks], out=cu_seqlens[1:])
        return PagedAttention(
            self.kv,
            self._tensor(block_tables),
            self._tensor(cu_seqlens),
            self._tensor(np.asarray(context, dtype=np.int32)),
            self._tensor(slots),
            None if writes is None else self._tensor(writes),
            self._scale,
        )

    def _vision(self, chunks: list[Chunk]) -> VisionInput | None:
        """The rows of the images' features that fall into the chunks, and where they go in the packed batch."""
        wanted: list[tuple[ImageInput, int, int]] = []
        where: list[np.ndarray] = []
        row = 0
        for chunk in chunks:
            sequence, start, stop = chunk.request.sequence, chunk.start, chunk.stop
            if sequence.spans and start < sequence.spans[-1].stop:
                for span, image in zip(sequence.spans, sequence.images, strict=True):
                    lo, hi = max(span.start, start), min(span.stop, stop)
                    if lo < hi:
                        wanted.append((image, lo - span.start, hi - span.start))
                        where.append(np.arange(row + lo - start, row + hi - start))
            row += stop - start
        if not wanted:
            return None
        features = self.vision.encode([image for image, _, _ in wanted])
        parts = [features[image.key].rows(lo, hi) for image, lo, hi in wanted]
        return VisionInput(None, None, self._tensor(np.concatenate(where)), VisionFeatures.cat(parts))

    def _sample(self, hidden: Tensor, rows: list[int], requests: list[Request]) -> Sampled:
        if not requests:
            return Sampled([], [], [], [])
        logits = self.model.logits(hidden if len(rows) == len(hidden) else hidden[self._tensor(rows)])
        params = [request.params for request in requests]
        tokens, logprobs, entropies = sample(
            logits,
            self._tensor([request.seed for request in requests]),
            self._tensor([len(request.sequence) for request in requests]),
            self._tensor([p.temperature for p in params], torch.float32),
            self._tensor([p.top_k for p in params]),
            self._tensor([p.top_p for p in params], torch.float32),
            self._banned,
        )
        return Sampled(requests, tokens.tolist(), logprobs.tolist(), entropies.tolist())

    def _tensor(self, values: list | np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        if isinstance(values, np.ndarray):
            return torch.from_numpy(values).to(self.device)
        return torch.tensor(values, dtype=dtype or torch.int64, device=self.device)


class VisionCache:
    """Encoder outputs by image content, least recently used first out. A weight update clears it."""

    def __init__(self, model: Qwen3VL, max_bytes: int):
        self.model = model
        self.max_bytes = max_bytes
        self.encoded = 0
        self._entries: OrderedDict[bytes, VisionFeatures] = OrderedDict()
        self._bytes = 0

    def clear(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def encode(self, images: list[ImageInput]) -> dict[bytes, VisionFeatures]:
        """Features of all `images` by key; the ones not cached are encoded in one packed pass."""
        new = {image.key: image for image in images if image.key not in self._entries}
        if new:
            device = next(self.model.parameters()).device
            pixels = torch.cat([image.pixel_values for image in new.values()]).to(device)
            features = self.model.model.visual(pixels, torch.tensor([image.grid_thw for image in new.values()]))
            row = 0
            for key, image in new.items():
                self._entries[key] = features.rows(row, row + image.num_tokens)
                self._bytes += _nbytes(self._entries[key])
                row += image.num_tokens
            self.encoded += len(new)
        out = {image.key: self._entries[image.key] for image in images}
        for key in out:
            self._entries.move_to_end(key)
        while self._bytes > self.max_bytes and len(self._entries) > len(out):
            self._bytes -= _nbytes(self._entries.popitem(last=False)[1])
        return out


def _nbytes(features: VisionFeatures) -> int:
    return features.embeds.nbytes + sum(level.nbytes for level in features.deepstack)
