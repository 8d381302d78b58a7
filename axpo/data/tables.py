"""Files of records, by number and without reading them whole: JSON lines, Parquet, Arrow, and JSON lists and TSV.

What stays in memory is where rows begin (16 bytes a line of text, a few numbers a Parquet row group), and the row
groups read last. Images stay encoded.
"""

import csv
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

_FIELD_LIMIT = 2**30  # characters of a TSV field: benchmarks hold images in base64
_LINE_LIMIT = 2**28  # bytes of a line of JSON lines, or characters of one of TSV
_LIST_LIMIT = 2**32  # bytes of a JSON list, which is read whole


class TableError(ValueError):
    """A file or a record that cannot be read; the message says which and why."""


class Table(Protocol):
    """Records of one file, in its order. Methods may be called from any thread."""

    path: Path

    def __len__(self) -> int: ...

    def record(self, index: int) -> Any:
        """Record `index` as the file has it; TableError when it cannot be read."""
        ...

    def place(self, index: int) -> str:
        """Where record `index` is, for messages: file and line, or file and row."""
        ...


def open_table(path: str | Path) -> Table:
    """The table in a file, by the end of its name.

    Raises:
        TableError: there is no such file, its format is unknown, or it is cut short.
    """
    path = Path(path)
    if not path.exists():
        raise TableError(f"{path}: cannot be read: there is no such file")
    if not path.is_file():  # of a pipe, opening it would wait for the other end
        raise TableError(f"{path}: cannot be read: it is no file, but a folder, a pipe or a device")
    if path.suffix not in _FORMATS:
        raise TableError(f"{path}: the format of this file is unknown; there is {', '.join(sorted(_FORMATS))}")
    try:
        return _FORMATS[path.suffix](path)
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error}") from None


def find_files(path: str | Path) -> list[Path]:
    """`path` itself, or the shards in a folder and below it, in the order of their names.

    Raises:
        TableError: a folder without a file of a known format.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    shards = sorted(file for file in path.rglob("*") if file.suffix in SHARDS and file.is_file())
    if not shards:
        raise TableError(f"{path}: no {', '.join(SHARDS)} file in this folder")
    return shards


class JsonLines:
    """One JSON value a line; lines without one do not count."""

    def __init__(self, path: Path):
        self.path = path
        self._starts, self._numbers = array("q"), array("q")
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LINE_LIMIT), b""), start=1):
                if len(line) == _LINE_LIMIT:
                    raise TableError(f"{path}:{number}: a line of {_LINE_LIMIT} bytes or more; is it JSON lines?")
                if line.strip():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)

    def __len__(self) -> int:
        return len(self._starts)

    def record(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            line = file.readline()
        try:
            return json.loads(line)
        except ValueError as error:  # of JSON or of UTF-8
            raise TableError(f"not valid JSON: {error}") from None
        except RecursionError:
            raise TableError("not valid JSON: it is nested too deeply") from None

    def place(self, index: int) -> str:
        return f"{self.path}:{self._numbers[index]}"


def _parquet(path: Path) -> Table:
    from axpo.data.columnar import Parquet  # pyarrow starts a thread when it is imported, and takes a while

    return Parquet(path)


def _arrow(path: Path) -> Table:
    from axpo.data.columnar import Arrow

    return Arrow(path)


class JsonList:
    """A JSON file that is one list: read whole."""

    def __init__(self, path: Path):
        self.path = path
        if (size := path.stat().st_size) > _LIST_LIMIT:
            raise TableError(f"{path}: {size} bytes in one JSON list; make it .jsonl, a row a line")
        try:
            self._records = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TableError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(self._records, list):
            raise TableError(f"{path}: must be a JSON list of rows, got {type(self._records).__name__}")

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int) -> Any:
        return self._records[index]

    def place(self, index: int) -> str:
        return f"{self.path}: row {index}"


class Tsv:
    """Tab-separated values with a header, as VLMEvalKit publishes them; all values are texts."""

    def __init__(self, path: Path):
        self.path = path
        csv.field_size_limit(_FIELD_LIMIT)
        self._starts = array("q")
        with path.open(encoding="utf-8", newline="") as file:
            lines = _Lines(file)
            rows = csv.reader(lines, delimiter="\t")
            self._header = next(rows, [])
            start = lines.read
            for row in rows:
                if row:
                    self._starts.append(start)
                start = lines.read

    def __len__(self) -> int:
        return len(self._starts)

    def record(self, index: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._starts[index])
            values = next(csv.reader(_decoded(file), delimiter="\t"))
        if len(values) != len(self._header):
            raise TableError(f"{len(values)} values under {len(self._header)} names")
        return dict(zip(self._header, values, strict=True))

    def place(self, index: int) -> str:
        return f"{self.path}: row {index}"


class _Lines:
    """Lines of a text file, and how many bytes of it have been read: a quoted value may hold line ends."""

    def __init__(self, file: Any):
        self._file = file
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(_LINE_LIMIT):
            if len(line) == _LINE_LIMIT:
                raise TableError(f"{self._file.name}: a line of {_LINE_LIMIT} characters or more; is it TSV?")
            self.read += len(line.encode())
            yield line


def _decoded(file: Any) -> Iterator[str]:
    for line in file:
        yield line.decode("utf-8")


SHARDS = (".jsonl", ".parquet", ".arrow")
_FORMATS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": JsonLines,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".json": JsonList,
    ".tsv": Tsv,
}
