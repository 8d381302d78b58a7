"""Parquet and Arrow files as tables; see axpo.data.tables."""

import threading
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from axpo.data.tables import TableError

_GROUPS_KEPT = 2  # decoded row groups of a Parquet file


class Parquet:
    """A Parquet file, a row group at a time: files whose rows are read in random order want small groups."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
        except pa.ArrowInvalid as error:
            raise TableError(f"{path}: cut short, or not a Parquet file ({error})") from None
        groups = self._file.metadata.num_row_groups
        self._ends = [0]
        for group in range(groups):
            self._ends.append(self._ends[-1] + self._file.metadata.row_group(group).num_rows)
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, index: int) -> Any:
        group = bisect_right(self._ends, index) - 1
        return self._group(group).slice(index - self._ends[group], 1).to_pylist()[0]

    def place(self, index: int) -> str:
        return f"{self.path}: row {index}"

    def _group(self, group: int) -> pa.Table:
        with self._lock:
            if group not in self._kept:
                try:
                    self._kept[group] = self._file.read_row_group(group)
                except (pa.ArrowInvalid, OSError) as error:
                    raise TableError(f"row group {group} is damaged ({error})") from None
                if len(self._kept) > _GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]


class Arrow:
    """An Arrow file as `datasets` saves it (`save_to_disk`), mapped into memory and not read."""

    def __init__(self, path: Path):
        self.path = path
        try:
            source = pa.memory_map(str(path))
            try:
                self._table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                self._table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowInvalid, EOFError) as error:
            raise TableError(f"{path}: cut short, or not an Arrow file ({error})") from None

    def __len__(self) -> int:
        return self._table.num_rows

    def record(self, index: int) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]

    def place(self, index: int) -> str:
        return f"{self.path}: row {index}"
