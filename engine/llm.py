"""The engine's public face: generate and chat as in vLLM, and sequences that are opened, run, extended and forked."""

import itertools
import operator
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.attention import Target, choose_backend
from engine.batch import DecodeBatch
from engine.block_pool import BlockPool
from engine.burst import Bursts
from engine.graphs import Launched
from engine.inputs import Inputs
from engine.lifecycle import Lifecycle
from engine.logits import make_shaper
from engine.memory import KVCache, check_counts, check_kv_size, kv_size
from engine.models import ModelConfig, checkpoint_directory
from engine.outputs import CompletionOutput, RequestOutput
from engine.prompts import Prompt, as_prompts, eos_token_ids, parse_prompt
from engine.resident import LoadFormat, ResidentWeights, compute_dtype
from engine.runner import Runner
from engine.sampling_params import SamplingParams, derive_seed, one_each
from engine.scheduler import Chunk, Request, Scheduler
from engine.sequence import Sequence
from engine.stopping import append_sampled, text_of


class LLM(Inputs, Lifecycle):
    """A paged-KV engine for a local Hugging Face checkpoint of Qwen3-VL or Qwen3.

    Args:
        path: checkpoint directory; a hub's name is none.
        dtype: compute dtype of weights and KV, or its name; None takes bf16 on CUDA and fp32 on the CPU.
        load_format: "auto" reads the weights; "dummy" leaves them unfilled, for a caller that brings them.
        kv_cache_bytes: size of the KV cache, half a gigabyte by default; blocks of `block_size` tokens are cut from it.
        kv_cache_fraction: instead, a part of the device's memory that is free after the weights are loaded.
        max_batch_tokens: tokens of one step; longer prompts are prefilled in chunks.
        max_num_seqs: sequences that run at once, at most one a token of `max_batch_tokens`.
        num_scheduler_steps: tokens of a sequence that one `step` may sample, where the CPU's packed steps serve the
            model and nothing that runs has stop strings, penalties or a truncated distribution.
        enable_prefix_caching: keep the KV of closed sequences until its blocks are needed, and begin new ones with it.
        share_prefixes: attention reads KV that several sequences of a step have in common once for all of them. It
            changes the speed and not a bit of the results.
        attention: "ours", "sdpa", "flash_attn", "xformers", or "auto", the best that can serve; `explain` says why.
        enforce_eager: no CUDA graphs; a GPU then waits for the host in every step.
        seed: keys the noise of requests that bring no seed of their own.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        load_format: LoadFormat = "auto",
        device: str | torch.device | None = None,
        kv_cache_bytes: int | None = None,
        kv_cache_fraction: float | None = None,
        block_size: int = 16,
        max_batch_tokens: int = 4096,
        max_num_seqs: int = 1024,
        num_scheduler_steps: int = 32,
        vision_cache_bytes: int = 1 << 28,
        enable_prefix_caching: bool = True,
        share_prefixes: bool = True,
        attention: str = "auto",
        enforce_eager: bool = False,
        seed: int = 0,
    ):
        check_kv_size(kv_cache_bytes, kv_cache_fraction)
        check_counts(
            block_size=block_size,
            max_batch_tokens=max_batch_tokens,
            max_num_seqs=max_num_seqs,
            num_scheduler_steps=num_scheduler_steps,
        )
        self.path = checkpoint_directory(path)
        self.config = ModelConfig.from_pretrained(self.path)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = compute_dtype(dtype, self.device)
        text = self.config.text
        target = Target(self.device, dtype, text.num_heads, text.num_kv_heads, text.head_dim, block_size)
        self._choice = choose_backend(attention, target)
        self.weights = ResidentWeights(self.config, self.path, dtype, self.device, load_format)
        self.model = self.weights.model
        size = kv_size(kv_cache_bytes, kv_cache_fraction, self.device)
        self.kv = KVCache(self.config.text, size, block_size, dtype, self.device)
        self.pool = BlockPool(self.kv.num_blocks, block_size)
        self.sequences: dict[int, Sequence] = {}
        self.scheduler = Scheduler(self.pool, max_batch_tokens, max_num_seqs, self.kv.copy, enable_prefix_caching)
        self.attention = self._choice.backend(self.kv, target, share_prefixes)
        self.runner = Runner(self.model, self.attention, block_size, vision_cache_bytes)
        if self.device.type == "cuda" and not enforce_eager:
            self.runner.use_graphs(self.scheduler.max_num_seqs, capture=True)
        self.eos_token_ids = eos_token_ids(self.path) & frozenset(range(self.config.text.vocab_size))
        self.weight_version = 0
        self._launched: Launched | None = None  # a step whose tokens are not known yet
        self._seed = seed
        self._requests = itertools.count()
        self._ordinals = itertools.count()
        self._counts = dict.fromkeys(("steps", "prefill_tokens", "decode_tokens"), 0)
        self._bursts = Bursts(self.scheduler, self.runner, self._counts, num_scheduler_steps)

    # -- sequences ---------------------------------------------------------------------

    def open(self, prompt: Prompt) -> Sequence:
        """A new sequence holding the prompt. Nothing is computed until it runs.

        Raises:
            ValueError: an empty or over-long prompt, placeholders that do not match the images, an undecodable image.
        """
        text, token_ids, images = parse_prompt(prompt)
        inputs = self.image_inputs(images)
        tokens = self.expand(self.processor.tokenizer.encode(text) if token_ids is None else token_ids, inputs)
        if not tokens:
            raise ValueError("the prompt is empty; give at least one token")
        self.check_length(len(tokens), inputs)
        return Sequence(self, tokens, inputs, self.processor.spans(tokens, inputs) if inputs else [])

    def prefill(self, sequences: Seq[Sequence]) -> None:
        """Computes all pending tokens, so that forks share them. Samples nothing."""
        with self._only(sequences):
            for sequence in sequences:
                sequence.check_open()
                if sequence.num_computed < len(sequence):
                    self.submit(sequence, SamplingParams(), max_tokens=0)
            self._drain()

    def submit(
        self,
        sequence: Sequence,
        params: SamplingParams,
        index: int = 0,
        *,
        seed: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """Queues a run of `sequence`; `step` moves it on. For callers that mix runs with other work, such as tools.

        `seed` and `max_tokens` come before those of `params`, which many runs can share; no token: it only prefills.

        Raises:
            ValueError: the sequence is another engine's, or `params` names tokens that the model does not have.
            RuntimeError: it is closed or running, or the engine is asleep.
            OutOfBlocks: its tokens do not fit the KV cache.
        """
        sequence.check_open()
        sequence.check_owner(self)
        if sequence.running:
            raise RuntimeError("the sequence is running already")
        self.weights.check()
        self.kv.check()
        if (seed := params.seed if seed is None else seed) is None:
            seed = derive_seed(self._seed, next(self._requests))
        seed = (operator.index(seed) + 2**63) % 2**64 - 2**63  # its low 64 bits, as int64
        room, more = self.config.text.max_position_embeddings, params.max_tokens if max_tokens is None else max_tokens
        limit = room if more is None else min(len(sequence) + more, room)
        if params.detokenize and limit > len(sequence):
            _ = self.processor.tokenizer  # what it lacks is said now, not when the tokens are there
        stop = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.eos_token_ids)
        shaper = make_shaper(params, len(sequence), stop, self.config, lambda text: self.processor.encode_text(text))
        self.scheduler.add(Request(sequence, params, seed, len(sequence), limit, stop, shaper, index))

    def step(self, most: int | None = None) -> list[tuple[Sequence, CompletionOutput]]:
        """One batch step, or several (`num_scheduler_steps`, `most` of them) where nothing between them needs the host.

        Returns the runs that it finished, in the order in which they were submitted.
        """
        check_counts(most=self._bursts.most if most is None else most)
        launched, self._launched = self._launched, None
        if not self.scheduler.has_work:
            return []
        batch = self.scheduler.decoding
        if launched is None or not len(batch):  # all its rows were aborted
            chunks = self.scheduler.schedule()
            self._count(len(batch), chunks)
            launched = None if chunks or self.runner.graphs is None else self.runner.graphs.launch(batch)
            if launched is None:
                finished = None if chunks else self._bursts.run(batch, most or self._bursts.most)
                return self._compute(batch, chunks) if finished is None else self._finish(finished)
        if self.scheduler.reserve_ahead():  # the next step begins before this one's tokens are known
            launched.ahead = True
            assert self.runner.graphs is not None
            self._launched = self.runner.graphs.launch(batch, launched)
            if self._launched is not None:
                self._count(len(batch), [])
        return self._take(batch, launched)

    def _count(self, decoding: int, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self._counts["decode_tokens" if not chunk.writes else "prefill_tokens"] += chunk.stop - chunk.start
        self._counts["decode_tokens"] += decoding
        self._counts["steps"] += 1

    def _compute(self, batch: DecodeBatch, chunks: list[Chunk]) -> list[tuple[Sequence, CompletionOutput]]:
        """One step, computed and waited for."""
        sampled = self.runner.step(batch, chunks)
        for chunk in chunks:
            self.scheduler.seal(chunk.request.sequence, chunk.start // self.pool.block_size)
        finished = {chunk.request for chunk in chunks if not chunk.request.samples and chunk.request.pending == 0}
        tokens = sampled.tokens.tolist()
        finished |= append_sampled(
            self._decode, batch.requests + sampled.requests, tokens, sampled.logprobs, sampled.entropies
        )
        batch.advance(sampled.tokens[: len(batch)])
        self.scheduler.start_decoding(request for request in sampled.requests if request not in finished)
        return self._finish(finished)

    def _take(self, batch: DecodeBatch, launched: Launched) -> list[tuple[Sequence, CompletionOutput]]:
        """Waits for a step that was launched. Rows that left the batch since are passed over."""
        tokens, logprobs, entropies = launched.results()
        rows = launched.rows_of(batch.requests)
        picked = rows.tolist()
        finished = append_sampled(
            self._decode,
            batch.requests,
            tokens[rows].tolist(),
            [logprobs[row] for row in picked],
            [entropies[row] for row in picked],
        )
        if launched.ahead:
            batch.token[:] = tokens[rows]
        else:
            batch.advance(tokens[rows])
        return self._finish(finished)

    def _decode(self, token_ids: Seq[int], skip_special_tokens: bool) -> str:
        return self.processor.decode(token_ids, skip_special_tokens)

    def _finish(self, finished: set[Request]) -> list[tuple[Sequence, CompletionOutput]]:
        if not finished:
            return []
        self.scheduler.remove(finished)
        in_order = sorted(finished, key=lambda request: request.arrival)
        return [(request.sequence, self._output(request)) for request in in_order]

    def run(
        self, sequences: Seq[Sequence], sampling_params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> list[CompletionOutput]:
        """Decodes each sequence until it stops; `sampling_params` is one for all or one each. Sequences stay open.

        On an error none of them runs any longer; the tokens so far stay.

        Raises:
            ValueError: the same sequence twice, not one of `sampling_params` for each, or one with n above 1.
            RuntimeError: a sequence is closed, the engine is asleep, or other runs are in flight.
            OutOfBlocks: one sequence alone does not fit the KV cache.
        """
        with self._only(sequences):
            self._submit_each(sequences, sampling_params)
            done = {id(sequence): output for sequence, output in self._drain()}
        return [done[id(sequence)] for sequence in sequences]

    def stream(
        self, sequences: Seq[Sequence], sampling_params: SamplingParams | Seq[SamplingParams] | None = None
    ) -> Iterator[tuple[Sequence, CompletionOutput]]:
        """`run`, step by step: what each sequence has after every new token. Its last output has a finish_reason.

        Leaving the loop early aborts what still runs; the tokens so far stay. Inside the loop sequences may be forked,
        closed and aborted. Raises what `run` raises, when the loop begins.
        """
        with self._only(sequences):
            self._submit_each(sequences, sampling_params)
            while self.scheduler.has_work:
                done = self.step(1)
                for request in list(self.scheduler.decoding.requests):  # all of them have just sampled
                    if request.sequence.request is request:
                        yield request.sequence, self._output(request, running=True)
                yield from done

    def _submit_each(
        self, sequences: Seq[Sequence], sampling_params: SamplingParams | Seq[SamplingParams] | None
    ) -> None:
        params = one_each(sampling_params, len(sequences))
        if len({id(sequence) for sequence in sequences}) < len(sequences):
            raise ValueError("the same sequence is given twice; fork it to continue it twice")
        if many := next((p.n for p in params if p.n > 1), None):
            raise ValueError(f"SamplingParams.n is {many}, but a sequence has one continuation; fork it {many} times")
        for index, (sequence, p) in enumerate(zip(sequences, params, strict=True)):
            self.submit(sequence, p, index)

    def abort(self, sequence: Sequence) -> None:
        """Takes a running sequence out of the batch; its tokens so far stay."""
        sequence.check_owner(self)
        if sequence.request is not None:
            self.scheduler.remove({sequence.request})

    @contextmanager
    def _only(self, sequences: Seq[Sequence]) -> Iterator[None]:
        """Nothing but `sequences` runs inside, and none of them afterwards, however it ends."""
        for sequence in sequences:
            sequence.check_owner(self)
        if self.scheduler.has_work:
            raise RuntimeError("other sequences run; step until they have finished, or abort them first")
        try:
            yield
        finally:
            for sequence in sequences:
                self.abort(sequence)

    # -- vLLM's interface ---------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """`n` continuations of every prompt, in order. A prompt is prefilled once and its continuations are forks."""
        prompts = as_prompts(prompts)
        params = one_each(sampling_params, len(prompts))
        roots: list[Sequence] = []
        branches: list[Sequence] = []
        try:
            for prompt in prompts:
                roots.append(self.open(prompt))
            self.prefill([root for root, p in zip(roots, params, strict=True) if p.n > 1])
            for root, p in zip(roots, params, strict=True):
                base = derive_seed(self._seed, next(self._requests)) if p.seed is None else p.seed
                for index in range(p.n):
                    branches += root.fork()  # one by one, so that all are known here if something interrupts
                    self.submit(branches[-1], p, index, seed=base if p.n == 1 else derive_seed(base, index))
                if p.n == 1:
                    root.drop_kv()
            outputs = {id(sequence): output for sequence, output in self._drain(use_tqdm, len(branches))}
        finally:
            for sequence in branches + roots:
                sequence.close()
        rest = iter(branches)
        forks = [list(itertools.islice(rest, p.n)) for p in params]
        return [
            RequestOutput(
                str(index),
                prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, dict) else None,
                list(root.token_ids),
                [outputs[id(branch)] for branch in mine],
                num_cached_tokens=max(sequence.num_cached for sequence in (root, *mine)),
            )
            for index, (prompt, root, mine) in enumerate(zip(prompts, roots, forks, strict=True))
        ]

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
        tools: list[dict[str, Any]] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Renders conversations with the checkpoint's template, or with `chat_template`, and generates.

        A message's content is text, or a list of {"type": "text", "text": …}, {"type": "image", "image": …} and
        {"type": "image_url", "image_url": {"url": …}}, where an image is a PIL image, a path, or a file: or data: URL.
        chat_template_kwargs: what the template takes besides, such as enable_thinking.

        Raises:
            ValueError: a part of another type, no template, or what `open` raises.
        """
        conversations: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        options = {"chat_template": chat_template, "continue_final_message": continue_final_message}
        options |= {"add_generation_prompt": add_generation_prompt, **(chat_template_kwargs or {})}
        return self.generate([self.chat_prompt(c, tools, options) for c in conversations], sampling_params, use_tqdm)

    # -- shared by the above and by Sequence --------------------------------------------

    def next_ordinal(self) -> int:
        return next(self._ordinals)

    def _drain(self, progress: bool = False, total: int = 0) -> list[tuple[Sequence, CompletionOutput]]:
        from tqdm.auto import tqdm  # here, so that importing the engine stays quick

        finished: list[tuple[Sequence, CompletionOutput]] = []
        with tqdm(total=total, desc="generate", unit="seq", disable=not progress) as bar:
            while self.scheduler.has_work:
                new = self.step()
                finished += new
                bar.update(len(new))
        return finished

    def _output(self, request: Request, running: bool = False) -> CompletionOutput:
        tokens, params, stopped_by = request.sequence.token_ids[request.start :], request.params, request.stopped_by
        return CompletionOutput(
            request.index,
            text_of(self.processor.decode, tokens, params, stopped_by) if params.detokenize and tokens else "",
            tokens,
            list(request.logprobs),
            list(request.entropies),
            None if running else "length" if stopped_by is None else "stop",
            stopped_by,
            list(request.processed_logprobs) if params.processed_logprobs else None,
            list(request.top_logprobs) if params.logprobs else None,
        )
