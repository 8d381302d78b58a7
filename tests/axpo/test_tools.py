"""image_zoom_in cuts what was asked for, and says what was wrong where it cannot."""

import io
import math
import random
import struct
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from PIL import Image

from axpo.images import check_image
from axpo.tools import Tool, ToolResult, get_tools
from axpo.tools.image_zoom_in import ImageZoomIn, pixel_box
from axpo.tools.schema import surely_valid

ZOOM = ImageZoomIn(min_side=1)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    return Image.fromarray(np.random.default_rng().integers(0, 256, shape, dtype=np.uint8), mode)


def call(bbox: Any, images: list[Image.Image], tool: Tool = ZOOM, **more: Any) -> ToolResult:
    return tool.call({"bbox_2d": bbox, "label": "it"} | more, images)


def crop_of(result: ToolResult) -> np.ndarray:
    assert result.ok and result.error is None and len(result.images) == 1, result.error
    assert result.images[0].mode == "RGB"
    return np.asarray(result.images[0])


def problem(result: ToolResult) -> str:
    assert not result.ok and result.images == [] and result.error is not None
    assert result.text == f"Error: {result.error}", "the model reads what the log says"
    return result.error


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, ["required property", "arguments"]),
        ({"label": "x"}, ["'bbox_2d' is a required property"]),
        ({"bbox_2d": [0, 0, 9, 9]}, ["'label' is a required property"]),
        ({"bbox_2d": [0, 0, 9, 9], "label": "x", "zoom": 2}, ["'zoom'", "unexpected"]),
        ({"bbox_2d": "0 0 9 9", "label": "x"}, ['bbox_2d is "0 0 9 9"', 'type "array"']),
        ({"bbox_2d": [0, 0, 9], "label": "x"}, ["bbox_2d is [0, 0, 9]", "at least 4 items"]),
        ({"bbox_2d": [0, 0, 9, 9, 9], "label": "x"}, ["bbox_2d is [0, 0, 9, 9, 9]", "at most 4 items"]),
        ({"bbox_2d": [0, 0, "9", 9], "label": "x"}, ['bbox_2d.2 is "9"', 'type "number"']),
        ({"bbox_2d": [0, 0, True, 9], "label": "x"}, ["bbox_2d.2 is true", 'type "number"']),
        ({"bbox_2d": [0, None, 9, 9], "label": "x"}, ["bbox_2d.1 is null", 'type "number"']),
        ({"bbox_2d": [0, 0, 9, 9], "label": 5}, ["label is 5", 'type "string"']),
        ({"bbox_2d": [0, 0, 9, 9], "label": "x", "img_idx": -1}, ["img_idx is -1", "at least 0"]),
        ({"bbox_2d": [0, 0, 9, 9], "label": "x", "img_idx": 0.5}, ["img_idx is 0.5", 'type "integer"']),
        ({"bbox_2d": [0, 0, 9, 9], "label": "x", "img_idx": "0"}, ['img_idx is "0"', 'type "integer"']),
    ],
)
def test_wrong_arguments_are_named_with_their_value_and_the_rule(arguments: dict[str, Any], said: list[str]) -> None:
    message = problem(ZOOM.call(arguments, [noise(8, 8)]))
    assert all(word in message for word in said), message


def test_a_long_value_is_cut_short_in_the_message() -> None:
    message = problem(call("x" * 5000, [noise(8, 8)]))
    assert len(message) < 200 and "..." in message


def test_the_schema_is_the_papers() -> None:
    function = ZOOM.schema["function"]
    assert ZOOM.schema["type"] == "function" and function["name"] == "image_zoom_in"
    assert list(function["parameters"]["properties"]) == ["bbox_2d", "label", "img_idx"]
    assert function["parameters"]["required"] == ["bbox_2d", "label"]


# Geometry.


def test_a_box_cuts_exactly_its_pixels() -> None:
    image = noise(40, 20)
    pixels = np.asarray(image)
    assert np.array_equal(crop_of(call([0, 0, 1000, 1000], [image])), pixels)
    assert np.array_equal(crop_of(call([250, 100, 750, 600], [image])), pixels[2:12, 10:30])
    assert np.array_equal(crop_of(call([0, 950, 25.0, 1000], [image])), pixels[19:20, 0:1])


def test_what_lies_outside_is_clipped() -> None:
    image = noise(40, 20)
    pixels = np.asarray(image)
    assert np.array_equal(crop_of(call([-500, -1, 500, 5000], [image])), pixels[:, :20])
    assert np.array_equal(crop_of(call([-math.inf, -math.inf, math.inf, math.inf], [image])), pixels)
    assert np.array_equal(crop_of(call([500, 0, 10**400, 1000], [image])), pixels[:, 20:])


@pytest.mark.parametrize("bbox", [[5, 5, 5, 9], [5, 5, 9, 5], [5, 5, 5, 5], [9, 5, 5, 9], [5, 9, 9, 5], [9, 9, 5, 5]])
def test_a_box_without_area_or_with_swapped_corners_is_refused(bbox: list[int]) -> None:
    message = problem(call(bbox, [noise(8, 8)]))
    assert f"bbox_2d is {bbox}" in message and "no area" in message and "x1 must be less than x2" in message


@pytest.mark.parametrize("place", range(4))
def test_nan_is_refused(place: int) -> None:
    bbox = [100.0, 100.0, 900.0, 900.0]
    bbox[place] = math.nan
    assert "nan" in problem(call(bbox, [noise(8, 8)]))


@pytest.mark.parametrize("bbox", [[1000, 0, 1500, 500], [-9, 0, 0, 500], [0, 1001, 500, 2000], [0, -5, 500, -1]])
def test_a_box_outside_the_image_is_refused(bbox: list[int]) -> None:
    message = problem(call(bbox, [noise(8, 8)]))
    assert f"bbox_2d is {bbox}" in message and "outside the image" in message and "0 to 1000" in message


def test_a_box_too_thin_for_floating_point_is_refused_by_name() -> None:
    assert "no area" in problem(call([0, 0, 1e-323, 1000], [noise(128, 128)]))


def test_a_small_box_grows_about_its_centre_and_keeps_its_aspect() -> None:
    assert pixel_box([500, 500, 510, 520], (1000, 1000), 30) == (490, 480, 520, 540)
    # Moved inside where it would leave the image, cut only where the image is too short.
    assert pixel_box([0, 0, 10, 10], (1000, 1000), 30) == (0, 0, 30, 30)
    assert pixel_box([990, 990, 1000, 1000], (1000, 1000), 30) == (970, 970, 1000, 1000)
    assert pixel_box([500, 0, 510, 500], (1000, 20), 30) == (490, 0, 520, 20)
    # One that is large enough stays.
    assert pixel_box([100, 100, 130, 400], (1000, 1000), 30) == (100, 100, 130, 400)


def test_images_of_one_pixel_and_boxes_below_one() -> None:
    image = noise(1, 1)
    for tool in (ZOOM, ImageZoomIn(min_side=32)):
        assert np.array_equal(crop_of(call([0, 0, 1000, 1000], [image], tool)), np.asarray(image))
        assert np.array_equal(crop_of(call([400, 400, 401, 401], [image], tool)), np.asarray(image))
    assert crop_of(call([500, 500, 500.0001, 500.0001], [noise(50, 50)])).shape == (1, 1, 3)


coordinate = st.one_of(st.integers(-50, 1050), st.floats(allow_nan=True, allow_infinity=True))


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(coordinate, coordinate, coordinate, coordinate),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(1, 64),
)
def test_any_box_gives_a_crop_inside_the_image_or_a_sentence(
    bbox: tuple[float, ...], size: tuple[int, int], min_side: int
) -> None:
    x1, y1, x2, y2 = bbox
    try:
        left, top, right, bottom = pixel_box(list(bbox), size, min_side)
    except ValueError as error:
        assert "bbox_2d" in str(error)
        inside = [min(x2, 1000) - max(x1, 0), min(y2, 1000) - max(y1, 0)]
        assert not all(length > 1e-300 for length in inside), f"refused although it has area: {error}"
        return
    assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    assert right - left >= min(min_side, size[0]) - 1 and bottom - top >= min(min_side, size[1]) - 1
    # Every pixel that lies wholly in the box is shown.
    assert left <= math.ceil(max(x1, 0) * size[0] / 1000) and right >= math.floor(min(x2, 1000) * size[0] / 1000)
    assert top <= math.ceil(max(y1, 0) * size[1] / 1000) and bottom >= math.floor(min(y2, 1000) * size[1] / 1000)


# Which image, and of what kind.


def test_img_idx_counts_earlier_crops() -> None:
    images = [noise(40, 40), noise(30, 20)]
    assert np.array_equal(crop_of(call([0, 0, 1000, 1000], images, img_idx=1)), np.asarray(images[1]))
    images += call([0, 0, 500, 500], images).images
    inner = crop_of(call([500, 0, 1000, 500], images, img_idx=2))
    assert np.array_equal(inner, np.asarray(images[0])[0:10, 10:20])
    assert np.array_equal(crop_of(call([0, 0, 1000, 1000], images, img_idx=2.0)), np.asarray(images[0])[:20, :20])
    assert problem(call([0, 0, 9, 9], images, img_idx=3)) == "img_idx is 3, but the images are 0 to 2"
    assert problem(call([0, 0, 9, 9], [])) == "img_idx is 0, but there is no image"


@pytest.mark.parametrize("mode", ["L", "RGBA", "RGB"])
def test_images_of_other_modes_become_rgb(mode: str) -> None:
    image = noise(16, 16, mode)
    pixels = np.asarray(image)
    expected = np.repeat(pixels[..., None], 3, axis=2) if mode == "L" else pixels[..., :3]
    assert np.array_equal(crop_of(call([0, 500, 1000, 1000], [image])), expected[8:])


def file_of(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_an_image_that_cannot_be_decoded_is_one_clear_error(form: str) -> None:
    data = file_of(noise(64, 64), form)
    broken = Image.open(io.BytesIO(data[: len(data) // 2]))
    assert "image 0 cannot be decoded" in problem(call([0, 0, 500, 500], [broken]))
    with pytest.raises(ValueError, match="row 3 cannot be decoded"):
        check_image(Image.open(io.BytesIO(data[: len(data) // 2])), "row 3")
    check_image(Image.open(io.BytesIO(data)), "row 3")


def test_an_image_like_a_bomb_is_refused_before_it_is_decoded() -> None:
    side = math.isqrt(Image.MAX_IMAGE_PIXELS or 0) + 1

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    # It says that it is huge; it need not even have the data.
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.warns(Image.DecompressionBombWarning):
        bomb = Image.open(io.BytesIO(data))
    message = problem(call([0, 0, 500, 500], [bomb]))
    assert f"image 0 is {side}x{side}" in message and f"more than {Image.MAX_IMAGE_PIXELS} pixels" in message


def test_an_image_without_pixels_is_refused() -> None:
    for size in ((0, 5), (5, 0)):
        assert "it has no pixels" in problem(call([0, 0, 500, 500], [Image.new("RGB", size)]))


# The registry.


def test_tools_come_by_name_in_order_with_their_options() -> None:
    side = random.randrange(1, 100)
    tools = get_tools(["image_zoom_in"], {"image_zoom_in": {"min_side": side}})
    assert list(tools) == ["image_zoom_in"]
    tool = tools["image_zoom_in"]
    assert isinstance(tool, ImageZoomIn) and tool.min_side == side and tool.session() is tool
    assert get_tools([]) == {}


def test_unknown_and_repeated_names_and_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no tool 'image_zoom'; there is: .*image_zoom_in"):
        get_tools(["image_zoom"])
    with pytest.raises(ValueError, match="two tools are called 'image_zoom_in'"):
        get_tools(["image_zoom_in", "image_zoom_in"])
    with pytest.raises(ValueError, match="min_side is 0"):
        get_tools(["image_zoom_in"], {"image_zoom_in": {"min_side": 0}})


def test_a_tool_of_your_own_comes_by_its_import_path() -> None:
    tools = get_tools(["image_zoom_in", "tests.axpo.test_tools:Shout"])
    assert list(tools) == ["image_zoom_in", "shout"]
    assert tools["shout"].call({"text": "hey"}, []).text == "HEY"
    for name, told in (
        ("tests.axpo.nowhere:Shout", "cannot be imported"),
        ("tests.axpo.test_tools:Whisper", "cannot be imported"),
        ("tests.axpo.test_tools:noise", "not a class that derives from axpo.tools.Tool"),
    ):
        with pytest.raises(ValueError, match=told):
            get_tools([name])


class Shout(Tool):
    name = "shout"
    description = "Says it louder."
    parameters: ClassVar = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}

    def run(self, arguments: Mapping[str, Any], images: list[Image.Image]) -> ToolResult:
        return ToolResult(True, arguments["text"].upper())


# The quick look at arguments.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1003) | st.floats() | st.sampled_from(["", "it"]),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["bbox_2d", "label", "img_idx", "x"]), inner)
    ),
    max_leaves=8,
)


@given(VALUES)
@settings(deadline=None, max_examples=300)
def test_what_is_surely_valid_is_valid(value: Any) -> None:
    if surely_valid(ZOOM.parameters, value):
        assert Draft202012Validator(ZOOM.parameters).is_valid(value)


@pytest.mark.parametrize("box", [[0, 0, 9, 9], [0.5, 1, 2, 3.25]])
def test_ordinary_arguments_are_surely_valid(box: list[float]) -> None:
    arguments = {"bbox_2d": box, "label": "it"}
    assert surely_valid(ZOOM.parameters, arguments) and surely_valid(ZOOM.parameters, arguments | {"img_idx": 2})
    assert not surely_valid(ZOOM.parameters, arguments | {"img_idx": -1})
    assert not surely_valid({"pattern": "a"}, "a"), "an unknown keyword is left to the validator"
