"""Random operations on real engines, checked after each against a model of the KV and, at last, against fresh runs.

    python -m tests.engine.random_operations --operations 1000000

An engine of random block size, pool, budget and options lives for a few hundred operations; then every sequence that is
still open is computed anew by an engine that forks, preempts, caches and shares nothing, and must be the same.
"""

import argparse
import random
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from engine import LLM, CompletionOutput, ImageInput, SamplingParams, Sequence
from tests.engine.checkpoints import IMAGE, VISION_END, VISION_START, write_vl_checkpoint
from tests.engine.fresh_runs import GREEDY, FreshRuns
from tests.engine.mirror import Mirror, Part
from tests.engine.pool_model import PoolModel

STOP = 40  # ends some runs early
MAX_LIVE, MAX_LENGTH = 14, 72
PER_ENGINE, PER_CHECK = 2000, 400  # operations


class Walk:
    """One engine under random operations, its model, and the fresh engine that it is held to."""

    def __init__(self, path: Path, seed: int, fresh: LLM, pictures: list[ImageInput], counts: Counter[str]):
        self.rng = rng = random.Random(seed)
        self.fresh, self.pictures, self.counts = fresh, pictures, counts
        self.fresh_runs = FreshRuns(fresh, counts)
        block_size = rng.choice([2, 8, 8, 8, 16, 16])  # the C++ kernels take multiples of 8, packed steps of 16
        num_blocks = -(-rng.randint(MAX_LENGTH, 2 * MAX_LENGTH) // block_size)  # one sequence fits, and not many
        self.llm = LLM(
            path,
            kv_cache_bytes=fresh.kv.bytes_per_block // fresh.pool.block_size * block_size * num_blocks,
            block_size=block_size,
            max_batch_tokens=rng.choice([1, 5, 17, 33, 4096]),
            max_num_seqs=rng.choice([1, 3, 1024, 1024]),
            num_scheduler_steps=rng.choice([1, 2, 3, 16, 1000]),
            enable_prefix_caching=rng.random() < 0.7,
            share_prefixes=rng.random() < 0.7,
            vision_cache_bytes=rng.choice([1, 1 << 20]),
        )
        self.model = PoolModel(self.llm)
        self.live: list[Mirror] = []
        self.prompts = [[rng.randrange(7, 260) for _ in range(24)] for _ in range(3)]
        self.weights = [
            {name: value.clone() for name, value in fresh.model.named_parameters()},
            {
                name: value * 1.1
                for name, value in fresh.model.named_parameters()
                if "layers.1." in name or "visual.merger" in name
            },
        ]
        self.version = 0

    def operation(self) -> None:
        name = self.rng.choices(list(OPERATIONS), list(OPERATIONS.values()))[0]
        if not self.live and name not in ("sleep", "update", "reset", "drain", "step"):
            name = "open"
        self.counts[name] += 1
        getattr(self, name)()
        self.model.check([mirror.sequence for mirror in self.live])

    # -- operations ---------------------------------------------------------------------

    def open(self) -> None:
        if len(self.live) >= MAX_LIVE:
            return self.close()
        tokens, images = self.rng.choice(self.prompts)[: self.rng.randint(1, 24)], []
        if self.rng.random() < 0.4:  # two pictures have the same number of tokens: only the content tells them apart
            images = [self.rng.choice(self.pictures)]
            tokens = [*tokens[:6], *shown(images[0]), *tokens[6:]]
        sequence = self.llm.open({"prompt_token_ids": tokens, "multi_modal_data": {"image": images}})
        self.live.append(Mirror(sequence, [Part(list(tokens), images)]))

    def fork(self) -> None:
        mirror = self.rng.choice(self.live)
        at = self.rng.choice([None, *legal_cuts(mirror.sequence)])
        count = self.rng.randint(0, 2)
        children = mirror.sequence.fork(count, at)
        assert len(children) == count
        kept = len(mirror.sequence) if at is None else at
        for child in children:
            self.live.append(Mirror(child, mirror.cut(kept)))
            assert child.token_ids == self.live[-1].tokens()
        while len(self.live) > MAX_LIVE:
            self.close()

    def extend(self) -> None:
        mirror = self.rng.choice(self.live)
        tokens, images = self.observation()
        if mirror.sequence.running:
            with pytest.raises(RuntimeError, match="running sequence cannot be extended"):
                mirror.sequence.extend(tokens, images)
        elif len(mirror.sequence) + len(tokens) <= MAX_LENGTH:
            mirror.sequence.extend(tokens, images)
            mirror.parts.append(Part(tokens, images))

    def submit(self) -> None:
        self.start(self.rng.choice(self.live))

    def submit_all(self) -> None:
        for mirror in self.rng.sample(self.live, len(self.live)):
            self.start(mirror)

    def start(self, mirror: Mirror) -> None:
        room = MAX_LENGTH - len(mirror.sequence)
        if mirror.sequence.running:
            with pytest.raises(RuntimeError, match="running already"):
                self.llm.submit(mirror.sequence, GREEDY)
        elif room > 0:
            params = self.params(min(room, self.rng.choice([1, 2, 5, 12, 40, 40])))
            self.llm.submit(mirror.sequence, params)
            mirror.parts.append(Part([], params=params))

    def step(self) -> None:
        before = {id(mirror): len(mirror.sequence) for mirror in self.live}
        most = self.rng.choice([None, None, 1, 4])
        done = {id(sequence): output for sequence, output in self.llm.step(most)}
        most = min(most or self.llm._bursts.most, self.llm._bursts.most)
        for mirror in self.live:
            output, request = done.get(id(mirror.sequence)), mirror.sequence.request
            if output is not None:
                new = self.ended(mirror, output)
                assert request is None and 1 <= new <= most
            elif request is not None:
                new = mirror.absorb(request.logprobs, request.entropies)
                assert new <= most
            else:
                new = 0
            assert len(mirror.sequence) == before[id(mirror)] + new
            self.counts["tokens sampled"] += new
            self.counts["tokens sampled in bursts"] += new if new > 1 else 0

    def ended(self, mirror: Mirror, output: CompletionOutput) -> int:
        """A run is over: the number of its tokens that are new."""
        new = mirror.absorb(output.logprobs, output.entropies)
        part = mirror.parts[-1]
        assert part.params is not None and part.tokens == output.token_ids
        said_it = bool(part.params.stop) and output.stop_reason in part.params.stop
        assert said_it or part.tokens[-1] == STOP or len(part.tokens) == part.params.max_tokens
        return new

    def stream(self) -> None:
        """Some sequences token by token; between tokens they are forked, aborted and closed, or the loop is left."""
        if self.rng.random() < 0.5:
            self.drain()
        chosen = [m for m in self.rng.sample(self.live, min(3, len(self.live))) if len(m.sequence) < MAX_LENGTH]
        params = [self.params(min(MAX_LENGTH - len(m.sequence), self.rng.choice([1, 3, 9]))) for m in chosen]
        sequences = {id(mirror.sequence): mirror for mirror in chosen}
        stream = self.llm.stream([mirror.sequence for mirror in chosen], params)
        if self.llm.scheduler.has_work:
            with pytest.raises(RuntimeError, match="other sequences run"):
                next(stream)
            return
        for mirror, one in zip(chosen, params, strict=True):
            mirror.parts.append(Part([], params=one))
        for sequence, output in stream:
            mirror = sequences[id(sequence)]
            for other in chosen:  # a step has sampled for all of them
                if (request := other.sequence.request) is not None:
                    assert other.absorb(request.logprobs, request.entropies) <= 1
            if output.finish_reason is not None:
                self.ended(mirror, output)
            assert mirror.parts[-1].tokens == output.token_ids
            self.counts["tokens streamed"] += 1
            if any(len(other.sequence) != len(other.tokens()) for other in chosen):
                continue  # one has ended and is told of later
            event = self.rng.random()
            if event < 0.1 and len(self.live) < MAX_LIVE:
                at = self.rng.choice(legal_cuts(sequence))
                self.live.append(Mirror(sequence.fork(at=at)[0], mirror.cut(at)))
            elif event < 0.2:
                self.llm.abort(self.rng.choice(chosen).sequence)
            elif event < 0.25:
                closed = self.rng.choice(chosen)
                closed.sequence.close()
                if closed in self.live:
                    self.live.remove(closed)
            elif event < 0.28:
                break
            self.model.check([mirror.sequence for mirror in self.live])
        stream.close()
        assert not self.llm.scheduler.has_work

    def drop(self) -> None:
        sequence = self.rng.choice(self.live).sequence
        if sequence.running:
            with pytest.raises(RuntimeError, match="needs its KV"):
                sequence.drop_kv()
        else:
            sequence.drop_kv()

    def prefill(self) -> None:
        sequence = self.rng.choice(self.live).sequence
        if self.llm.scheduler.has_work:
            with pytest.raises(RuntimeError, match="other sequences run"):
                self.llm.prefill([sequence])
        else:
            self.llm.prefill([sequence])
            assert sequence.num_computed == len(sequence)

    def abort(self) -> None:
        mirror = self.rng.choice(self.live)
        self.llm.abort(mirror.sequence)
        assert not mirror.sequence.running

    def close(self) -> None:
        mirror = self.live.pop(self.rng.randrange(len(self.live)))
        mirror.sequence.close()
        mirror.sequence.close()
        for use in (mirror.sequence.fork, mirror.sequence.extend, lambda: self.llm.submit(mirror.sequence, GREEDY)):
            with pytest.raises(RuntimeError, match="the sequence is closed"):
                use()

    def misuse(self) -> None:
        """Refused, and nothing changes."""
        sequence = self.rng.choice(self.live).sequence
        wrong = {0: "so `at` must be", len(sequence) + 1: "so `at` must be"}
        wrong |= {at: "inside an image" for span in sequence.spans for at in range(span.start + 1, span.stop)}
        at = self.rng.choice(list(wrong))
        with pytest.raises(ValueError, match=wrong[at]):
            sequence.fork(2, at)

    def reset(self) -> None:
        self.llm.reset_prefix_cache()

    def sleep(self) -> None:
        if self.rng.random() < 0.5:
            self.drain()
        if self.llm.scheduler.has_work:
            with pytest.raises(RuntimeError, match="sleep while"):
                self.llm.sleep()
            return
        level = self.rng.choice([1, 1, 2])
        self.llm.sleep(level)
        self.model.slots[:] = 0
        assert self.llm.stats()["blocks_used"] == 0
        self.llm.wake_up()
        if level == 2:
            self.counts["sleep of weights"] += 1
            self.llm.update_weights(self.weights[0] | (self.weights[1] if self.version else {}))

    def update(self) -> None:
        """New weights. What was sampled with the old ones is checked first, and given from then on."""
        if self.rng.random() < 0.5:
            self.drain()
        if self.llm.scheduler.has_work:
            with pytest.raises(RuntimeError, match="new weights while"):
                self.llm.update_weights({})
            return
        self.fresh_runs.verify(self.live)
        self.version = 1 - self.version
        for llm in (self.llm, self.fresh):
            llm.update_weights(self.weights[0] if self.version == 0 else self.weights[1])
        for mirror in self.live:
            mirror.parts = [Part(part.tokens, part.images) for part in mirror.parts]

    def run(self, operations: int, bar: tqdm) -> None:
        for done in range(1, operations + 1):
            self.operation()
            if done % 50 == 0:
                self.model.check_lists()
            if done % PER_CHECK == 0 or done == operations:
                self.fresh_runs.verify(self.live)
            bar.update()
        self.rng.shuffle(self.live)
        while self.live:
            self.close()
        self.model.check([])
        self.model.check_lists()
        assert self.llm.stats()["blocks_used"] == 0, "blocks leaked"
        assert not self.llm.scheduler.has_work
        if self.version:
            self.fresh.update_weights(self.weights[0])
        stats = self.llm.stats()
        for name in ("preemptions", "blocks_copied", "steps", "images_encoded"):
            self.counts[name] += stats[name]

    def drain(self) -> None:
        while self.llm.scheduler.has_work:
            self.step()

    # -- what they are made of ------------------------------------------------------------

    def observation(self) -> tuple[list[int], list[ImageInput]]:
        text = [self.rng.randrange(7, 260) for _ in range(self.rng.randint(1, 6))]
        if self.rng.random() < 0.6:
            return text, []
        picture = self.rng.choice(self.pictures)
        return text + shown(picture), [picture]

    def params(self, max_tokens: int) -> SamplingParams:
        plain = SamplingParams(
            temperature=self.rng.choice([0.0, 0.7, 1.0]),
            seed=self.rng.randrange(2**40),
            max_tokens=max_tokens,
            stop_token_ids=(STOP,),
            ignore_eos=True,
            detokenize=False,
        )
        if self.rng.random() < 0.75:
            return plain
        if self.rng.random() < 0.3:
            return replace(plain, detokenize=True, stop=self.rng.choice(["e", "zq"]))
        if self.rng.random() < 0.4:
            cut = self.rng.choice([{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.9}])
            return replace(plain, **cut)
        least = self.rng.randint(0, max_tokens)
        return replace(plain, repetition_penalty=1.2, presence_penalty=0.3, logit_bias={STOP: 3.0}, min_tokens=least)


OPERATIONS = {  # and how often, relatively
    "open": 10,
    "fork": 18,
    "extend": 14,
    "submit": 14,
    "submit_all": 1.5,
    "step": 20,
    "prefill": 2,
    "stream": 2,
    "drop": 1,
    "abort": 4,
    "close": 8,
    "misuse": 8,
    "reset": 0.5,
    "sleep": 0.5,
    "update": 0.2,
    "drain": 0.3,
}


def shown(picture: ImageInput) -> list[int]:
    return [VISION_START, *[IMAGE] * picture.num_tokens, VISION_END]


def legal_cuts(sequence: Sequence) -> list[int]:
    return [at for at in range(1, len(sequence) + 1) if not any(s.start < at < s.stop for s in sequence.spans)]


def walk(operations: int, seed: int, path: Path) -> Counter[str]:
    """Runs that many operations. A difference is an AssertionError that tells the engine's seed and the operation."""
    fresh = LLM(path, kv_cache_bytes=1 << 22, enable_prefix_caching=False, share_prefixes=False)
    noise = np.random.default_rng(1)
    pictures = [
        fresh.processor.image(Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)))
        for size in ((8, 8), (16, 24), (24, 16))
    ]
    counts: Counter[str] = Counter()
    with tqdm(total=operations, unit="op", smoothing=0.01) as bar:
        while bar.n < operations:
            one = Walk(path, seed + bar.n, fresh, pictures, counts)
            try:
                one.run(min(PER_ENGINE, operations - bar.n), bar)
            except BaseException as error:
                error.add_note(f"engine of seed {seed + bar.n - bar.n % PER_ENGINE}, operation {bar.n % PER_ENGINE}")
                raise
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}")
    with tempfile.TemporaryDirectory() as directory:
        path = write_vl_checkpoint(Path(directory), tie=True, seed=7)
        counts = walk(arguments.operations, arguments.seed, path)
    for name, count in counts.most_common():
        print(f"{count:>10,} {name}")


if __name__ == "__main__":
    main()
