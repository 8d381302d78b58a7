"""One step on the device: decoding rows and scheduled chunks → packed batch → model → sampler."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import Backend
from engine.attention.ours import Ours
from engine.batch import DecodeBatch
from engine.graphs import DecodeGraphs
from engine.images import ImageInput
from engine.logits import details
from engine.models import PackedModel, PackedVision, Qwen3VL, VisionFeatures, VisionInput
from engine.positions import positions
from engine.scheduler import Chunk, Request
from kernels import linear_sample, sample


@dataclass(frozen=True, slots=True)
class Sampled:
    """A new token of every decoding row, then of each of `requests`: token int64, logprob and entropy fp32, all [B]."""

    requests: list[Request]
    tokens: npt.NDArray[np.int64]
    logprobs: list[float]
    entropies: list[float]


@dataclass(frozen=True, slots=True)
class Packed:
    """A step's packed tokens: the decoding rows, one token each, then the chunks.

    token_ids [T], position_ids [3, T], slots [W] int64; writes: the W rows whose KV is new, or None when all are;
    tables [S, columns], cu_seqlens [S + 1], context_lens [S] int32.
    """

    token_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    writes: npt.NDArray[np.int64] | None
    tables: npt.NDArray[np.int32]
    cu_seqlens: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]


class Runner:
    def __init__(self, model: Qwen3VL, attention: Backend, block_size: int, vision_cache_bytes: int):
        self.model = model
        self.attention = attention
        self.block_size = block_size
        self.device = next(model.parameters()).device
        self.vision = VisionCache(model, vision_cache_bytes)
        self.graphs: DecodeGraphs | None = None
        self.packed: PackedModel | None = None
        self._not_packed = "their attention is 'ours'"
        if isinstance(attention, Ours):
            self._not_packed = PackedModel.why_not(model, attention.kv)
            if self._not_packed is None:
                self.packed = PackedModel(model, attention.kv)
        self._banned = torch.tensor(model.config.banned_token_ids, dtype=torch.int64, device=self.device)

    def use_graphs(self, max_rows: int, capture: bool) -> None:
        """Decodes at fixed addresses, with `capture` as CUDA graphs; only our own attention can."""
        if isinstance(self.attention, Ours):
            kv = self.attention.kv
            if self.packed is not None:  # on a CPU; its blocks hold tokens in another order
                self.packed, kv.whole_blocks = None, False
                self._not_packed = "they run over buffers at fixed addresses"
            room = min(self.model.config.text.max_position_embeddings, kv.num_blocks * self.block_size)
            self.graphs = DecodeGraphs(self.model, self.attention, self._banned, max_rows, room, capture)

    def release_packed(self) -> None:
        """Gives back the weights' packed copies; they are made anew where they are used."""
        if self.packed is not None:
            self.packed.release()
        if self.vision.packed is not None:
            self.vision.packed.release()

    def explain(self) -> str:
        """Whether whole steps are one call into C++, and why not."""
        return "steps: packed" if self._not_packed is None else f"steps: layer by layer, not packed: {self._not_packed}"

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights' packed copies held now."""
        return sum(packed.nbytes for packed in (self.packed, self.vision.packed) if packed is not None)

    def weights_updated(self) -> None:
        """Drops what was computed from the old weights."""
        self.vision.clear()
        self.release_packed()
        if self.graphs is not None:
            self.graphs.weights_updated()

    @torch.inference_mode()
    def step(self, batch: DecodeBatch, chunks: list[Chunk]) -> Sampled:
        """Computes the rows' and the chunks' tokens and samples a token for all that are complete and want one."""
        computed = [chunk for chunk in chunks if chunk.stop > chunk.start]
        rows: list[Tensor] = []
        requests: list[Request] = []
        if len(batch) or computed:
            last, ends = last_rows(computed, len(batch))
            hidden = self._hidden(pack(batch, computed, self.block_size), last, self._vision(computed, len(batch)))
            keep = list(range(len(batch)))
            for row, chunk in enumerate(ends, len(batch)):
                if chunk.request.samples:
                    keep.append(row)
                    requests.append(chunk.request)
                else:  # it is only prefilled
                    chunk.request.sequence.last_hidden = hidden[row].clone()
            if keep:
                rows.append(hidden if len(keep) == len(hidden) else hidden[keep])
        for chunk in chunks:
            chunk.request.sequence.num_computed = chunk.stop
            if chunk.start == chunk.stop and chunk.request.samples:
                assert chunk.request.sequence.last_hidden is not None
                rows.append(chunk.request.sequence.last_hidden[None])
                requests.append(chunk.request)
        return self._sample(torch.cat(rows) if len(rows) > 1 else rows[0], batch, requests) if rows else NOTHING

    @property
    def bursts(self) -> bool:
        """Whether `burst` is there."""
        return self.packed is not None

    @torch.inference_mode()
    def burst(
        self, batch: DecodeBatch, counts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Several steps of rows that only sample at a temperature; see `PackedModel.decode`."""
        assert self.packed is not None
        return self.packed.decode(batch, counts, stops, self._banned)

    def _hidden(self, packed: Packed, rows: npt.NDArray[np.int64], vision: VisionInput | None) -> Tensor:
        """Final hidden states of some rows of the step, [n, H]."""
        if self.packed is not None:
            return self.packed.hidden(packed, self._tensor(rows), vision)
        tokens, positions = self._tensor(packed.token_ids), self._tensor(packed.position_ids)
        hidden = self.model(tokens, positions, self.attention.step(packed), vision)
        return hidden if len(rows) == len(hidden) else hidden[self._tensor(rows)]

    def _vision(self, chunks: list[Chunk], row: int) -> VisionInput | None:
        """The rows of the images' features that fall into the chunks, and where they go in the packed batch."""
        wanted: list[tuple[ImageInput, int, int]] = []
        where: list[np.ndarray] = []
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

    def _sample(self, hidden: Tensor, batch: DecodeBatch, requests: list[Request]) -> Sampled:
        seeds, noise_positions, top_k = batch.seed, batch.position + 1, batch.top_k
        temperature, top_p, min_p = batch.temperature, batch.top_p, batch.min_p
        if requests:
            params = [request.params for request in requests]
            seeds = np.append(seeds, [request.seed for request in requests])
            noise_positions = np.append(noise_positions, [len(request.sequence) for request in requests])
            top_k = np.append(top_k, [p.top_k for p in params])
            floats = np.array([(p.temperature, p.top_p, p.min_p) for p in params], dtype=np.float32)
            temperature, top_p, min_p = (
                np.append(column, more) for column, more in zip((temperature, top_p, min_p), floats.T, strict=True)
            )
        shaped = [(row, batch.requests[row]) for row in batch.shaped]
        shaped += [(len(batch) + i, request) for i, request in enumerate(requests) if request.shaper is not None]
        if not (shaped or hidden.is_cuda or top_k.any() or min_p.any() or (top_p < 1).any()):
            # On a CPU the same bits as below: what a row says does not depend on what others in the batch ask for.
            rows = self._tensor(seeds), self._tensor(noise_positions), self._tensor(temperature)
            drawn = linear_sample(hidden, self.model.head_weight, *rows, self._banned)
            return Sampled(requests, drawn[0].numpy(), drawn[1].tolist(), drawn[2].tolist())
        logits = self.model.logits(hidden)
        raw = {row: logits[row].clone() for row, _ in shaped}
        for row, request in shaped:
            assert request.shaper is not None
            request.shaper.apply(logits[row], request.sequence.token_ids)
        tokens, logprobs, entropies = sample(
            logits,
            self._tensor(seeds),
            self._tensor(noise_positions),
            self._tensor(temperature),
            self._tensor(top_k),
            self._tensor(top_p),
            self._banned,
            self._tensor(min_p) if min_p.any() else None,
        )
        sampled = Sampled(requests, tokens.cpu().numpy(), logprobs.tolist(), entropies.tolist())
        for row, request in shaped:
            more = details(raw[row], logits[row], int(sampled.tokens[row]), request.params, self._banned)
            sampled.logprobs[row], sampled.entropies[row] = more.logprob, more.entropy
            if more.processed_logprob is not None:
                request.processed_logprobs.append(more.processed_logprob)
            if more.top_logprobs is not None:
                request.top_logprobs.append(more.top_logprobs)
        return sampled

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)


NOTHING = Sampled([], np.empty(0, dtype=np.int64), [], [])


def last_rows(chunks: list[Chunk], row: int) -> tuple[npt.NDArray[np.int64], list[Chunk]]:
    """Packed rows whose hidden states are of use: the `row` decoding rows, then the last one of each chunk that ends
    its sequence; and these chunks."""
    last, ends = list(range(row)), []
    for chunk in chunks:
        row += chunk.stop - chunk.start
        if chunk.stop == len(chunk.request.sequence):
            last.append(row - 1)
            ends.append(chunk)
    return np.asarray(last, dtype=np.int64), ends


def pack(batch: DecodeBatch, chunks: list[Chunk], block_size: int) -> Packed:
    """Lays out a step. Without chunks it is a few array operations, however many rows there are."""
    n = len(batch)
    rope = np.tile(batch.position + batch.delta, (3, 1))
    tables, slots = batch.tables(), batch.slots()
    context_lens = (batch.position + 1).astype(np.int32)
    if not chunks:
        return Packed(batch.token, rope, slots, None, tables, np.arange(n + 1, dtype=np.int32), context_lens)
    token_ids, ropes, more_slots, writes, row = [], [rope], [], list(range(n)), n
    for chunk in chunks:
        sequence, start, stop = chunk.request.sequence, chunk.start, chunk.stop
        token_ids.extend(sequence.token_ids[start:stop])
        ropes.append(positions(sequence.spans, start, stop))
        if chunk.writes:
            block, offset = np.divmod(np.arange(start, stop), block_size)
            more_slots.append(np.asarray(sequence.block_table)[block] * block_size + offset)
            writes.extend(range(row, row + stop - start))
        row += stop - start
    width = max(tables.shape[1] if n else 0, *(len(chunk.request.sequence.block_table) for chunk in chunks))
    all_tables = np.zeros((n + len(chunks), width), dtype=np.int32)
    all_tables[:n, : tables.shape[1]] = tables
    for out, chunk in zip(all_tables[n:], chunks, strict=True):
        table = chunk.request.sequence.block_table
        out[: len(table)] = table
    lengths = [chunk.stop - chunk.start for chunk in chunks]
    return Packed(
        np.concatenate([batch.token, token_ids]),
        np.concatenate(ropes, axis=1),
        np.concatenate([slots, *more_slots]),
        None if len(writes) == row else np.asarray(writes, dtype=np.int64),
        all_tables,
        np.cumsum([0] + [1] * n + lengths, dtype=np.int32),
        np.append(context_lens, [chunk.stop for chunk in chunks]).astype(np.int32),
    )


class VisionCache:
    """Encoder outputs by image content, least recently used first out."""

    def __init__(self, model: Qwen3VL, max_bytes: int):
        self.model = model
        self.max_bytes = max_bytes
        tower = model.model.visual if model.config.vision is not None else None
        self.packed = PackedVision(tower) if tower is not None and PackedVision.serves(tower) else None
        self.encoded = 0
        self._entries: OrderedDict[bytes, VisionFeatures] = OrderedDict()
        self._bytes = 0

    @property
    def nbytes(self) -> int:
        return self._bytes

    def clear(self) -> None:
        self._entries.clear()
        self._bytes = 0

    def encode(self, images: list[ImageInput]) -> dict[bytes, VisionFeatures]:
        """Features of all `images` by key; the ones not cached are encoded in one packed pass."""
        new = {image.key: image for image in images if image.key not in self._entries}
        if new:
            device = next(self.model.parameters()).device
            pixels = torch.cat([image.pixel_values for image in new.values()]).to(device)
            grids = [image.grid_thw for image in new.values()]
            features = (
                self.packed(pixels, grids) if self.packed else self.model.model.visual(pixels, torch.tensor(grids))
            )
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
