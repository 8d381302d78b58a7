"""Published data sets and benchmarks as rows: one small function each, by name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axpo.data.adapters import perception, reasoning, search, training
from axpo.data.adapters.fields import FieldError
from axpo.data.dataset import DataError, report
from axpo.data.rows import check_pictures, parse_row
from axpo.data.tables import TableError, find_files, open_table

Convert = Callable[[dict[str, Any], Path, int], dict[str, Any]]
"""(a published record, the folder of its file, its number) -> a record of the row schema."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """source: where the data set is published. rows: of the split that the paper uses; None where it takes a part.

    family: of a benchmark, what it measures.
    """

    convert: Convert
    source: str
    rows: int | None = None
    family: str = ""


ADAPTERS: dict[str, Adapter] = {
    "virl39k": Adapter(training.virl39k, "TIGER-Lab/ViRL39K", 38_870),
    "fvqa": Adapter(training.fvqa, "lmms-lab/FVQA"),
    "pyvision-rl": Adapter(training.pyvision_rl, "Agents-X/PyVision-Image-RL-Data"),
    "mmfinereason": Adapter(training.mmfinereason, "OpenDataArena/MMFineReason-1.8M-Qwen3-VL-235B-Thinking"),
    "mathvision": Adapter(reasoning.mathvision, "MathLLMs/MathVision, split testmini", 304, family="reasoning"),
    "dynamath": Adapter(reasoning.dynamath, "DynaMath/DynaMath_Sample, one variant", 501, family="reasoning"),
    "math-vr": Adapter(reasoning.math_vr, "gogoduan/Math-VR-bench", 2_500, family="reasoning"),
    "vstar": Adapter(perception.vstar, "craigwu/vstar_bench", 191, family="perception"),
    "visualprobe-hard": Adapter(perception.visualprobe, "Mini-o3/VisualProbe_Hard", family="perception"),
    "hrbench-4k": Adapter(perception.hrbench, "DreamMr/HR-Bench, hr_bench_4k", 800, family="perception"),
    "hrbench-8k": Adapter(perception.hrbench, "DreamMr/HR-Bench, hr_bench_8k", 800, family="perception"),
    "hr-mmsearch": Adapter(search.hr_mmsearch, "sensenova/HR-MMSearch", 305, family="search"),
    "mmsearch": Adapter(search.mmsearch, "CaraJ/MMSearch, end2end", 300, family="search"),
}


class Conversion:
    """The rows of a published data set, checked; iterating reads the source once.

    name: an adapter's. source: its file, or a folder of shards. skip: leave wrong records out and count them.

    Raises:
        ValueError: no such adapter. DataError: the source cannot be read.
    """

    def __init__(self, name: str, source: str | Path, *, skip: bool = False):
        if name not in ADAPTERS:
            raise ValueError(f"--from {name!r}: there is {', '.join(ADAPTERS)}")
        self.adapter = ADAPTERS[name]
        self.skip = skip
        self.skipped: list[str] = []
        try:
            self._tables = [open_table(file) for file in find_files(source)]
        except TableError as error:
            raise DataError(str(error)) from None

    def __len__(self) -> int:
        return sum(len(table) for table in self._tables)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Records of the row schema, images as paths or bytes.

        Raises:
            DataError: the first wrong record, unless `skip`.
        """
        number = 0
        for table in self._tables:
            for index in range(len(table)):
                try:
                    yield self._convert(table.record(index), table.path.parent, number)
                except ValueError as error:
                    problem = f"{table.place(index)}: {error}"
                    if not self.skip:
                        raise DataError(report([problem])) from None
                    self.skipped.append(problem)
                number += 1

    def _convert(self, given: Any, folder: Path, number: int) -> dict[str, Any]:
        if not isinstance(given, dict):
            raise FieldError(f"must be an object, got {type(given).__name__}")
        record = self.adapter.convert(given, folder, number)
        row, problems = parse_row(record, folder)
        if row is not None:
            problems = check_pictures(row)
        if problems:
            raise ValueError("; ".join(problems))
        return record
