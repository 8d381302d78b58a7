"""The agent loop: rollouts and resamples think, call tools and answer, each at its own pace over one engine."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from typing import Protocol

from axpo.branch import Branch, Limits
from axpo.calls import TurnCalls, Workers
from axpo.conversation import Conversation
from axpo.forks import call_uncertainty
from axpo.grading import Grade, Grader
from axpo.tasks import Question
from axpo.tools import ToolResult
from axpo.tools.parse import ParsedCall
from axpo.trajectory import OBSERVATION, PROMPT, SAMPLED, ToolCall, Trajectory
from engine import LLM, CompletionOutput, ImageInput, SamplingParams, derive_seed
from engine import Sequence as EngineSequence

_POLL_S = 0.002
"""Between looks at what other ranks have finished, when this one has nothing to compute."""


Result = list[ToolResult] | Grade | None
"""What became of a turn: what its tools answered, what its answer is worth; None where nothing is to be done (yet)."""

Pending = dict[Future[Result], tuple[Branch, TurnCalls | None]]
"""Whom worker threads work for, and the calls that they make; None: they compare an answer."""


class Followup(Protocol):
    """What comes after a branch: more branches, at once or later."""

    def ended(self, branch: Branch) -> Sequence[Branch]:
        """The branch has its status and its reward. Returns branches to advance as well."""
        ...

    def poll(self) -> Sequence[Branch] | None:
        """Called between engine steps. Branches to advance as well; None when no more can come."""
        ...


class InterruptedRollouts(Exception):
    """The run was asked to stop: what was rolled out of this step is given up."""


class Agent:
    """Rolls trajectories out. Finished branches keep their KV until `close`, so that they can be resampled.

    Args:
        llm: the engine, whose weights are the policy.
        conversation: the checkpoint's template with the tools on offer.
        grader: compares final answers; None: one without a judge.
        seed: the run's; a branch's noise depends on (seed, step, question, branch) and the position, on nothing else.
    """

    def __init__(
        self, llm: LLM, conversation: Conversation, seed: int, grader: Grader | None = None, tool_workers: int = 8
    ):
        self.llm = llm
        self.grader = grader or Grader()
        self.conversation = conversation
        self.seed = seed
        self.tool_wait_s = 0.0
        self.interrupted: Callable[[], bool] = lambda: False
        """Asked after every engine step: rollouts end in InterruptedRollouts when it says so."""
        self.patience_s = math.inf
        """Longest wait for other ranks' groups, with nothing of its own to do."""
        self._workers = Workers(tool_workers)

    def rollouts(
        self, step: int, questions: Sequence[tuple[int, Question]], size: int, limits: Limits
    ) -> list[list[Branch]]:
        """`start`, and every rollout advanced to its end."""
        groups = self.start(step, questions, size, limits)
        self.advance([branch for group in groups for branch in group], limits)
        return groups

    def start(
        self, step: int, questions: Sequence[tuple[int, Question]], size: int, limits: Limits
    ) -> list[list[Branch]]:
        """`size` rollouts of every (group number, question): the prompt is computed once and forked."""
        self.llm.reset_prefix_cache()  # bits must not depend on what ran before: a resumed run has no such past
        groups = []
        images = iter(self._images_of(question for _, question in questions))
        roots = [self._open(question, list(islice(images, len(question.images))), limits) for _, question in questions]
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
        return groups

    def fork(self, step: int, source: Branch, at: int, count: int) -> list[Branch]:
        """`count` continuations of the source's first `at` tokens, from the KV it holds: nothing is prefilled.

        Turns, calls and images before the fork are theirs as well.
        """
        roles = source.roles[:at]
        turns = sum(roles[i] == OBSERVATION != roles[i - 1] for i in range(1, at))
        observed = source.observations[:turns]
        results = [result for turn in observed for result in turn]
        calls = [call for call in source.calls if call.end <= at]
        return [
            Branch(
                id=f"{source.id}/r{index}",
                group=source.group,
                question=source.question,
                sequence=sequence,
                seed=derive_seed(self.seed, step, source.question.id, source.id, at, index),
                images=[*source.question.images, *(image for result in results for image in result.images)],
                prompt_len=source.prompt_len,
                roles=roles[:],
                logprobs=source.logprobs[:at],
                entropies=source.entropies[:at],
                parent=source.id,
                fork_token=at,
                turn=turns,
                turn_start=max(i for i in range(at) if roles[i] != SAMPLED) + 1,
                calls=[replace(call) for call in calls],
                observations=list(observed),
                inherited=list(zip(calls, results, strict=True)),
            )
            for index, sequence in enumerate(source.sequence.fork(count, at))
        ]

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
            grade_error=branch.grade_error,
        )
        uncertainty = call_uncertainty(trajectory)
        trajectory.confidence = uncertainty[0] if uncertainty else None
        return trajectory

    def _images_of(self, questions: Iterable[Question]) -> list[ImageInput]:
        """All in one reading; ValueError names the question whose image this model does not take."""
        questions = list(questions)
        try:
            return self.llm.image_inputs([image for question in questions for image in question.images])
        except ValueError as error:
            if len(questions) > 1:
                return [image for question in questions for image in self._images_of([question])]
            raise ValueError(f"question {questions[0].id!r}: {error}") from error

    def _open(self, question: Question, images: list[ImageInput], limits: Limits) -> EngineSequence:
        if limits.max_images and len(images) > limits.max_images:
            raise ValueError(
                f"question {question.id!r}: {len(images)} images, rollout.max_images is {limits.max_images}; raise it, "
                "or leave the question out"
            )
        try:
            tokens = self.conversation.prompt(question.messages, images)
        except ValueError as error:
            raise ValueError(f"question {question.id!r}: {error}") from error
        if len(tokens) >= limits.max_tokens:
            raise ValueError(
                f"question {question.id!r}: its prompt has {len(tokens)} tokens, rollout.max_tokens is "
                f"{limits.max_tokens}; raise it, or shorten the question or its images"
            )
        return self.llm.open({"prompt_token_ids": tokens, "multi_modal_data": {"image": images}})

    def advance(self, branches: Iterable[Branch], limits: Limits, then: Followup | None = None) -> None:
        """Moves every branch to its end, each at its own pace, and with them those that `then` adds.

        A branch waits for its own tools only, and decoding for none but inline ones.
        """
        active: dict[int, Branch] = {}
        pending: Pending = {}

        def begin(new: Iterable[Branch]) -> None:
            for branch in new:
                active[id(branch.sequence)] = branch
                self._submit(branch, limits)
                settle(branch)

        def settle(branch: Branch) -> None:
            if branch.status is not None and not branch.grading:
                del active[id(branch.sequence)]
                branch.end_sessions()
                begin(then.ended(branch) if then is not None else ())

        def take(results: Sequence[tuple[Branch, Result]]) -> None:
            self._take(results, limits)
            for branch, _ in results:
                settle(branch)

        begin(branches)
        idle_since = math.inf
        while True:
            if self.interrupted():
                raise InterruptedRollouts
            ended = [(active[id(sequence)], output) for sequence, output in self.llm.step()]
            take([(branch, self._turn(branch, output, limits, pending)) for branch, output in ended])
            # In the order of submission, so that a batch does not depend on which thread was faster.
            finished = self._finished(pending, limits, wait_for_one=not self.llm.scheduler.has_work)
            take([(pending.pop(future)[0], future.result()) for future in finished])
            more = then.poll() if then is not None else None
            begin(more or ())
            if not (self.llm.scheduler.has_work or pending):
                if more is None:
                    return
                idle_since = min(idle_since, time.monotonic())
                if time.monotonic() - idle_since > self.patience_s:
                    raise TimeoutError(f"no word from the other ranks for run.timeout_s = {self.patience_s:g} s")
                time.sleep(_POLL_S)
            else:
                idle_since = math.inf

    def _turn(self, branch: Branch, output: CompletionOutput, limits: Limits, pending: Pending) -> Result:
        """Records a turn, and calls its tools or grades its answer: what is quick now, the rest on a worker thread."""
        if calls := self._end_turn(branch, output, limits):
            shorten = partial(self.conversation.shorten, max_tokens=limits.max_observation_tokens)
            made = TurnCalls(branch, calls, self.conversation.tools, shorten)
            if all(call.name is None or self.conversation.inline(call.name) for call in calls):
                return made()
            pending[self._workers.submit(made)] = branch, made
        elif branch.status == "answered":
            text = self.conversation.processor.decode(branch.sequence.token_ids[branch.turn_start :])
            if self.grader.inline(branch.question.rubric):
                branch.take_grade(self._grade(branch, text))
            else:
                branch.grading = True
                pending[self._workers.submit(partial(self._grade, branch, text))] = branch, None
        return None

    def _grade(self, branch: Branch, text: str) -> Grade:
        question = branch.question
        return self.grader.grade(text, question.rubric, question=question.text, thinking=self.conversation.thinks)

    def _finished(self, pending: Pending, limits: Limits, *, wait_for_one: bool) -> list[Future[Result]]:
        """What is done, in the order of submission; calls whose time is up are, too."""
        if not pending:
            return []
        soonest = math.inf
        for future, (_, calls) in pending.items():
            if calls is None:
                continue
            if (left := calls.left(limits.tool_timeout_s)) <= 0:
                self._workers.give_up(future, calls.give_up(limits.tool_timeout_s))
            soonest = min(soonest, left)
        begun = time.perf_counter()
        longest = max(0.0, soonest) if wait_for_one else 0.0
        done, _ = wait(pending, timeout=None if math.isinf(longest) else longest, return_when=FIRST_COMPLETED)
        if wait_for_one:
            self.tool_wait_s += time.perf_counter() - begun
        return [future for future in pending if future in done]

    def _submit(self, branch: Branch, limits: Limits) -> None:
        """Queues the branch's next turn, or ends it where no token is left to sample."""
        room = min(limits.max_new_tokens - branch.sampled, limits.max_tokens - len(branch.sequence))
        if room < 1:
            branch.status = "length"
            return
        params = _sampling_params(limits, self.conversation.end_of_turn)
        self.llm.submit(branch.sequence, params, seed=branch.seed, max_tokens=room)

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
        elif branch.turn >= limits.max_turns:
            branch.status = "turn_limit"
        else:
            return calls
        for made in branch.calls[len(branch.calls) - len(calls) :]:
            made.ok, made.error = False, made.error or f"not run: the trajectory ended ({branch.status})"
        return []

    def _take(self, results: Sequence[tuple[Branch, Result]], limits: Limits) -> None:
        """Shows what tools answered, the images of all in one reading, and notes what answers are worth."""
        fewer = [_fewer(branch, result, limits) for branch, result in results if isinstance(result, list)]
        read = iter(self._read([answer for answers in fewer for answer in answers]))
        for branch, result in results:
            if isinstance(result, list):
                self._observe(branch, list(islice(read, len(result))), limits)
            elif result is not None:
                branch.take_grade(result)

    def _read(self, results: list[ToolResult]) -> list[tuple[ToolResult, list[ImageInput]]]:
        """Each result with its images for the engine; one with an image that this model does not take has failed."""
        try:
            images = iter(self.llm.image_inputs([image for result in results for image in result.images]))
            return [(result, list(islice(images, len(result.images)))) for result in results]
        except ValueError as error:
            if len(results) > 1:
                return [pair for result in results for pair in self._read([result])]
            failed = ToolResult.failure(f"its image cannot be shown: {error}")
            return [(replace(failed, seconds=results[0].seconds), [])]

    def _observe(self, branch: Branch, results: Sequence[tuple[ToolResult, list[ImageInput]]], limits: Limits) -> None:
        """Appends the tool responses and starts the next turn."""
        for (result, _), made in zip(results, branch.calls[len(branch.calls) - len(results) :], strict=True):
            made.ok, made.error, made.seconds, made.timed_out = (
                result.ok,
                result.error,
                result.seconds,
                result.timed_out,
            )
            branch.images += result.images
        shown, images = [result for result, _ in results], [image for _, read in results for image in read]
        tokens = self.conversation.observation(shown, images)
        if len(branch.sequence) + len(tokens) >= limits.max_tokens:
            branch.status = "length"
            return
        branch.observations.append(shown)
        branch.sequence.extend(tokens, images)
        branch.record(OBSERVATION, [None] * len(tokens), [None] * len(tokens))
        branch.turn_start = len(branch.sequence)
        self._submit(branch, limits)


def _fewer(branch: Branch, results: Sequence[ToolResult], limits: Limits) -> list[ToolResult]:
    """The results with as many images as the branch may still be shown, and a note where some are left out."""
    room = limits.max_images - len(branch.images)
    out = []
    for result in results:
        kept = result.images[: max(0, room)] if limits.max_images else result.images
        room -= len(kept)
        if left_out := len(result.images) - len(kept):
            note = f"({left_out} images left out: a conversation has at most {limits.max_images})"
            result = replace(result, text=f"{result.text}\n{note}".lstrip(), images=kept)
        out.append(result)
    return out


@lru_cache(maxsize=16)
def _sampling_params(limits: Limits, end_of_turn: int) -> SamplingParams:
    """Of every turn; its seed and the tokens that are left are the branch's."""
    return SamplingParams(
        temperature=limits.temperature,
        top_p=limits.top_p,
        top_k=limits.top_k,
        presence_penalty=limits.presence_penalty,
        max_tokens=None,
        stop_token_ids=(end_of_turn,),
        detokenize=False,
    )


def _as_tool_call(call: ParsedCall, branch: Branch) -> ToolCall:
    start, end = branch.turn_start + call.start, branch.turn_start + call.end
    return ToolCall(call.name, call.arguments, False, call.error, branch.turn, start, end)
