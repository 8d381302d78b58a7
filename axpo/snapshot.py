"""What files were like when they were read, cheap enough to look again before every start of a pipeline."""

import hashlib
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

_HASHED = 16 << 20  # bytes of a file up to which its content counts; of larger ones the size and the time


def snapshot(paths: Iterable[Path]) -> dict[str, dict[str, str]]:
    """{path: {file: its state}} of files and of all files in folders and below them; what is not there is left out."""
    return {str(path): {str(file): _state(file) for file in _files(path)} for path in paths if path.exists()}


def changes(before: dict[str, dict[str, str]]) -> Iterator[str]:
    """What has changed since a snapshot, a sentence a file. A path that is gone altogether is no change."""
    now = snapshot(map(Path, before))
    for path, files in now.items():
        for file in sorted(files.keys() | before[path].keys()):
            then, current = before[path].get(file), files.get(file)
            if then != current:
                yield f"{file} was {then or 'not there'}, now it is {current or 'gone'}"


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _state(file: Path) -> str:
    stat = file.stat()
    if not file.is_file() or stat.st_size > _HASHED:
        return f"{stat.st_size} bytes of {datetime.fromtimestamp(stat.st_mtime).isoformat()}"
    with file.open("rb") as stream:
        return f"{stat.st_size} bytes with SHA-256 {hashlib.file_digest(stream, 'sha256').hexdigest()[:16]}…"
