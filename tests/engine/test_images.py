"""Our image processor equals transformers' own, bit for bit."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from engine.images import ImageProcessor

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
