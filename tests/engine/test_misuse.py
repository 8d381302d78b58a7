"""What callers do wrong: each a clear error, after which the pool holds what it held and everything goes on."""

import copy
import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import LLM, ImageInput, OutOfBlocks, SamplingParams
from engine.sequence import Sequence
from tests.engine.checkpoints import IMAGE, VISION_END, VISION_START
from tests.engine.pool_model import PoolModel

BLOCK = 8
PARAMS = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(vl_checkpoint: Path) -> LLM:
    llm = LLM(vl_checkpoint, kv_cache_bytes=1 << 22, block_size=BLOCK)
    return LLM(vl_checkpoint, kv_cache_bytes=llm.kv.bytes_per_block * 16, block_size=BLOCK, max_batch_tokens=12)


@pytest.fixture(scope="module")
def model(engine: LLM) -> PoolModel:
    return PoolModel(engine)


@pytest.fixture
def llm(engine: LLM, model: PoolModel) -> Iterator[LLM]:
    """16 blocks of 8 tokens. Afterwards nothing is held, and a run is what it was."""
    expected = engine.generate([[10, 11, 12]], PARAMS, use_tqdm=False)[0].outputs[0]
    yield engine
    assert engine.stats()["blocks_used"] == 0 and not engine.sequences and not engine.scheduler.has_work
    model.check([])
    model.check_lists()
    actual = engine.generate([[10, 11, 12]], PARAMS, use_tqdm=False)[0].outputs[0]
    assert actual.token_ids == expected.token_ids


@pytest.fixture(scope="module")
def picture(engine: LLM) -> ImageInput:
    pixels = np.random.default_rng(3).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return engine.processor.image(Image.fromarray(pixels))


def shown(picture: ImageInput) -> list[int]:
    return [VISION_START, *[IMAGE] * picture.num_tokens, VISION_END]


def refused(llm: LLM, call: Callable[[], object], error: type[Exception], message: str) -> None:
    """`call` raises, and changes neither tokens nor blocks nor what runs."""

    def state():
        sequences = [(list(s.token_ids), list(s.block_table), len(s.spans)) for s in llm.sequences.values()]
        return sequences, list(llm.pool.refs), len(llm.scheduler.waiting), len(llm.scheduler.running)

    before = state()
    with pytest.raises(error, match=message):
        call()
    assert state() == before


def test_forks_that_cannot_be(llm: LLM, picture: ImageInput) -> None:
    prompt = {"prompt_token_ids": [9, *shown(picture), 9], "multi_modal_data": {"image": [picture]}}
    with llm.open(prompt) as root:
        for held in (False, True):
            for at in range(3, 2 + picture.num_tokens):
                refused(llm, lambda at=at: root.fork(at=at), ValueError, f"at={at} is inside an image, tokens 2")
            for at in (-1, 0, len(root) + 1):
                refused(llm, lambda at=at: root.fork(at=at), ValueError, f"at={at}: .* must be in 1 … {len(root)}")
            refused(llm, lambda: root.fork(-1), ValueError, "n=-1")
            assert root.fork(0) == []
            if not held:
                llm.run([root], PARAMS)


def test_a_closed_sequence_does_nothing(llm: LLM) -> None:
    root = llm.open([10, 11, 12])
    other = llm.open([13])
    llm.run([root], PARAMS)
    root.close()
    for call in (
        lambda: root.extend([10]),
        lambda: root.fork(),
        lambda: llm.run([root], PARAMS),
        lambda: llm.run([other, root], PARAMS),
        lambda: llm.prefill([other, root]),
        lambda: list(llm.stream([other, root], PARAMS)),
    ):
        refused(llm, call, RuntimeError, "the sequence is closed")
        assert not other.running
    root.close()
    other.close()


def test_two_runs_at_once(llm: LLM) -> None:
    one, two = llm.open([10, 11, 12]), llm.open([20, 21])
    refused(llm, lambda: llm.run([one, one], PARAMS), ValueError, "given twice")
    refused(llm, lambda: llm.run([one, two], [PARAMS]), ValueError, "1 sampling params for 2")
    llm.submit(one, PARAMS)
    refused(llm, lambda: llm.submit(one, PARAMS), RuntimeError, "running already")
    refused(llm, lambda: one.extend([3]), RuntimeError, "cannot be extended")
    refused(llm, one.drop_kv, RuntimeError, "running sequence needs its KV")
    for call in (
        lambda: llm.run([two], PARAMS),
        lambda: llm.prefill([two]),
        lambda: next(llm.stream([two], PARAMS)),
        lambda: llm.generate([[10]], PARAMS, use_tqdm=False),
    ):
        refused(llm, call, RuntimeError, "other sequences run")
    refused(llm, llm.sleep, RuntimeError, "sleep while")
    refused(llm, lambda: llm.update_weights({}), RuntimeError, "new weights while")
    refused(llm, llm.weights_updated, RuntimeError, "new weights while")
    assert len(llm.step()) == 0 and one.running
    for sequence in (one, two):
        sequence.close()


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_while_waiting_prefilling_and_decoding(llm: LLM, steps: int) -> None:
    """A prompt of 30 tokens is prefilled in three steps of 12; the second request waits, then prefills beside it."""
    long, short = llm.open(list(range(20, 50))), llm.open([10, 11, 12])
    llm.submit(long, SamplingParams(max_tokens=20, ignore_eos=True))
    llm.submit(short, PARAMS)
    for _ in range(steps):
        llm.step()
    llm.abort(long)
    llm.abort(long)
    kept = list(long.token_ids)
    while llm.scheduler.has_work:
        llm.step()
    assert len(short) == 9 and long.token_ids == kept
    assert llm.run([long], PARAMS)[0].finish_reason == "length"
    long.close()
    short.close()


def test_close_while_running(llm: LLM) -> None:
    sequences = [llm.open([10 + i] * 14) for i in range(4)]
    for sequence in sequences:
        llm.submit(sequence, PARAMS)
    for sequence in sequences:
        sequence.close()
        llm.step()


def test_a_consumer_that_stops_early_or_interferes(llm: LLM) -> None:
    with llm.open([10, 11, 12]) as root:
        branches = root.fork(4)
        for _, _ in itertools.islice(llm.stream(branches, PARAMS), 3):
            pass
        assert not llm.scheduler.has_work
        with pytest.raises(ZeroDivisionError):
            for _ in llm.stream(branches, PARAMS):
                _ = 1 / 0
        assert not llm.scheduler.has_work
        seen: list[Sequence] = []
        for sequence, _ in llm.stream(branches, PARAMS):
            seen.append(sequence)
            branches[1].close()
            llm.abort(branches[2])
            seen += sequence.fork()
        assert seen.count(branches[1]) <= 1 and seen.count(branches[0]) == 6 and not llm.scheduler.has_work
        for sequence in list(llm.sequences.values()):
            if sequence is not root:
                sequence.close()


def test_what_does_not_fit_the_model(llm: LLM, picture: ImageInput) -> None:
    context = llm.config.text.max_position_embeddings
    refused(llm, lambda: llm.open([10] * (context + 1)), ValueError, f"{context + 1} tokens .* context of {context}")
    refused(llm, lambda: llm.open([]), ValueError, "prompt is empty")
    refused(llm, lambda: llm.open([10, 320]), ValueError, "token id 320 is outside the vocabulary of 320")
    with llm.open([10]) as sequence:
        refused(llm, lambda: sequence.extend([10] * context), ValueError, "more than the model's context")
        refused(llm, lambda: sequence.extend([-1]), ValueError, "token id -1 is outside")
        for tokens, images in (
            (shown(picture)[:-2], [picture]),
            (shown(picture), []),
            (shown(picture), [picture, picture]),
            ([10, 11], [picture]),
        ):
            refused(llm, lambda t=tokens, i=images: sequence.extend(t, i), ValueError, "image placeholders for")
            wrong = {"prompt_token_ids": tokens, "multi_modal_data": {"image": images}}
            refused(llm, lambda w=wrong: llm.open(w), ValueError, "image placeholders for")
        scattered = [IMAGE, 9, *[IMAGE] * (picture.num_tokens - 1)]
        refused(llm, lambda: sequence.extend(scattered, [picture]), ValueError, "do not stand side by side")
        sequence.extend([10] * (context - 1))
        refused(llm, lambda: llm.run([sequence], PARAMS), OutOfBlocks, "does not fit the KV cache of 16 blocks")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompts are NoneType; give text, token ids, a dict, or a list of such"),
        (5, "prompts are int"),
        (b"abc", "prompts are bytes"),
        ([None], "token ids must be whole numbers"),
        ([[]], "the prompt is empty"),
        ("", "the prompt is empty"),
        ([["a"]], "token ids must be whole numbers .* text goes in as a string"),
        ([[1.5]], "token ids must be whole numbers"),
        ([[10**30]], "token id 1000000000000000000000000000000 is outside the vocabulary"),
        ({"prompt_token_ids": "abc"}, "token ids must be whole numbers"),
        ({}, "exactly one of 'prompt' and 'prompt_token_ids'"),
        ({"prompt": "a", "prompt_token_ids": [8]}, "exactly one of"),
        ({"prompt": [8, 9]}, "'prompt' is list; it must be text"),
        ({"prompt": "a", "images": []}, "has 'images'; images are 'multi_modal_data'"),
        ({"prompt": "a", "multi_modal_data": {"video": []}}, "has 'video'; images are"),
    ],
)
def test_what_is_no_prompt(llm: LLM, prompt: object, message: str) -> None:
    error = TypeError if message.startswith("token ids must be") else ValueError
    refused(llm, lambda: llm.generate(["fine", prompt] if isinstance(prompt, dict) else prompt), error, message)


def test_what_is_no_sampling_params(llm: LLM) -> None:
    for params in ({"n": 1}, ["x"], [PARAMS, None]):
        refused(llm, lambda p=params: llm.generate(["a"], p), ValueError, "sampling params are")
    refused(llm, lambda: llm.generate(["a"], [PARAMS, PARAMS]), ValueError, "2 sampling params for 1 prompts")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ("hello", r"messages\[0\] must be a dict with a 'role'"),
        ({"content": "x"}, r"messages\[0\] must be a dict with a 'role'"),
        ({"role": "user", "content": ["hi"]}, r"messages\[0\] has a part of type 'str'"),
        ({"role": "user", "content": [{"type": "video", "video": 1}]}, "a part of type 'video'; give .* image_url"),
        ({"role": "user", "content": [{"type": "text"}]}, "a part of type 'text'; give"),
        ({"role": "user", "content": [{"type": "image"}]}, "a part of type 'image' without its 'image'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "type 'image_url' without its"),
    ],
)
def test_what_is_no_message(llm: LLM, message: object, error: str) -> None:
    refused(llm, lambda: llm.chat([[message]], chat_template="{{ messages }}"), ValueError, error)  # type: ignore


def test_copies(llm: LLM) -> None:
    with llm.open([10, 11]) as sequence:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            refused(llm, lambda c=copied: c(llm), TypeError, "make another by LLM")
            refused(llm, lambda c=copied: c(sequence), TypeError, "cannot be copied or pickled; fork it")


def test_an_interrupt_leaves_nothing_running(llm: LLM) -> None:
    """Wherever it comes, between two steps or while forks are made: what was opened is closed again."""
    params = SamplingParams(n=3, max_tokens=6, ignore_eos=True)
    for name, after in (("step", 2), ("submit", 4), ("next_ordinal", 5)):
        real, calls = getattr(llm, name), itertools.count()

        def interrupted(*args: object, real=real, calls=calls, after=after, **kwargs: object):
            if next(calls) == after:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        setattr(llm, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[10, 11], [20, 21]], params, use_tqdm=False)
        delattr(llm, name)
        assert not llm.sequences and not llm.scheduler.has_work and llm.stats()["blocks_used"] == 0, name


def test_a_sequence_that_outgrows_the_pool_ends_alone(llm: LLM) -> None:
    """It is taken out when nobody else can give; what it had sampled stays, and the others end as they would have."""
    alone = llm.generate([[20, 21]], SamplingParams(max_tokens=40, seed=3, ignore_eos=True), use_tqdm=False)[0]
    endless, modest = llm.open([10] * 60), llm.open([20, 21])
    llm.submit(endless, SamplingParams(max_tokens=None, seed=2, ignore_eos=True))
    llm.submit(modest, SamplingParams(max_tokens=40, seed=3, ignore_eos=True))
    outputs = []
    with pytest.raises(OutOfBlocks, match="does not fit the KV cache of 16 blocks"):
        while llm.scheduler.has_work:
            outputs += llm.step()
    assert not endless.running and len(endless) == 16 * BLOCK + 1
    while llm.scheduler.has_work:
        outputs += llm.step()
    assert [sequence for sequence, _ in outputs] == [modest]
    assert outputs[0][1].token_ids == alone.outputs[0].token_ids
    with pytest.raises(OutOfBlocks):
        llm.run([modest, endless], SamplingParams(max_tokens=None, ignore_eos=True))
    assert not llm.scheduler.has_work
    endless.close()
    modest.close()


def test_a_pool_full_of_parked_sequences_makes_room(llm: LLM) -> None:
    """Parked sequences lose KV, leaves and the longest idle first, and are computed again when they run."""
    rng = random.Random(1)
    parked = [llm.open([rng.randrange(7, 260) for _ in range(28)]) for _ in range(4)]
    llm.prefill(parked)
    assert llm.pool.num_free == 0
    child = parked[0].fork(at=12)[0]
    with llm.open([30] * 20) as other:
        llm.run([other], PARAMS)
        assert [s.num_computed for s in parked] == [28, 0, 28, 28], "a leaf, the longest idle one"
    fresh = LLM(llm.path, kv_cache_bytes=1 << 22, block_size=BLOCK)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    again = fresh.generate([list(s.token_ids) for s in [*parked, child]], params, use_tqdm=False)
    outputs = llm.run([*parked, child], params)
    assert [o.token_ids for o in outputs] == [o.outputs[0].token_ids for o in again]
    for sequence in (*parked, child):
        sequence.close()


def test_a_sequence_of_another_engine(llm: LLM) -> None:
    """Its blocks are another pool's, so nothing here may compute with them or give them back."""
    other = LLM(llm.path, kv_cache_bytes=1 << 20)
    foreign = other.open([10, 11, 12] * 9)
    other.prefill([foreign])
    calls = (
        lambda: llm.run([foreign], PARAMS),
        lambda: next(llm.stream([foreign], PARAMS)),
        lambda: llm.prefill([foreign]),
        lambda: llm.submit(foreign, PARAMS),
        lambda: llm.abort(foreign),
    )
    for call in calls:
        refused(llm, call, ValueError, "belongs to another engine")
    other.submit(foreign, PARAMS)
    for call in calls:
        refused(llm, call, ValueError, "belongs to another engine")
        assert foreign.running
    while other.scheduler.has_work:
        other.step()
    foreign.close()
    assert other.stats()["blocks_used"] == 0


@pytest.mark.parametrize("name", ["block_size", "max_batch_tokens", "max_num_seqs", "num_scheduler_steps"])
def test_options_that_could_never_run_anything(vl_checkpoint: Path, name: str) -> None:
    for value in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"{name}={value} must be a whole number"):
            LLM(vl_checkpoint, **{name: value})


def test_values_of_the_wrong_kind(llm: LLM, picture: ImageInput) -> None:
    with llm.open([10]) as sequence:
        refused(llm, lambda: llm.run([sequence], SamplingParams(n=3)), ValueError, "n is 3.* fork it 3 times")
        refused(llm, lambda: llm.run([sequence], SamplingParams(seed=1.5)), TypeError, "as an integer")  # type: ignore[arg-type]
        refused(llm, lambda: llm.step(0), ValueError, "most=0 must be")
        refused(llm, lambda: sequence.extend([10.5]), TypeError, "as an integer")  # type: ignore[list-item]
        for image in (np.zeros((9, 9, 3), dtype=np.uint8), b"...", None):
            kind = type(image).__name__
            refused(
                llm,
                lambda i=image: sequence.extend([IMAGE], [i]),
                TypeError,
                f"an image is given as {kind}; give a PIL",
            )
        for size in ((0, 5), (5, 0)):
            empty = Image.new("RGB", size)
            refused(llm, lambda i=empty: sequence.extend([IMAGE], [i]), ValueError, f"{size[0]} x {size[1]} pixels")
        sequence.extend(np.array([11, 12]))
        assert sequence.token_ids == [10, 11, 12] and all(type(token) is int for token in sequence.token_ids)


def test_asleep(llm: LLM) -> None:
    with llm.open([10, 11, 12]) as sequence:
        llm.run([sequence], PARAMS)
        llm.sleep()
        for call in (lambda: llm.run([sequence], PARAMS), lambda: llm.prefill([sequence])):
            refused(llm, call, RuntimeError, "asleep; call wake_up")
        llm.wake_up()
        llm.run([sequence], PARAMS)
        llm.sleep(level=2)
        refused(llm, llm.weights_updated, RuntimeError, "weights are asleep; call wake_up")
        llm.wake_up()
        llm.reload_weights()
        llm.run([sequence], PARAMS)
