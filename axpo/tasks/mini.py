"""The embedded task: which digit is on the tile of a colour? Small tiles need `image_zoom_in`, large ones do not."""

from dataclasses import asdict
from typing import Any

from PIL import Image

from axpo.resume import hash_files
from axpo.tasks import Question, Split
from axpo.tasks.scenes import asset_files, scene
from axpo.tasks.splits import GeneratedTask


class MiniTask(GeneratedTask):
    """Scenes from (split, index) alone; held-out ones show digits and parts of photographs that training never does.

    small_share: the share of questions that ask for a small tile, whose digit the overview does not show.
    `meta` of a question: `target` (index into tiles) and `tiles` (the fields of axpo.tasks.scenes.Tile).
    """

    name = "mini"
    key = 20_260_528

    def __init__(self, train_size: int = 20_000, heldout_size: int = 1_024, small_share: float = 0.6):
        super().__init__(train_size, heldout_size, small_share=small_share)
        self._small_share = small_share

    def question(self, split: Split, index: int) -> Question:
        rng = self.random(split, index)
        pixels, tiles = scene(rng, heldout=split == "heldout")
        large = rng.random() >= self._small_share
        candidates = [i for i, tile in enumerate(tiles) if tile.large == large]
        target = candidates[rng.integers(len(candidates))]
        tile = tiles[target]
        meta: dict[str, Any] = {"target": target, "tiles": [asdict(t) for t in tiles]}
        return Question(
            id=f"{self.name}/{split}/{index}",
            messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ask(tile.colour)}]}],
            images=[Image.fromarray(pixels)],
            answer=str(tile.digit),
            meta=meta,
        )

    def content_hash(self, split: Split) -> str:
        """Of the digits, the photographs and the parameters that the scenes are drawn from."""
        parts = (self.name, split, str(self.key), str(self.size(split)), str(self._small_share))
        return hash_files(asset_files(), *parts)


def ask(colour: str) -> str:
    """The text of a question."""
    return f"What digit is on the {colour} tile?"
