"""What happens to an engine between its runs: memory given back and taken again, new weights, and its numbers."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.attention import Choice
from engine.block_pool import BlockPool
from engine.memory import KVCache, peak_bytes
from engine.models import fuse_projections
from engine.resident import ResidentWeights
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.sequence import Sequence


class Lifecycle:
    """The part of `LLM` that is about its memory, its weights and what it says of itself."""

    kv: KVCache
    weights: ResidentWeights
    pool: BlockPool
    scheduler: Scheduler
    runner: Runner
    sequences: dict[int, Sequence]
    weight_version: int
    device: torch.device
    _choice: Choice
    _counts: dict[str, int]

    def sleep(self, level: int = 1) -> None:
        """Gives memory back: level 1 the KV cache's, level 2 the weights' as well. Addresses stay reserved.

        Open sequences keep their tokens and are computed again after `wake_up`. After level 2 the weights are to be
        given again, by `update_weights` or `reload_weights`.

        Raises:
            ValueError: another level.
            RuntimeError: sequences run.
        """
        if level not in (1, 2):
            raise ValueError(f"sleep level {level}: give 1, which releases the KV cache, or 2, also the weights")
        self._check_idle("sleep")
        self._forget_computed()
        self.kv.sleep()
        if level == 2:
            self.weights.sleep()
            self.runner.release_packed()

    def wake_up(self, tags: Seq[str] = ("weights", "kv_cache")) -> None:
        """Takes the memory again, at the same addresses; `tags` says of what, so that weights can come first."""
        if unknown := set(tags) - {"weights", "kv_cache"}:
            raise ValueError(f"wake_up tag '{min(unknown)}': there are 'weights' and 'kv_cache'")
        if "weights" in tags:
            self.weights.wake()
        if "kv_cache" in tags:
            self.kv.wake()

    def update_weights(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Copies new values into the weights in place: some or all, by Hugging Face's names, cast to their dtype.

        Raises:
            ValueError: a name or a shape that the model does not have; the tensors before it are copied already.
            RuntimeError: sequences run, or the weights are asleep.
        """
        self._check_idle("new weights")
        try:
            self.weights.update(tensors)
        finally:
            self._new_weights()

    def reload_weights(self) -> None:
        """Reads the weights from the checkpoint again."""
        self._check_idle("new weights")
        self.weights.reload()
        self._new_weights()

    def weights_updated(self) -> None:
        """To be called after all weights were changed in place: what was computed with the old ones is dropped."""
        self._check_idle("new weights")
        self.weights.are_given()
        self._new_weights()

    def _new_weights(self) -> None:
        self.weight_version += 1
        fuse_projections(self.weights.model)  # parameters may have been pointed at the trainer's storage
        self.runner.weights_updated()
        self._forget_computed()

    def _forget_computed(self) -> None:
        self.runner.vision.clear()
        self.reset_prefix_cache()
        for sequence in self.sequences.values():
            sequence.drop_kv()

    def _check_idle(self, what: str) -> None:
        if self.scheduler.has_work:
            raise RuntimeError(f"{what} while sequences run; let them finish or abort them first")

    def reset_prefix_cache(self) -> None:
        """What was computed so far is not found again. Open sequences and their forks keep their KV."""
        self.pool.reset_cache()

    def explain(self) -> str:
        """Which attention backend was chosen and why, and why each other was not: a line each; for bf16 on the CPU,
        whether its products use AMX; whether steps are packed.
        """
        return f"{self._choice.explanation}\n{self.runner.explain()}"

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is held now.

        peak_bytes: on the CPU the most that the process has had in memory; on a GPU torch's peak and the engine's
        weights and KV, which torch does not count.
        """
        return {
            "blocks_total": self.pool.num_blocks,
            "blocks_used": self.pool.num_used,
            "blocks_peak": self.pool.peak_used,
            "blocks_copied": self.kv.blocks_copied,
            "tokens_copied": self.kv.tokens_copied,
            "block_bytes": self.kv.bytes_per_block,
            "kv_bytes": self.kv.nbytes,
            "weight_bytes": self.weights.nbytes,
            "packed_bytes": self.runner.packed_bytes,
            "vision_bytes": self.runner.vision.nbytes,
            "peak_bytes": peak_bytes(self.device, self.kv.nbytes + self.weights.nbytes),
            "images_encoded": self.runner.vision.encoded,
            "preemptions": self.scheduler.preemptions,
            "sequences_open": len(self.sequences),
            "weight_version": self.weight_version,
            **self._counts,
        }
