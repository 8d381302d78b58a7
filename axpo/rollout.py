"""The agent loop: rollouts and resamples think, call tools and answer, each at its own pace over one engine."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from PIL import Image

from axpo.conversation import Conversation
from axpo.grading import grade
from axpo.resample import Candidate, call_uncertainty
from axpo.tasks import Question
from axpo.tools import ToolResult
from axpo.tools.parse import ParsedCall
from axpo.trajectory import OBSERVATION, PROMPT, SAMPLED, Status, ToolCall, Trajectory
from engine import LLM, CompletionOutput, SamplingParams, derive_seed
from engine import Sequence as EngineSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sampling and stopping of a trajectory; the fields are those of the config's rollout and eval sections."""

    max_turns: int
    max_new_tokens: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(slots=True, eq=False)
class Branch:
    """A rollout in progress: the engine's sequence, and what is known of each of its tokens."""

    id: str
    group: int
    question: Question
    sequence: EngineSequence
    seed: int
    images: list[Image.Image]
    prompt_len: int
    roles: list[int]
    logprobs: list[float | None]
    entropies: list[float | None]
    parent: str | None = None
    fork_token: int | None = None
    turn: int = 0
    turn_start: int = 0
    calls: list[ToolCall] = field(default_factory=list)
    status: Status | None = None
    reward: float = 0.0

    @property
    def sampled(self) -> int:
        return self.roles.count(SAMPLED)

    def record(self, role: int, logprobs: Sequence[float | None], entropies: Sequence[float | None]) -> None:
        self.roles += [role] * len(logprobs)
        self.logprobs += logprobs
        self.entropies += entropies


class Agent:
    """Rolls trajectories out. Finished branches keep their KV until `close`, so that they can be resampled.

    Args:
        llm: the engine, whose weights are the policy.
        conversation: the checkpoint's template with the tools on offer.
        seed: the run's; a branch's noise depends on (seed, step, question, branch) and the position, on nothing else.
    """

    def __init__(self, llm: LLM, conversation: Conversation, seed: int, tool_workers: int = 8):
        self.llm = llm
        self.conversation = conversation
        self.seed = seed
        self.interrupted: Callable[[], bool] = lambda: False
        """Asked after every engine step: rollouts return at once, unfinished, when it says so."""
        self._pool = ThreadPoolExecutor(tool_workers, thread_name_prefix="tool")

    def rollouts(
        self, step: int, questions: Sequence[tuple[int, Question]], size: int, limits: Limits
    ) -> list[list[Branch]]:
        """`size` rollouts of every (group number, question): the prompt is computed once and forked."""
        self.llm.reset_prefix_cache()  # bits must not depend on what ran before: a resumed run has no such past
        groups = []
        roots = [self._open(question, limits) for _, question in questions]
        self.llm.prefill(roots)
        for (group, question), root in zip(questions, roots, strict=True):
            length = len(root)
            branches = [
                Branch(
                    id=f"{step}/{question.id}/{index}",
                    group=group,
                    question=question,
                    sequence=sequence,
                    seed=derive_seed(self.seed, step, question.id, index),
                    images=list(question.images),
                    prompt_len=length,
                    roles=[PROMPT] * length,
                    logprobs=[None] * length,
                    entropies=[None] * length,
                    turn_start=length,
                )
                for index, sequence in enumerate(root.fork(size))
            ]
            root.close()
            groups.append(branches)
        self._advance([branch for group in groups for branch in group], limits)
        return groups

    def resample(
        self, step: int, selected: Iterable[Candidate], sources: dict[str, Branch], count: int, limits: Limits
    ) -> dict[str, list[Branch]]:
        """`count` continuations of every selected prefix, forked from the source's KV: nothing is prefilled."""
        continuations = {c.source: self._fork(step, sources[c.source], c.fork_token, count) for c in selected}
        self._advance([branch for branches in continuations.values() for branch in branches], limits)
        return continuations

    def close(self, branches: Iterable[Branch]) -> None:
        for branch in branches:
            branch.sequence.close()

    def trajectory(self, branch: Branch, step: int) -> Trajectory:
        """The finished branch as it is trained and written; credit is assigned later."""
        assert branch.status is not None, f"branch {branch.id} has not ended"
        sequence = branch.sequence
        tokens = list(sequence.token_ids)
        trajectory = Trajectory(
            step=step,
            question_id=branch.question.id,
            group=branch.group,
            id=branch.id,
            parent=branch.parent,
            fork_token=branch.fork_token,
            prompt_len=branch.prompt_len,
            tokens=tokens,
            roles=branch.roles,
            loss_mask=[0] * len(tokens),
            logprobs=branch.logprobs,
            entropies=branch.entropies,
            advantages=[0.0] * len(tokens),
            reward=branch.reward,
            status=branch.status,
            tool_calls=branch.calls,
            confidence=None,
            text=self.conversation.processor.decode(tokens[branch.prompt_len :]),
            images=list(sequence.images),
            positions=self.conversation.processor.positions(tokens, sequence.images),
        )
        uncertainty = call_uncertainty(trajectory)
        trajectory.confidence = uncertainty[0] if uncertainty else None
        return trajectory

    def _open(self, question: Question, limits: Limits) -> EngineSequence:
        images = self.llm.image_inputs(question.images)
        tokens = self.conversation.prompt(question.messages, images)
        if len(tokens) >= limits.max_tokens:
            raise ValueError(
                f"question {question.id!r}: its prompt has {len(tokens)} tokens, rollout.max_tokens is "
                f"{limits.max_tokens}; raise it, or shorten the question or its images"
            )
        return self.llm.open({"prompt_token_ids": tokens, "multi_modal_data": {"image": images}})

    def _fork(self, step: int, source: Branch, at: int, count: int) -> list[Branch]:
        call = source.calls[0]
        return [
            Branch(
                id=f"{source.id}/r{index}",
                group=source.group,
                question=source.question,
                sequence=sequence,
                seed=derive_seed(self.seed, step, source.question.id, source.id, at, index),
                images=list(source.question.images),  # the fork is at the first call: no tool has answered yet
                prompt_len=source.prompt_len,
                roles=source.roles[:at],
                logprobs=source.logprobs[:at],
                entropies=source.entropies[:at],
                parent=source.id,
                fork_token=at,
                turn=call.turn,
                turn_start=max(i for i in range(call.start + 1) if source.roles[i] != SAMPLED) + 1,
            )
            for index, sequence in enumerate(source.sequence.fork(count, at))
        ]

    def _advance(self, branches: list[Branch], limits: Limits) -> None:
        """Moves every branch to its end. It waits for its own tools only, and decoding for none but inline ones."""
        by_sequence = {id(branch.sequence): branch for branch in branches}
        tools: dict[Future[list[ToolResult]], Branch] = {}
        for branch in branches:
            self._submit(branch, limits)
        while (self.llm.scheduler.has_work or tools) and not self.interrupted():
            for sequence, output in self.llm.step():
                branch = by_sequence[id(sequence)]
                calls = self._end_turn(branch, output, limits)
                if calls and all(call.name is None or self.conversation.inline(call.name) for call in calls):
                    self._observe(branch, self._call_tools(branch, calls), limits)
                elif calls:
                    tools[self._pool.submit(self._call_tools, branch, calls)] = branch
            idle = not self.llm.scheduler.has_work
            done, _ = wait(tools, timeout=None if idle else 0, return_when=FIRST_COMPLETED) if tools else ((), ())
            # In the order of submission, so that a batch does not depend on which thread was faster.
            for future in [future for future in tools if future in done]:
                self._observe(tools.pop(future), future.result(), limits)

    def _submit(self, branch: Branch, limits: Limits) -> None:
        """Queues the branch's next turn, or ends it where no token is left to sample."""
        room = min(limits.max_new_tokens - branch.sampled, limits.max_tokens - len(branch.sequence))
        if room < 1:
            branch.status = "length"
            return
        params = SamplingParams(
            temperature=limits.temperature,
            top_p=limits.top_p,
            top_k=limits.top_k,
            max_tokens=room,
            seed=branch.seed,
            stop_token_ids=(self.conversation.end_of_turn,),
            detokenize=False,
        )
        self.llm.submit(branch.sequence, params)

    def _end_turn(self, branch: Branch, output: CompletionOutput, limits: Limits) -> list[ParsedCall]:
        """Records a turn. Returns the calls to run; none when the trajectory has ended."""
        branch.record(SAMPLED, output.logprobs, output.entropies)
        turn = branch.sequence.token_ids[branch.turn_start :]
        calls = self.conversation.calls(turn)
        branch.calls += [_as_tool_call(call, branch) for call in calls]
        branch.turn += 1
        if output.stop_reason != self.conversation.end_of_turn:
            branch.status = "length"
        elif not calls:
            branch.status = "answered"
            text = self.conversation.processor.decode(turn)
            branch.reward = grade(text, branch.question.answer, thinking=self.conversation.thinks)
        elif branch.turn >= limits.max_turns:
            branch.status = "turn_limit"
        else:
            return calls
        for made in branch.calls[len(branch.calls) - len(calls) :]:
            made.ok, made.error = False, made.error or f"not run: the trajectory ended ({branch.status})"
        return []

    def _call_tools(self, branch: Branch, calls: Sequence[ParsedCall]) -> list[ToolResult]:
        """Runs a turn's calls one after another, on a worker thread; a crop is visible to the next call."""
        results = []
        for call, made in zip(calls, branch.calls[len(branch.calls) - len(calls) :], strict=True):
            if call.error is None and call.name is not None and call.arguments is not None:
                try:
                    result = self.conversation.tools[call.name].call(call.arguments, branch.images)
                except Exception as error:  # a fault of the tool costs this call, not the run
                    result = ToolResult.failure(f"the tool {call.name} failed: {type(error).__name__}: {error}")
            else:
                result = ToolResult.failure(call.error or "the tool call is malformed")
            made.ok, made.error = result.ok, result.error
            branch.images += result.images
            results.append(result)
        return results

    def _observe(self, branch: Branch, results: Sequence[ToolResult], limits: Limits) -> None:
        """Appends the tool responses and starts the next turn."""
        images = self.llm.image_inputs([image for result in results for image in result.images])
        tokens = self.conversation.observation(results, images)
        if len(branch.sequence) + len(tokens) >= limits.max_tokens:
            branch.status = "length"
            return
        branch.sequence.extend(tokens, images)
        branch.record(OBSERVATION, [None] * len(tokens), [None] * len(tokens))
        branch.turn_start = len(branch.sequence)
        self._submit(branch, limits)


def _as_tool_call(call: ParsedCall, branch: Branch) -> ToolCall:
    start, end = branch.turn_start + call.start, branch.turn_start + call.end
    return ToolCall(call.name, call.arguments, False, call.error, branch.turn, start, end)
