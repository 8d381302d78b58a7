"""What the fork benchmark says at its end: rows for the JSON, tables, and a plot where matplotlib is installed."""

import importlib
from pathlib import Path
from typing import Any

from bench.fork_workload import BLOCK, Branches, Floors, Measured, Workload

Row = dict[str, Any]
NOISE = 0.05  # a difference that counts for nothing


def equal_share(outputs: list[list[int]], reference: list[list[int]]) -> float:
    """Share of tokens that are the same in both, over what both have said."""
    pairs = [pair for a, b in zip(outputs, reference, strict=True) for pair in zip(a, b, strict=False)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def make_row(measured: Measured, work: Workload, floors: Floors, reference: Measured | None) -> Row:
    """One entry of the JSON's `rows`. Names that begin with inside_ are of the forks inside; seconds, bytes.

    Shares are the floor's time over the measured one, so 1 is as fast as the machine allows; of bytes, the least there
    can be over what there was. reference: greedy outputs to compare with; None leaves the shares of equal tokens out.
    """
    row: Row = {
        "system": measured.system,
        "prefix": len(work.prefix),
        "forks": work.forks,
        "new_tokens": work.new_tokens,
        "fork_to_first_token_s": None,
        "tokens_per_s": None,
        "bytes_copied_per_fork": None,
        "kv_bytes": None,
        "prefill_s": measured.prefill_s,
        "prefill_share": _share(floors.prefill(len(work.prefix)), measured.prefill_s),
        "cpu_s": measured.cpu_s,
        "notes": measured.notes,
        "error": measured.error,
    }
    prefix = len(work.prefix)
    # Each branch has half of its new tokens on average; inside, the branches have the whole beginning in common.
    end_step = floors.step(work.forks, prefix, work.new_tokens / 2)
    inside_step = floors.step(work.forks, work.inside_at, 1 + work.inside_tokens / 2)
    groups: tuple[tuple[str, Branches | None, float, float, Branches | None], ...] = (
        ("", measured.end, floors.head(work.forks), end_step, reference and reference.end),
        (
            "inside_",
            measured.inside,
            floors.step(work.forks, work.inside_at, 1),
            inside_step,
            reference and reference.inside,
        ),
    )
    for mark, group, first_floor, step_floor, other in groups:
        if group is None:
            continue
        rate, decode = group.tokens_per_s, group.decode_tokens_per_s
        count, beginning = (work.inside_tokens, work.inside_at) if mark else (work.new_tokens, prefix)
        held, copied = group.kv_bytes, group.bytes_copied
        least_held = floors.held(beginning, [int(bool(mark)) + len(output) for output in group.outputs])
        least_copied = beginning % BLOCK * floors.token_bytes
        least = first_floor + (count - 1) * step_floor
        row |= {
            f"{mark}fork_to_first_token_s": group.first_token_s,
            f"{mark}first_token_share": _share(first_floor, group.first_token_s),
            f"{mark}tokens_per_s": rate,
            f"{mark}tokens_share": _share(least, work.forks * count / rate if rate else None),
            f"{mark}decode_tokens_per_s": decode,
            f"{mark}decode_share": _share(step_floor, work.forks / decode if decode else None),
            f"{mark}bytes_copied_per_fork": copied,
            f"{mark}copied_share": _share(least_copied, copied),
            f"{mark}copy_floor_s": None if copied is None else floors.copy(copied * work.forks),
            f"{mark}recomputed_per_fork": group.recomputed,
            f"{mark}kv_bytes": held,
            f"{mark}kv_share": _share(least_held, held),
            f"{mark}fork_us": None if group.fork_s is None else group.fork_s * 1e6,
            f"{mark}complete": group.complete,
            f"{mark}equal_tokens": equal_share(group.outputs, other.outputs) if other else None,
        }
    return row


def render(rows: list[Row], title: str) -> str:
    """A table for each group of branches, with how many times faster ours (the first row) is; then notes."""
    lines = [title, ""]
    for mark, heading in (("", "Forks at the prefix's end"), ("inside_", "Forks inside the first continuation")):
        lines += [heading, *_table(HEAD, [_cells(row, rows[0], mark) for row in rows]), ""]
    lines += [f"  {row['system']}: {'; '.join(row['notes'])}" for row in rows if row["notes"]]
    return "\n".join(lines)


def render_grid(grid: list[Row], base: str, other: str, again: str) -> str:
    """For every prefix and number of forks: decoding of `base` over `other`, first token of `again` over `base`."""
    cells = {(row["prefix"], row["forks"], row["system"]): row for row in grid}
    places = sorted({(row["prefix"], row["forks"]) for row in grid})
    table = []
    for prefix, forks in places:
        ours, flat, fresh = (cells.get((prefix, forks, name), {}) for name in (base, other, again))
        decode = _ratio(ours.get("decode_tokens_per_s"), flat.get("decode_tokens_per_s"))
        first = _ratio(fresh.get("fork_to_first_token_s"), ours.get("fork_to_first_token_s"))
        verdict = "" if decode is None else "wins" if decode > 1 + NOISE else "loses" if decode < 1 - NOISE else "even"
        rates = [_number(system.get("decode_tokens_per_s")) for system in (ours, flat)]
        figures = [*rates, _times(decode), verdict]
        table.append([str(prefix), str(forks), *figures, _times(first)])
    head = ["prefix", "forks", "decode/s", "unshared", "sharing", "", "first token beside re-prefill"]
    return "\n".join(["Where sharing attention wins and where it loses", *_table(head, table)])


def plot(rows: list[Row], grid: list[Row], file: Path, title: str) -> str:
    """Writes the PNG. Returns what to say of it: where it is, or that matplotlib is missing."""
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ImportError:
        return "no plot: matplotlib is not installed"
    pyplot = importlib.import_module("matplotlib.pyplot")

    shown = [row for row in rows if not row["error"] and row["tokens_per_s"]]
    figure, axes = pyplot.subplots(1, 3 if grid else 2, figsize=(16 if grid else 11, 4.5), layout="constrained")
    names = [row["system"] for row in shown]
    axes[0].barh(names, [row["tokens_per_s"] for row in shown])
    axes[0].set_xlabel("tokens per second of all branches, from the fork on")
    axes[1].barh(names, [row["fork_to_first_token_s"] * 1e3 for row in shown], log=True)
    axes[1].set_xlabel("fork to first token of all branches, ms")
    for axis in axes[:2]:
        axis.invert_yaxis()
    if grid:
        for forks in sorted({row["forks"] for row in grid}):
            for system in dict.fromkeys(row["system"] for row in grid):
                line = [r for r in grid if r["forks"] == forks and r["system"] == system and r["decode_tokens_per_s"]]
                points = [r["prefix"] for r in line], [r["decode_tokens_per_s"] for r in line]
                axes[2].plot(*points, "o-", label=f"{system}, {forks} forks")
        axes[2].set(xscale="log", yscale="log", xlabel="prefix, tokens", ylabel="tokens per second of decoding")
        axes[2].legend(fontsize=6)
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
    return f"plot: {file}"


HEAD = ["system", "fork µs", "first token ms", "of floor", "ours ×", "tokens/s", "of floor", "ours ×"]
HEAD += ["decode/s", "of floor", "ours ×"]
HEAD += ["copied B", "of floor", "computed again", "KV MB", "of floor", "equal"]


def _cells(row: Row, ours: Row, mark: str) -> list[str]:
    first, rate = row.get(f"{mark}fork_to_first_token_s"), row.get(f"{mark}tokens_per_s")
    if first is None:
        return [row["system"], row["error"] or "not measured"]
    equal, decode = row.get(f"{mark}equal_tokens"), row.get(f"{mark}decode_tokens_per_s")
    return [
        row["system"] + ("" if row.get(f"{mark}complete") else " (cut off)"),
        _number(row.get(f"{mark}fork_us")),
        _number(first * 1e3),
        _percent(row.get(f"{mark}first_token_share")),
        _times(_ratio(first, ours.get(f"{mark}fork_to_first_token_s"))),
        _number(rate),
        _percent(row.get(f"{mark}tokens_share")),
        _times(_ratio(ours.get(f"{mark}tokens_per_s"), rate)),
        _number(decode),
        _percent(row.get(f"{mark}decode_share")),
        _times(_ratio(ours.get(f"{mark}decode_tokens_per_s"), decode)),
        _number(row.get(f"{mark}bytes_copied_per_fork")),
        _percent(row.get(f"{mark}copied_share")),
        _number(row.get(f"{mark}recomputed_per_fork")),
        _number(row[f"{mark}kv_bytes"] / 1e6) if row.get(f"{mark}kv_bytes") else "",
        _percent(row.get(f"{mark}kv_share")),
        "" if equal is None else f"{equal:.2%}",
    ]


def _table(head: list[str], cells: list[list[str]]) -> list[str]:
    """Aligned text; a row with fewer cells ends in a sentence that may be as long as it likes."""
    full = [row for row in cells if len(row) == len(head)]
    widths = [max(len(row[i]) for row in [head, *full]) for i in range(len(head))]
    widths[0] = max(len(row[0]) for row in [head, *cells])
    lines = []
    for row in [head, *cells]:
        parts = [row[0].ljust(widths[0])]
        if len(row) == len(head):
            parts += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        else:
            parts += row[1:]
        lines.append("  " + "  ".join(parts).rstrip())
    return lines


def _share(floor: float, took: float | None) -> float | None:
    return floor / took if took else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{_number(value)}x" if value >= 100 else f"{value:.2f}x"
