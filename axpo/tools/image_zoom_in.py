"""`image_zoom_in`: returns a region of an image of the conversation at full resolution."""

from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image

from axpo.images import check_image
from axpo.tools import Tool, ToolResult

RELATIVE = 1000  # boxes are given in thousandths of the image's sides


class ImageZoomIn(Tool):
    """Crops `bbox_2d` out of image `img_idx` (0 is the first of the conversation; earlier crops count).

    min_side: a box whose shorter side has fewer pixels grows about its centre, aspect kept, as far as the image allows.
    """

    name: ClassVar[str] = "image_zoom_in"
    inline: ClassVar[bool] = True
    description: ClassVar[str] = "Zoom in on a region of an image and see it at full resolution."
    parameters: ClassVar[dict[str, Any]] = {
        "type": "object",
        "properties": {
            "bbox_2d": {
                "type": "array",
                "items": {"type": "number"},
                "minItems": 4,
                "maxItems": 4,
                "description": "The region as [x1, y1, x2, y2]; coordinates are relative, 0 to 1000.",
            },
            "label": {"type": "string", "description": "What the region shows."},
            "img_idx": {
                "type": "integer",
                "minimum": 0,
                "default": 0,
                "description": "Which image so far, from 0; earlier crops count.",
            },
        },
        "required": ["bbox_2d", "label"],
        "additionalProperties": False,
    }

    def __init__(self, min_side: int = 32):
        if min_side < 1:
            raise ValueError(f"image_zoom_in: min_side is {min_side}; it must be at least 1 pixel")
        self.min_side = min_side

    def run(self, arguments: Mapping[str, Any], images: list[Image.Image]) -> ToolResult:
        index = int(arguments.get("img_idx", 0))
        if index >= len(images):
            there_is = f"the images are 0 to {len(images) - 1}" if images else "there is no image"
            return ToolResult.failure(f"img_idx is {index}, but {there_is}")
        image = images[index]
        try:
            check_image(image, f"image {index}")
            box = pixel_box(arguments["bbox_2d"], image.size, self.min_side)
        except ValueError as error:
            return ToolResult.failure(str(error))
        crop = image.crop(box)
        return ToolResult(ok=True, images=[crop if crop.mode == "RGB" else crop.convert("RGB")])


def pixel_box(bbox: list[float], size: tuple[int, int], min_side: int) -> tuple[int, int, int, int]:
    """The crop (left, top, right, bottom) in pixels for a relative box, clipped to an image of `size` (width, height).

    Raises:
        ValueError: the box has no area, or none inside the image; the message is meant for the model.
    """
    if not (bbox[0] < bbox[2] and bbox[1] < bbox[3]):  # also refuses NaN
        raise ValueError(f"bbox_2d is {bbox}: it has no area, x1 must be less than x2 and y1 less than y2")
    x1, y1, x2, y2 = (min(max(value, 0), RELATIVE) for value in bbox)
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f"bbox_2d is {bbox}: it is outside the image, coordinates go from 0 to {RELATIVE}")
    width, height = ((x2 - x1) * size[0] / RELATIVE, (y2 - y1) * size[1] / RELATIVE)
    if not (width and height):  # 1e-323 of an image is rounded to none of it
        raise ValueError(f"bbox_2d is {bbox}: it has no area")
    grow = max(1.0, min_side / min(width, height))
    left, right = _span((x1 + x2) * size[0] / RELATIVE / 2, width * grow, size[0])
    top, bottom = _span((y1 + y2) * size[1] / RELATIVE / 2, height * grow, size[1])
    return left, top, right, bottom


def _span(centre: float, length: float, limit: int) -> tuple[int, int]:
    """An interval of at least one pixel about `centre`, moved inside [0, limit] and cut where it is longer."""
    if length >= limit:
        return 0, limit
    low = min(max(centre - length / 2, 0), limit - length)
    first = min(round(low), limit - 1)
    return first, max(round(low + length), first + 1)
