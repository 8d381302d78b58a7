"""What an engine is given: text and images as the tokens and patches of its checkpoint."""

from collections.abc import Sequence as Seq
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from engine.images import ImageInput
from engine.models import ModelConfig
from engine.processor import Processor
from engine.prompts import Prompt, split_images, whole_numbers


class Inputs:
    """The part of `LLM` that reads prompts and observations."""

    path: Path
    config: ModelConfig

    @cached_property
    def processor(self) -> Processor:
        return Processor(self.path, self.config)

    def get_tokenizer(self) -> Any:
        """transformers' tokenizer of the checkpoint."""
        return self.processor.tokenizer

    def __reduce__(self) -> Any:
        raise TypeError("an engine cannot be copied or pickled; make another by LLM(path)")

    def chat_prompt(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> Prompt:
        """A conversation by the template, with its images; options: of `Processor.render`."""
        rendered, images = split_images(messages)
        return {"prompt": self.processor.render(rendered, tools, **options), "multi_modal_data": {"image": images}}

    def image_inputs(self, images: Seq[Image.Image | ImageInput | str | Path]) -> list[ImageInput]:
        return self.processor.images(images) if images else []

    def expand(self, token_ids: Seq[int], images: list[ImageInput]) -> list[int]:
        """Every image has its tokens afterwards.

        Raises:
            ValueError: not as many as the images, or an unknown id.
            TypeError: an id is no whole number.
        """
        tokens = whole_numbers(token_ids)
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
