"""The embedded task: determinism, what held-out scenes never share with training, boxes and pixels, the teacher."""

import io
import secrets
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from axpo.grading import Grader
from axpo.tasks import Question, get_task
from axpo.tasks.build_mini import build_mini
from axpo.tasks.mini import MiniTask
from axpo.tasks.scenes import COLOURS, INK, SIDE, digit_pool, digits, enlargement, photographs
from axpo.tasks.teacher import COORDINATES, STYLES, Row, Style, sft_row, teacher, teacher_box, tight_box, visible_share
from axpo.tools.image_zoom_in import pixel_box
from engine.processor import Processor

SEED = secrets.randbits(32)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    out = tmp_path_factory.mktemp("mini")
    build_mini(out)
    return Processor.from_pretrained(out)


def sample(split: str, number: int) -> list[Question]:
    task = get_task("mini")
    indices = np.random.default_rng(SEED).integers(task.size(split), size=number)  # type: ignore[arg-type]
    return [task.question(split, int(index)) for index in indices]  # type: ignore[arg-type]


def target(question: Question) -> dict:
    return question.meta["tiles"][question.meta["target"]]


def test_question_depends_on_split_and_index_alone() -> None:
    first, second = MiniTask(), MiniTask(train_size=50)
    for index in (7, 0, 49):
        second.question("heldout", index)  # what is asked before does not matter
        a, b = first.question("train", index), second.question("train", index)
        assert (a.id, a.answer, a.messages, a.meta) == (b.id, b.answer, b.messages, b.meta)
        assert a.images[0].tobytes() == b.images[0].tobytes()
    assert first.question("train", 3).images[0].tobytes() != first.question("heldout", 3).images[0].tobytes()


def test_sizes_and_refusals() -> None:
    task = MiniTask()
    assert (task.size("train"), task.size("heldout")) == (20_000, 1_024)
    with pytest.raises(IndexError, match="0 to 1023, not 1024"):
        task.question("heldout", 1024)
    with pytest.raises(ValueError, match="unknown split 'test'; there is: train, heldout"):
        task.size("test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"small_share is 1\.5"):
        MiniTask(small_share=1.5)
    with pytest.raises(ValueError, match="train_size is 0"):
        MiniTask(train_size=0)
    with pytest.raises(ValueError, match="unknown task 'minni'"):
        get_task("minni")


def test_digit_images_are_split_by_class_and_disjoint() -> None:
    ink, labels, _ = digits()
    assert ink.shape == (1797, 8, 8)
    train, heldout = digit_pool(False), digit_pool(True)
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 1797
    for label in range(10):
        share = np.mean(labels[heldout] == label) * len(heldout) / np.sum(labels == label)
        assert abs(share - 0.25) < 0.01, f"digit {label}: {share:.3f} held out"


def test_splits_show_only_their_own_digits() -> None:
    for split, pool in (("train", digit_pool(False)), ("heldout", digit_pool(True))):
        shown = {tile["source"] for question in sample(split, 60) for tile in question.meta["tiles"]}
        assert shown <= set(pool.tolist()), f"{split}, seed {SEED}"


def test_background_of_a_split_is_its_own_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    from axpo.tasks import scenes

    # A photograph whose red channel is its column number: every background tells where it was cut.
    ramp = np.broadcast_to(np.arange(416, dtype=np.float32)[None, :, None], (256, 416, 3))
    monkeypatch.setattr(scenes, "photographs", lambda: [ramp])
    rng = np.random.default_rng(SEED)
    for heldout in (False, True):
        for _ in range(50):
            crop = scenes.background(rng, heldout)
            scale = (crop.max() - crop.min()) / (SIDE - 1)
            low, high = crop.min() / scale, crop.max() / scale
            assert (low >= 287.9) if heldout else (high <= 287.1), f"columns {low:.0f} to {high:.0f}, seed {SEED}"
    assert all(photo.shape == (256, 416, 3) for photo in photographs())


def test_boxes_of_meta_match_the_pixels() -> None:
    for question in sample("train", 40) + sample("heldout", 40):
        pixels = np.asarray(question.images[0], dtype=np.float64)
        tiles = question.meta["tiles"]
        assert pixels.shape == (SIDE, SIDE, 3)
        assert len({tile["colour"] for tile in tiles}) == len(tiles) > 1
        covered = np.zeros((SIDE, SIDE), dtype=int)
        for tile in tiles:
            x1, y1, x2, y2 = tile["box"]
            assert 0 <= x1 < x2 <= SIDE and 0 <= y1 < y2 <= SIDE
            covered[y1:y2, x1:x2] += 1
            gx1, gy1, gx2, gy2 = tile["digit_box"]
            assert visible_share(tile["digit_box"], tile["box"]) == 1.0
            ink, labels, _ = digits()
            assert labels[tile["source"]] == tile["digit"]
            enlarge = enlargement(gx2 - gx1).astype(np.float64)
            alpha = np.zeros((y2 - y1, x2 - x1))
            alpha[gy1 - y1 : gy2 - y1, gx1 - x1 : gx2 - x1] = enlarge @ ink[tile["source"]] @ enlarge.T
            # Where the digit has no ink is one shade of the named colour; the rest is that shade blended with the ink.
            flat = pixels[y1:y2, x1:x2][alpha == 0]
            shade = flat.mean(axis=0)
            assert np.ptp(flat, axis=0).max() == 0
            ratio = shade / np.array(COLOURS[tile["colour"]])
            assert ratio.min() > 0.88 and ratio.max() < 1.09
            expected = shade + alpha[..., None] * (INK - shade)
            error = np.abs(pixels[y1:y2, x1:x2] - expected).max()
            # Rounded down twice, and a bright yellow is cut from 259 to 255; a digit one pixel off is wrong by 50.
            assert error <= 6.5, f"{question.id} {tile['colour']}: {error}"
        assert covered.max() == 1, f"{question.id}: tiles overlap"
        assert question.answer == str(target(question)["digit"])
        assert f"the {target(question)['colour']} tile" in question.messages[0]["content"][1]["text"]


def test_small_and_large_targets_come_in_the_share_asked_for() -> None:
    questions = sample("train", 400)
    share = np.mean([not target(question)["large"] for question in questions])
    assert abs(share - 0.6) < 0.1, f"{share}, seed {SEED}"  # 4 standard deviations
    for small_share in (0.0, 1.0):
        task = MiniTask(small_share=small_share)
        assert {target(task.question("train", index))["large"] for index in range(20)} == {small_share == 0.0}


@pytest.mark.parametrize("name", sorted(STYLES))
def test_teacher_is_right_and_calls_as_often_as_its_style_says(name: str) -> None:
    style, rng = STYLES[name], np.random.default_rng(SEED)
    calls: dict[bool, list[bool]] = {False: [], True: []}
    for question in sample("train", 300):
        messages = teacher(question, rng, style)
        last = f"{messages[-1]['reasoning_content']}\n</think>\n\n{messages[-1]['content']}"
        assert Grader().grade(last, question.rubric).reward == 1.0
        called = len(messages) == 3
        calls[target(question)["large"]].append(called)
        if called:
            arguments = messages[0]["tool_calls"][0]["function"]["arguments"]
            box = arguments["bbox_2d"]
            assert set(box) <= set(COORDINATES)
            crop = messages[1]["content"][0]["image"]
            assert crop.tobytes() == question.images[0].crop(pixel_box(box, (SIDE, SIDE), 32)).tobytes()
    for large, expected in ((False, style.tool_hard), (True, style.tool_easy)):
        spread = 4.5 * np.sqrt(expected * (1 - expected) / len(calls[large]))
        assert abs(np.mean(calls[large]) - expected) <= spread, f"large={large}, seed {SEED}"


def test_boxes_hold_the_tile_unless_they_miss() -> None:
    rng = np.random.default_rng(SEED)
    aimed, missing = Style(1, 1, miss=0.0, describe=0), Style(1, 1, miss=1.0, describe=0)
    beside = 0
    for question in sample("train", 200):
        tile = target(question)
        good, bad = (np.array(teacher_box(tile, rng, style)) * SIDE / 1000 for style in (aimed, missing))
        assert visible_share(tile["box"], good) == 1.0 and good[2] - good[0] == good[3] - good[1] == SIDE / 2
        assert bad.tolist() != good.tolist() and bad[0] < bad[2] and bad[1] < bad[3]
        beside += visible_share(tile["box"], bad) == 0.0
    assert 0.15 < beside / 200 < 0.52, f"a third of the misses are beside the tile (seed {SEED})"


def test_tight_box_is_the_smallest_on_the_grid() -> None:
    step = SIDE / (len(COORDINATES) - 1)
    for question in sample("train", 30):
        for tile in question.meta["tiles"]:
            box = np.array([COORDINATES.index(value) for value in tight_box(tile)]) * step
            assert visible_share(tile["box"], box) == 1.0
            slack = np.abs(box - np.array(tile["box"]))
            assert slack.max() < step


def test_rows_train_on_what_the_assistant_wrote_and_nothing_else(processor: Processor) -> None:
    rng = np.random.default_rng(SEED)
    for question in sample("train", 10):
        for style in (Style(1, 1, miss=0.3, describe=0), Style(0, 0, miss=0.3, describe=0)):
            row = sft_row(question, rng, processor, style)
            trained = processor.decode([t for t, m in zip(row.tokens, row.loss_mask, strict=True) if m])
            turns = 2 if style.tool_hard else 1
            assert len(row.images) == turns and trained.count("<|im_end|>") == turns
            assert trained.endswith(rf"<answer>\boxed{{{question.answer}}}</answer><|im_end|>")
            assert "<think>" not in trained and "<|im_start|>" not in trained and "<tool_response>" not in trained
            assert trained.count("</think>") == turns
            assert row.tokens.count(processor.image_token_id) == sum(image.num_tokens for image in row.images)  # type: ignore[arg-type]
            assert len(row.tokens) < 160
        described: Row = sft_row(question, rng, processor, Style(0, 0, miss=0.3, describe=1))
        text = processor.decode([t for t, m in zip(described.tokens, described.loss_mask, strict=True) if m])
        assert all(tile["colour"] in text for tile in question.meta["tiles"])


def test_image_labels_lie_on_image_tokens_and_name_the_scene(processor: Processor) -> None:
    rng = np.random.default_rng(SEED)
    for question in sample("train", 10):
        row = sft_row(question, rng, processor, STYLES["practice"])
        colours = {tile["colour"] for tile in question.meta["tiles"]}
        readable = {str(tile["digit"]) for tile in question.meta["tiles"]}
        named = set()
        for index, token in row.image_labels:
            assert row.tokens[index] == processor.image_token_id
            named.add(processor.decode([token]).strip())
        assert named - {"no"} <= colours | readable
        assert named & colours, question.id


@pytest.mark.parametrize("answer", ["", "  ", None])
def test_question_without_an_answer_is_refused(answer: str | None) -> None:
    with pytest.raises(ValueError, match=r"question 'q9': answer is"):
        Question("q9", [{"role": "user", "content": "?"}], [], answer)  # type: ignore[arg-type]


def test_question_with_a_bad_image_is_refused() -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(ValueError, match="1 image parts in messages, but 0 images"):
        Question("q", messages, [], "7")
    noise = Image.fromarray(np.random.default_rng(SEED).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, format="PNG")
    truncated = Image.open(io.BytesIO(buffer.getvalue()[: len(buffer.getvalue()) // 2]))
    with pytest.raises(ValueError, match="question 'q': image 0 cannot be decoded"):
        Question("q", messages, [truncated], "7")


def test_image_of_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    image = Image.new("RGB", (64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="image 0 is 64x64, more than 1000 pixels"):
        Question("q", messages, [image], "7")


def test_assets_are_small() -> None:
    from axpo.tasks.scenes import ASSETS

    files: list[Path] = [ASSETS / "mini_digits.npz", *(ASSETS / "photos").glob("*.jpg")]
    assert len(files) == 11
    assert sum(file.stat().st_size for file in files) < 400_000
