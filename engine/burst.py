"""Several tokens of every decoding row in one call, where no token needs the host: no string, shaper or truncation."""

import numpy as np
import numpy.typing as npt

from engine.batch import DecodeBatch
from engine.runner import Runner
from engine.scheduler import Request, Scheduler


class Bursts:
    """Up to `most` steps at once (`num_scheduler_steps` of the engine); what they sample is what single steps do."""

    def __init__(self, scheduler: Scheduler, runner: Runner, counts: dict[str, int], most: int):
        self.scheduler, self.runner, self.counts, self.most = scheduler, runner, counts, most

    def run(self, batch: DecodeBatch, most: int) -> set[Request] | None:
        """Up to `most` tokens of each row, whose first has its block and is counted: the requests that end with them.

        None, and nothing is done, where single steps are needed.
        """
        counts = self._counts(batch, min(most, self.most))
        if counts is None:
            return None
        requests, start = batch.requests, batch.position.copy()
        tokens, logprobs, entropies, made = self.runner.burst(batch, counts, _stops(requests))
        rows = np.arange(len(requests))
        batch.token[:] = tokens[rows, made - 1]
        batch.position[:] += made
        finished = set()
        columns = zip(requests, made.tolist(), tokens.tolist(), logprobs.tolist(), entropies.tolist(), strict=True)
        for request, count, ids, scores, spreads in columns:
            sequence = request.sequence
            sequence.token_ids += ids[:count]
            sequence.num_computed = len(sequence.token_ids) - 1
            request.logprobs += scores[:count]
            request.entropies += spreads[:count]
            if (last := ids[count - 1]) in request.stop_ids:
                request.stopped_by = last
            if request.stopped_by is not None or len(sequence.token_ids) >= request.limit:
                finished.add(request)
        size = batch.block_size
        for row in np.flatnonzero(batch.position // size > start // size).tolist():
            self.scheduler.seal(requests[row].sequence, int(start[row]) // size)
        self.counts["decode_tokens"] += int(made.sum()) - len(made)
        self.counts["steps"] += int(made.max()) - 1
        return finished

    def _counts(self, batch: DecodeBatch, most: int) -> npt.NDArray[np.int64] | None:
        """Tokens that each row wants [n], which have their blocks then; None where a burst is of no use."""
        if most < 2 or not self.runner.bursts or batch.shaped or any(r.params.stop for r in batch.requests):
            return None
        if batch.top_k.any() or batch.min_p.any() or (batch.top_p < 1).any():
            return None
        room = batch.limit - batch.position - 1
        most = min(most, int(room.max(initial=0)))
        size, free = batch.block_size, self.scheduler.pool.num_free
        while most > 1:
            counts = np.minimum(room, most)
            missing = (batch.position + counts - 1) // size - batch.position // size
            if missing.sum() <= free:
                self._reserve(batch, missing)
                return counts
            most //= 2  # nobody is to lose blocks for what may not be needed
        return None

    def _reserve(self, batch: DecodeBatch, missing: npt.NDArray[np.int64]) -> None:
        for row in np.flatnonzero(missing).tolist():
            table = batch.requests[row].sequence.block_table
            table += [self.scheduler.pool.allocate() for _ in range(int(missing[row]))]
            batch.reserved(row)


def _stops(requests: list[Request]) -> npt.NDArray[np.int64]:
    """Each request's stop tokens, [n, m], padded with -1."""
    stops = np.full((len(requests), max(len(request.stop_ids) for request in requests)), -1, dtype=np.int64)
    for row, request in zip(stops, requests, strict=True):
        row[: len(request.stop_ids)] = list(request.stop_ids)
    return stops
