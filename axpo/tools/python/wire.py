"""Frames between the run and a kernel: JSON with raw blobs behind it. Runs on both sides of the sandbox.

A kernel is hostile: what it sends is bounded before it is read, and nothing of it is unpickled or decoded as an image.
"""

import json
import socket
import struct
from typing import Any

_PREFIX = struct.Struct("<II")  # bytes of the JSON, bytes of the blobs
MAX_JSON = 1 << 20
MAX_BLOBS = 1 << 28


class WireError(Exception):
    """The other side sent what is no frame, or too large a one."""


def send(sock: socket.socket, message: dict[str, Any], blobs: list[bytes]) -> None:
    head = json.dumps({**message, "blobs": [len(blob) for blob in blobs]}).encode()
    sock.sendall(_PREFIX.pack(len(head), sum(map(len, blobs))) + head)
    for blob in blobs:
        sock.sendall(blob)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """The next frame.

    Raises:
        EOFError: the other side is gone.
        WireError: it is no frame.
    """
    size, total = _PREFIX.unpack(_read(sock, _PREFIX.size))
    if size > MAX_JSON or total > MAX_BLOBS:
        raise WireError(f"a frame of {size} + {total} bytes")
    try:
        message = json.loads(_read(sock, size))
        lengths = message.pop("blobs")
        if not all(type(n) is int and n >= 0 for n in lengths) or sum(lengths) != total:
            raise WireError(f"blobs of {lengths} bytes in {total}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"not a message: {error}") from error
    return message, [_read(sock, n) for n in lengths]


def _read(sock: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = sock.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
