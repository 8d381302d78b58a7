"""What an engine is given: text and images as the tokens and patches of its checkpoint."""

import operator
from collections.abc import Sequence as Seq
from functools import cached_property
from pathlib import Path

from PIL import Image

from engine.images import ImageInput
from engine.models import ModelConfig
from engine.processor import Processor


class Inputs:
    """The part of `LLM` that reads prompts and observations."""

    path: Path
    config: ModelConfig

    @cached_property
    def processor(self) -> Processor:
        return Processor(self.path, self.config)

    def image_inputs(self, images: Seq[Image.Image | ImageInput | str | Path]) -> list[ImageInput]:
        return self.processor.images(images) if images else []

    def expand(self, token_ids: Seq[int], images: list[ImageInput]) -> list[int]:
        """Every image has its tokens afterwards.

        Raises:
            ValueError: not as many as the images, or an unknown id.
            TypeError: an id is no whole number.
        """
        tokens = list(map(operator.index, token_ids))  # whole numbers of any library, and nothing else
        if images or self.config.image_token_id in tokens:
            tokens = self.processor.expand(tokens, images)
        for bad in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= bad < self.config.text.vocab_size:
                raise ValueError(f"token id {bad} is outside the vocabulary of {self.config.text.vocab_size}")
        return tokens

    def check_length(self, length: int, images: Seq[ImageInput] = ()) -> None:
        limit = self.config.text.max_position_embeddings
        if length > limit:
            of_images = sum(image.num_tokens for image in images)
            raise ValueError(
                f"{length} tokens{f', {of_images} of them of images,' if of_images else ''} are more than the model's "
                f"context of {limit}; shorten the prompt or observation{' or take smaller images' if of_images else ''}"
            )
