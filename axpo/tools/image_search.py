"""`image_search`: pictures of a local folder by what their captions say; the tool that training never shows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import bm25s
from PIL import Image

from axpo.images import load_image
from axpo.tools import Tool, ToolResult

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


class ImageSearch(Tool):
    """Ranks the folder's pictures by BM25 over their captions.

    A picture's caption is the .txt file of the same name, or its entry in captions.json ({file name: caption}), or else
    the words of its file name.

    Args:
        path: the folder; folders inside it are read too.
        max_side: larger pictures are shrunk to it, in pixels.

    Raises:
        ValueError: there is no folder or no picture.
    """

    name: ClassVar[str] = "image_search"
    description: ClassVar[str] = "Searches for images by a description. Returns the most relevant images with captions."
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "query": {"type": "string", "minLength": 1, "description": "What the images should show."},
            "max_results": {"type": "integer", "minimum": 1, "maximum": 8, "default": 3},
        },
        "required": ["query"],
    }

    def __init__(self, path: str = "", max_side: int = 1024):
        if not path or not Path(path).expanduser().is_dir():
            raise ValueError(f"image_search.path = {path!r}: tool image_search needs a folder of pictures; set it")
        folder = Path(path).expanduser()
        self._files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
        if not self._files:
            raise ValueError(f"image_search.path = {path!r}: no picture ({', '.join(_SUFFIXES)}) in it")
        listed = folder / "captions.json"
        captions = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else {}
        self._captions = [_caption(file, folder, captions) for file in self._files]
        self._max_side = max_side
        self._index = bm25s.BM25()
        self._index.index(bm25s.tokenize(self._captions, show_progress=False), show_progress=False)

    def run(self, arguments: Mapping[str, Any], images: list[Image.Image]) -> ToolResult:
        tokens = bm25s.tokenize([arguments["query"]], show_progress=False, return_ids=False)
        count = min(arguments.get("max_results", 3), len(self._files))
        found, scores = self._index.retrieve(tokens, k=count, show_progress=False)
        hits = [index for index, score in zip(found[0], scores[0], strict=True) if score > 0]
        if not hits:
            return ToolResult(True, "No images found.")
        pictures = []
        for index in hits:
            picture = load_image(self._files[index])
            picture.thumbnail((self._max_side, self._max_side))
            pictures.append(picture)
        text = "\n".join(f"[{number}] {self._captions[index]}" for number, index in enumerate(hits, 1))
        return ToolResult(True, text, pictures)


def _caption(file: Path, folder: Path, captions: Mapping[str, str]) -> str:
    beside = file.with_suffix(".txt")
    if beside.is_file():
        return " ".join(beside.read_text(encoding="utf-8").split())
    words = file.stem.replace("_", " ").replace("-", " ")
    return captions.get(file.relative_to(folder).as_posix(), captions.get(file.name, words))
