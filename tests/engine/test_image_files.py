"""Paths to images that are no image files: refused at once, whatever reading them would do."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from axpo.images import load_image
from engine.prompts import LARGEST_IMAGE, open_image, read_image


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng().integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def place(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(10 << 30)
    elif kind == "null":
        path = Path("a\0b.png")
    return path


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("pipe", "it is a named pipe"),
        ("folder", "Is a directory"),
        ("device", "it is a device"),
        ("sparse", f"it has {10 << 30} bytes, .* more than {LARGEST_IMAGE}"),
        ("null", "no file name: embedded null"),
        ("missing", "missing.png"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, reason: str) -> None:
    path = place(tmp_path, kind)
    for read in (open_image, load_image):
        begun = time.perf_counter()
        with pytest.raises(ValueError, match=reason) as error:
            read(path)
        assert str(path) in str(error.value) and time.perf_counter() - begun < 5


@pytest.mark.timeout(60)
def test_a_pipe_with_a_writer_is_refused_and_not_drained(tmp_path: Path, picture: Path) -> None:
    path = place(tmp_path, "pipe")
    end = os.open(path, os.O_RDWR)
    os.write(end, picture.read_bytes())
    with pytest.raises(ValueError, match="it is a named pipe"):
        open_image(path)
    assert os.read(end, 1 << 16) == picture.read_bytes()
    os.close(end)


@pytest.mark.timeout(60)
def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path, stop = tmp_path / "growing.png", threading.Event()
    path.write_bytes(bytes(64 << 20))

    def grow() -> None:
        with path.open("ab", buffering=0) as file:
            while not stop.is_set():
                file.write(b"0")

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        with pytest.raises(OSError, match="it changed while it was read"):
            read_image(path)
    finally:
        stop.set()
        writer.join()
    with pytest.raises(OSError, match="it changed while it was read"):
        read_image("/proc/self/status")  # says that it has no bytes, and has some


def test_what_becomes_of_a_file_after_it_was_opened_does_not_matter(picture: Path) -> None:
    expected = np.asarray(Image.open(picture))
    opened = open_image(picture)
    os.truncate(picture, 20)
    np.testing.assert_array_equal(np.asarray(opened), expected)
    with pytest.raises(ValueError, match=r"picture\.png"):
        open_image(picture).load()
