"""Text and images to tokens and patches, with the checkpoint's own tokenizer, template and image processor."""

from collections.abc import Sequence as Seq
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.images import ImageInput, ImageProcessor
from engine.models.config import ModelConfig
from engine.positions import ImageSpan, place_image, positions
from engine.prompts import open_image

TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer.model")
"""Files of which a tokenizer is made, any one of them."""


class Processor:
    """Everything that turns users' input into model input, for one checkpoint."""

    def __init__(self, path: str | Path, config: ModelConfig):
        self.path = Path(path).expanduser()
        self.config = config
        self.image_token_id = config.image_token_id

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer.

        Raises:
            FileNotFoundError, ValueError: the checkpoint has none, or it cannot be read.
        """
        # Imported here: transformers takes seconds, and an engine fed with token ids never needs it.
        from transformers import AutoTokenizer

        if not any((self.path / name).is_file() for name in TOKENIZERS):  # transformers would make an empty one
            raise FileNotFoundError(
                f"{self.path}: no {TOKENIZERS[0]}, which text needs; fetch it with the weights, or give token ids and "
                "SamplingParams(detokenize=False)"
            )
        try:
            return AutoTokenizer.from_pretrained(str(self.path), local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path / TOKENIZERS[0]}: cannot be read ({error}); fetch it again") from error

    @cached_property
    def _rust(self) -> Any:
        """The Rust tokenizer itself: what transformers wraps around it costs ten times as much as short texts do."""
        rust = self.tokenizer.backend_tokenizer
        rust.no_padding()
        rust.no_truncation()
        return rust

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Processor":
        return cls(path, ModelConfig.from_pretrained(path))

    def image(self, image: Image.Image) -> ImageInput:
        """`images` of one."""
        return self.images([image])[0]

    def images(self, images: Seq[Image.Image | ImageInput | str | Path]) -> list[ImageInput]:
        """Resizes, normalises and cuts images into patches exactly as transformers does; many at once are quicker.

        What is no PIL image is opened by `open_image`, and what is an ImageInput already stays.

        Raises:
            FileNotFoundError, ValueError: a file cannot be decoded, an image has an impossible size, or the checkpoint
                has no usable preprocessor_config.json.
            TypeError: something that is no image.
        """
        raw = [_rgb(open_image(image)) for image in images if not isinstance(image, ImageInput)]
        if raw and self.config.vision is None:
            raise ValueError(f"{self.path}: a text-only checkpoint takes no images")
        made = iter(self._image_processor(raw) if raw else ())
        return [image if isinstance(image, ImageInput) else next(made) for image in images]

    @cached_property
    def _image_processor(self) -> ImageProcessor:
        made = ImageProcessor(self.path)
        assert self.config.vision is not None
        made.check(self.config.vision)
        return made

    def encode(self, text: str, images: Seq[ImageInput] = ()) -> list[int]:
        """Token ids, each image's `<|image_pad|>` expanded to as many as it has tokens; no special tokens are added."""
        return self.expand(self.encode_text(text), images)

    def encode_text(self, text: str) -> list[int]:
        """Token ids, placeholders as they stand; no special tokens are added."""
        return self._rust.encode(text, add_special_tokens=False).ids

    def expand(self, token_ids: Seq[int], images: Seq[ImageInput]) -> list[int]:
        """Expands one placeholder an image; ids whose placeholders are already expanded come back unchanged.

        Raises:
            ValueError: the number of placeholders fits neither.
        """
        pad = self.image_token_id
        pads = 0 if pad is None else token_ids.count(pad)
        if pads == sum(image.num_tokens for image in images):
            return list(token_ids)
        if pad is None or pads != len(images):
            raise ValueError(f"the prompt has {pads} image placeholders for {len(images)} images; write one an image")
        out: list[int] = []
        start = 0
        for image in images:
            stop = token_ids.index(pad, start)
            out.extend(token_ids[start:stop])
            out.extend([pad] * image.num_tokens)
            start = stop + 1
        out.extend(token_ids[start:])
        return out

    def spans(
        self, token_ids: Seq[int], images: Seq[ImageInput], before: Seq[ImageSpan] = (), offset: int = 0
    ) -> list[ImageSpan]:
        """Finds the images in expanded `token_ids`, which follow `offset` tokens with the images `before`: all spans.

        Raises:
            ValueError: the tokens of an image do not stand side by side.
        """
        out = list(before)
        index = 0
        for number, image in enumerate(images):
            index = token_ids.index(self.image_token_id, index)
            stop = index + image.num_tokens
            if token_ids[index:stop].count(self.image_token_id) != image.num_tokens:
                raise ValueError(f"the {image.num_tokens} tokens of image {number} do not stand side by side")
            out.append(place_image(out, offset + index, image.grid_thw, self.config.merge))
            index = stop
        return out

    def positions(self, token_ids: Seq[int], images: Seq[ImageInput]) -> npt.NDArray[np.int64]:
        """Rotary positions of a whole sequence: [3, len(token_ids)] int64."""
        return positions(self.spans(token_ids, images) if images else [], 0, len(token_ids))

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **options: Any) -> str:
        """The checkpoint's chat template, ending in its generation prompt; options: of transformers' own method.

        Raises:
            ValueError: the checkpoint has no template.
        """
        if not (self.tokenizer.chat_template or options.get("chat_template")):
            raise ValueError(
                f"{self.path}: no chat template, neither chat_template.jinja nor one in tokenizer_config.json; fetch "
                "it with the weights, give chat_template=, or write the prompt out for generate()"
            )
        options = {"add_generation_prompt": True, **options}
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    def decode(self, token_ids: Seq[int], skip_special_tokens: bool = False) -> str:
        return self._rust.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def _rgb(image: Image.Image) -> Image.Image:
    try:
        image.load()
        if 0 in image.size:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        name = getattr(image, "filename", "") or "image"
        raise ValueError(f"{name}: cannot be decoded ({error})") from error
