"""Images to patches as transformers does it, bit for bit, in a fraction of the time."""

import hashlib
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from engine.models.config import VisionConfig
from kernels.image_patches import can_cut, image_patches, rows_first

CONFIGS = ("preprocessor_config.json", "processor_config.json")
ORDERS = 64  # sizes of images whose order of patches is remembered


@dataclass(frozen=True, slots=True)
class ImageInput:
    """An image as the model takes it.

    pixel_values: [P, patch_dim] fp32; grid_thw: (1, height, width) in patches; num_tokens = P / merge²; key: a hash.
    """

    pixel_values: Tensor
    grid_thw: tuple[int, int, int]
    num_tokens: int
    key: bytes


class ImageProcessor:
    """A checkpoint's `preprocessor_config.json`, applied: resize, rescale, normalise, cut into patches.

    After the resize a pixel is one of 256 values a channel, so all arithmetic on pixels is a table of 3 x 256 floats,
    filled in transformers' order of operations.
    """

    def __init__(self, path: Path):
        # Imported here: transformers takes seconds, and an engine fed with token ids and patches never needs it.
        # The PIL backend: the torchvision one is not everywhere, and rounds resized pixels differently.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

        self._file = next((path / name for name in CONFIGS if (path / name).is_file()), None)
        if self._file is None:
            raise FileNotFoundError(f"{path}: no {CONFIGS[0]}, which images need; fetch it with the weights")
        try:
            config = Qwen2VLImageProcessorPil.from_pretrained(str(path), local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{self._file}: cannot be read ({error}); fetch it again") from error
        self._smart_resize = smart_resize
        self._do_resize = config.do_resize
        self._min_pixels, self._max_pixels = config.size["shortest_edge"], config.size["longest_edge"]
        self._resample = Image.Resampling(config.resample)
        self._patch, self._merge, self._frames = config.patch_size, config.merge_size, config.temporal_patch_size
        values = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
        if config.do_rescale:
            values = (values.astype(np.float64) * config.rescale_factor).astype(np.float32)
        values = values.astype(np.float32)
        if config.do_normalize:
            mean, std = (np.asarray(list(x), dtype=np.float32)[:, None] for x in (config.image_mean, config.image_std))
            values = (values - mean) / std
        self._table = torch.from_numpy(np.ascontiguousarray(values).ravel())
        self._orders: dict[tuple[int, int], tuple[npt.NDArray[np.intp], npt.NDArray[np.int16]]] = {}

    def check(self, vision: VisionConfig) -> None:
        """Raises ValueError where patches would be others than the model's."""
        for name, ours, theirs, key in (
            ("patch_size", self._patch, vision.patch_size, "patch_size"),
            ("merge_size", self._merge, vision.spatial_merge_size, "spatial_merge_size"),
            ("temporal_patch_size", self._frames, vision.temporal_patch_size, "temporal_patch_size"),
        ):
            if ours != theirs:
                raise ValueError(
                    f"{self._file}: {name} is {ours}, but config.json's vision_config.{key} is {theirs}; take both "
                    "files of one checkpoint"
                )

    def __call__(self, rgb: Seq[Image.Image]) -> list[ImageInput]:
        """Of decoded RGB images.

        Raises:
            ValueError: one side of an image is more than 200 times the other.
        """
        sizes = [self._size(image) for image in rgb]
        if can_cut():
            raw = [self._raw(image, size) for image, size in zip(rgb, sizes, strict=True)]
            cut = image_patches(raw, sizes, self._table.view(3, 256), self._patch, self._merge, self._frames)
        else:
            cut = [self._plain(image, size) for image, size in zip(rgb, sizes, strict=True)]
        return [self._input(*one) for one in cut]

    def _size(self, rgb: Image.Image) -> tuple[int, int]:
        """(height, width) in pixels of what patches are cut from."""
        if not self._do_resize:
            return rgb.height, rgb.width
        block = self._patch * self._merge
        return self._smart_resize(rgb.height, rgb.width, block, self._min_pixels, self._max_pixels)

    def _resized(self, rgb: Image.Image, size: tuple[int, int]) -> Image.Image:
        return rgb.resize((size[1], size[0]), self._resample) if size != (rgb.height, rgb.width) else rgb

    def _raw(self, rgb: Image.Image, size: tuple[int, int]) -> Tensor:
        """[H, W, 4] uint8, as Pillow holds pixels: what `image_patches` takes, resized where it cannot do that."""
        if self._resample != Image.Resampling.BICUBIC or not rows_first((rgb.height, rgb.width), size):
            rgb = self._resized(rgb, size)
        data = bytearray(rgb.tobytes("raw", "RGBX"))
        return torch.frombuffer(data, dtype=torch.uint8).view(rgb.height, rgb.width, 4)

    def _plain(self, rgb: Image.Image, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What `image_patches` gives, by Pillow and numpy."""
        pixels = np.array(self._resized(rgb, size))
        return torch.from_numpy(self._patchify(pixels)), torch.from_numpy(pixels)

    def _input(self, patches: Tensor, pixels: Tensor) -> ImageInput:
        height, width = pixels.shape[0] // self._patch, pixels.shape[1] // self._patch
        digest = hashlib.blake2b(pixels.numpy().data, digest_size=16)
        digest.update(b"%dx%d" % (height, width))
        return ImageInput(patches, (1, height, width), height * width // self._merge**2, digest.digest())

    def _patchify(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """[H, W, 3] -> [patches, 3 * frames * patch²], patches in merge x merge blocks, the image as every frame."""
        order, row = self._order(*pixels.shape[:2])
        values = self._table.numpy()[pixels.ravel()[order] + row]
        out = np.empty((len(values), 3, self._frames, self._patch**2), dtype=np.float32)
        out[:] = values.reshape(len(values), 3, 1, -1)
        return out.reshape(len(values), -1)

    def _order(self, height: int, width: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int16]]:
        """Of an image of this size: which of its [H, W, 3] bytes each value of a frame's patches comes from, [patches,
        3 * patch²], and where that channel's values begin in the table, [3 * patch²]."""
        known = self._orders.get((height, width))
        if known is None:
            patch, merge = self._patch, self._merge
            index = np.arange(height * width * 3).reshape(height, width, 3).transpose(2, 0, 1)
            rows, columns = height // (patch * merge), width // (patch * merge)
            blocks = index.reshape(3, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
            if len(self._orders) >= ORDERS:
                self._orders.clear()
            row = np.repeat(np.arange(3, dtype=np.int16) * 256, patch**2)
            known = self._orders[height, width] = blocks.reshape(rows * columns * merge**2, -1), row
        return known
