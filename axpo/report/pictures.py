"""The report's pictures: the question's images with the boxes of the calls over them, and the crops, as data URIs."""

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from PIL import Image

SCENE_SIDE, CROP_SIDE = 640, 160  # longest side that is embedded, in pixels
_PIXELATED = 160  # smaller images are enlarged as squares, so that one sees what the model saw

_NUMBER = re.compile(r"\d+")

Rect = tuple[float, float, float, float]  # left, top, right, bottom as shares of the image's sides


@dataclass(frozen=True, slots=True)
class Picture:
    """An embedded image and the size of the original in pixels."""

    uri: str
    width: int
    height: int

    @property
    def style(self) -> str:
        return "pixels" if max(self.width, self.height) <= _PIXELATED else "photo"

    def fitted(self, width: int, height: int) -> tuple[int, int]:
        """Its size on the page, as large as a frame allows."""
        scale = min(width / self.width, height / self.height)
        return max(1, round(self.width * scale)), max(1, round(self.height * scale))


@dataclass(frozen=True, slots=True)
class Box:
    """The region that a call asked for, on image `image` of the question. label: its branch's."""

    image: int
    rect: Rect
    label: str
    right: bool
    masked: bool


def embed(image: Image.Image, side: int) -> Picture:
    """Scaled down to `side`. PNG keeps the pixels of a small image; a larger one becomes a JPEG."""
    rgb = image.convert("RGB")
    data = io.BytesIO()
    if max(rgb.size) <= min(side, _PIXELATED):
        kind = "png"
        rgb.save(data, format=kind, optimize=True)
    else:
        kind = "jpeg"
        scaled = rgb.copy()
        scaled.thumbnail((side, side), Image.Resampling.LANCZOS)
        scaled.save(data, format=kind, quality=80)
    return Picture(f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}", *rgb.size)


def overview(image: Image.Image, most_pixels: int, multiple: int) -> Picture | None:
    """The image at the size at which the model sees it; None when that is (nearly) its own.

    most_pixels: the image processor's limit. multiple: pixels of a token's side, which sides are multiples of.
    """
    scale = math.sqrt(most_pixels / (image.width * image.height))
    if scale > 0.7:
        return None
    width, height = (max(multiple, math.floor(side * scale / multiple) * multiple) for side in image.size)
    return embed(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC), SCENE_SIDE)


def scene(picture: Picture, boxes: Sequence[Box], target: Rect | None) -> Markup:
    """The image as SVG with boxes: green where the branch ended right, red where wrong, dashed where not trained.

    Boxes in the same place share one outline. `target` is outlined in white: what the question is about.
    """
    width, height = 1000.0, 1000.0 * picture.height / max(picture.width, 1)
    parts = [
        f'<svg class="scene" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="the question’s image">',
        f'<image class="{picture.style}" href="{picture.uri}" width="{width:.0f}" height="{height:.0f}"/>',
    ]
    if target is not None:
        parts.append(f'<rect class="target" {_place(target, width, height)}/>')
    places: dict[tuple[Rect, bool, bool], list[str]] = {}
    for box in boxes:
        places.setdefault((box.rect, box.right, box.masked), []).append(box.label)
    below: dict[tuple[int, int], int] = {}
    for (rect, right, masked), labels in places.items():
        kind = f"box {'right' if right else 'wrong'}{' masked' if masked else ''}"
        place = _place(rect, width, height)
        corner = (round(rect[0] * 16), round(rect[1] * 16))
        line = below[corner] = below.get(corner, -1) + 1  # labels that would cover each other stand one below another
        x, y = min(rect[0] * width + 10, width - 60), min(rect[1] * height + 38 + 40 * line, height - 10)
        parts.append(
            f'<g class="{kind} {" ".join(box_classes(labels))}"><rect class="halo" {place}/>'
            f'<rect class="edge" {place}/><text x="{x:.0f}" y="{y:.0f}">{escape(" ".join(labels))}</text></g>'
        )
    return Markup("".join([*parts, "</svg>"]))


def box_classes(labels: Sequence[str]) -> list[str]:
    """CSS classes by which the page finds the boxes of a branch: 3a belongs to 3a and to its source 3."""
    names = {f"b{label}" for label in labels} | {
        f"b{number[0]}" for label in labels if (number := _NUMBER.match(label))
    }
    return sorted(names)


def _place(rect: Rect, width: float, height: float) -> str:
    inset = 5.0  # so that an outline on the image's edge is not cut in half
    left, right = (min(max(edge * width, inset), width - inset) for edge in (rect[0], rect[2]))
    top, bottom = (min(max(edge * height, inset), height - inset) for edge in (rect[1], rect[3]))
    return f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
