"""Our image processor equals transformers' own, bit for bit."""

import base64
import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from engine import LLM, SamplingParams
from engine.images import ImageProcessor
from tests.engine.checkpoints import IMAGE

CONFIGS = [
    {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096}},
    {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 65536, "longest_edge": 262144}},
    {"patch_size": 14, "merge_size": 2, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]},
    {"patch_size": 4, "merge_size": 1, "temporal_patch_size": 1, "do_normalize": False, "resample": 2},
    {"patch_size": 4, "merge_size": 2, "do_resize": False},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("compiled", [True, False])
def test_patches_equal_transformers(
    config: dict, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("engine.images.can_cut", lambda: False)
    seed = random.randrange(2**31)
    rng = np.random.default_rng(seed)
    theirs = Qwen2VLImageProcessorPil(**config)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor(tmp_path)
    for _ in range(12):
        height, width = (int(side) for side in rng.integers(3, 200, 2))
        if not config.get("do_resize", True):
            height, width = height // 8 * 8 + 8, width // 8 * 8 + 8
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = theirs(images=[image], return_tensors="np")
        actual = ours([image])[0]
        assert tuple(expected["image_grid_thw"][0]) == actual.grid_thw, f"{height}x{width}, seed {seed}"
        np.testing.assert_array_equal(actual.pixel_values.numpy(), expected["pixel_values"], f"seed {seed}")
        assert actual.num_tokens == len(actual.pixel_values) // config["merge_size"] ** 2


def test_keys_tell_images_apart(tmp_path: Path) -> None:
    Qwen2VLImageProcessorPil(patch_size=4, merge_size=2).save_pretrained(tmp_path)
    processor = ImageProcessor(tmp_path)
    pixels = np.random.default_rng().integers(0, 256, (40, 60, 3), dtype=np.uint8)
    first, again = processor([Image.fromarray(pixels), Image.fromarray(pixels.copy())])
    pixels[20:24, 30:34] ^= 255
    assert first.key == again.key
    assert first.key != processor([Image.fromarray(pixels)])[0].key


def test_a_strip_is_refused(tmp_path: Path) -> None:
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="aspect ratio"):
        ImageProcessor(tmp_path)([Image.new("RGB", (2001, 10))])


@pytest.fixture(scope="module")
def llm(vl_checkpoint: Path) -> LLM:
    return LLM(vl_checkpoint, kv_cache_bytes=1 << 22)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "CMYK", "1", "I", "F", "I;16", "HSV", "PA"])
def test_modes_are_converted_as_by_transformers(llm: LLM, picture: Image.Image, mode: str) -> None:
    deep = np.arange(32 * 40, dtype=np.uint16).reshape(32, 40) * 51
    image = Image.fromarray(deep) if mode == "I;16" else picture.convert(mode)
    assert image.mode == mode
    theirs = Qwen2VLImageProcessorPil.from_pretrained(str(llm.path))
    expected = theirs(images=[image], return_tensors="np")
    np.testing.assert_array_equal(llm.processor.image(image).pixel_values.numpy(), expected["pixel_values"])


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (3000, 20)])
def test_sizes_at_the_edge(llm: LLM, size: tuple[int, int]) -> None:
    image = llm.processor.image(Image.new("RGB", size, "red"))
    prompt = {"prompt_token_ids": [8, IMAGE], "multi_modal_data": {"image": image}}
    output = llm.generate(prompt, SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)[0]
    assert len(output.prompt_token_ids) == 1 + image.num_tokens and len(output.outputs[0].token_ids) == 2


def test_where_an_image_may_come_from(llm: LLM, picture: Image.Image, tmp_path: Path) -> None:
    file, data = tmp_path / "a b.png", BytesIO()
    picture.save(file)
    picture.save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    expected = llm.processor.image(picture).key
    for source in (picture, file, str(file), url, f"file://{str(file).replace(' ', '%20')}"):
        assert llm.processor.images([source])[0].key == expected, source


def test_a_photo_that_was_taken_sideways_is_turned_when_it_is_read(
    llm: LLM, picture: Image.Image, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn to the right
    picture.save(tmp_path / "photo.png", exif=exif)
    upright = llm.processor.image(picture.rotate(-90, expand=True))
    assert llm.processor.images([tmp_path / "photo.png"])[0].key == upright.key
    with Image.open(tmp_path / "photo.png") as opened:
        assert llm.processor.image(opened).key == llm.processor.image(picture).key, "a PIL image is as it is given"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.org/a.png", "the engine fetches nothing: download it"),
        ("data:image/png,abc", "must be data:image/…;base64"),
        ("data:image/png;base64,iVBORw0KGgoAAAANSU", "cannot be read"),
        ("/nowhere/a.png", "'/nowhere/a.png' cannot be read .*No such file"),
        (__file__, "cannot identify image file"),
        (b"x", "an image is given as bytes; give a PIL image"),
        (np.zeros((8, 8, 3), dtype=np.uint8), "an image is given as ndarray; give a PIL image"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (Image.new("RGB", (201, 1)), "aspect ratio"),
    ],
)
def test_what_is_no_image(llm: LLM, source: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        llm.open({"prompt_token_ids": [8, IMAGE], "multi_modal_data": {"image": source}})
    assert not llm.sequences
