"""DCP's files, with the operating system's own words kept when it refuses a write."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter


class WatchedWriter(FileSystemWriter):
    """A FileSystemWriter that remembers the first OSError; torch.save hides it behind 'unexpected pos 704 vs 598'."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.fs = _WatchedFiles()

    @property
    def refusal(self) -> OSError | None:
        """'No space left on device', for example; None when no write was refused."""
        return self.fs.refusal


class _WatchedFiles(FileSystem):
    refusal: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:
            yield _WatchedStream(stream, self)


class _WatchedStream:
    """The stream itself but for `write`."""

    def __init__(self, stream: Any, files: _WatchedFiles):
        self._stream, self._files = stream, files

    def write(self, data: Any) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self._files.refusal = self._files.refusal or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
