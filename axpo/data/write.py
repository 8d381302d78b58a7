"""Writes rows: JSON lines, or Parquet in row groups that random reading can afford."""

import base64
import json
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from axpo.images import encoded

GROUP_ROWS = 64  # a row is read with its group: with images of 1 MB, 64 MB
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "question": pa.string(),
        "messages": pa.string(),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "answer": pa.list_(pa.string()),
        "grader": pa.string(),
        "options": pa.list_(pa.string()),
        "tolerance": pa.float64(),
        "threshold": pa.float64(),
        "meta": pa.string(),
    }
)


def write_rows(records: Iterable[dict[str, Any]], path: str | Path) -> int:
    """Writes records of the row schema, whose images are paths or bytes, as they come. Returns their number.

    Parquet holds the images themselves. JSON lines hold bytes as data URIs, and the paths of files, seen from `path`.
    The file appears when it is complete.

    Raises:
        ValueError: the name ends neither in .jsonl nor in .parquet.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path}: rows are written to .jsonl or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        count = (_write_parquet if path.suffix == ".parquet" else _write_lines)(records, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def json_line(record: dict[str, Any], folder: Path) -> str:
    """A record as a line of a .jsonl file in `folder`."""
    images = [_text(image, folder) for image in record.get("images", [])]
    return json.dumps({**record, "images": images} if images else record, ensure_ascii=False) + "\n"


def _write_lines(records: Iterable[dict[str, Any]], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json_line(record, path.parent))
            count += 1
    return count


def _write_parquet(records: Iterable[dict[str, Any]], path: Path) -> int:
    count = 0
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        columns = _columns(records)
        while group := list(islice(columns, GROUP_ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=_SCHEMA))
            count += len(group)
    return count


def _columns(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for record in records:
        answers = record.get("answer")
        answers = answers if isinstance(answers, list) or answers is None else [answers]
        yield {
            **record,
            "answer": answers and [str(answer) for answer in answers],
            "images": [_stored(image) for image in record.get("images", [])],
            "messages": json.dumps(record["messages"], ensure_ascii=False) if record.get("messages") else None,
            "meta": json.dumps(record["meta"], ensure_ascii=False) if record.get("meta") else None,
        }


def _stored(image: Path | bytes) -> dict[str, Any]:
    return {"bytes": encoded(image), "path": None if isinstance(image, bytes) else image.name}


def _text(image: Path | bytes, folder: Path) -> str:
    if isinstance(image, bytes):
        # Pillow looks at the bytes, not at this type.
        return f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return os.path.relpath(image, folder)
