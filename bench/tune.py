"""Finds the tile sizes of this GPU: `python bench/tune.py [OP …]`, OP a folder of kernels/; default all.

Every kernels.<op>.triton names candidates for its sections of kernels/tiles.toml. Each is laid over the best so far and
measured on the operation's cases at the shapes of Qwen3-VL-8B in bf16. The best is checked against float64, and then
replaces this architecture's section in the file. Run the tests again afterwards: other tiles are other roundings.
"""

import argparse
import importlib
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bench.cases import CASES, Case, draw  # noqa: E402
from bench.checks import check_case  # noqa: E402
from bench.gpu_suite import LARGE, SMALL  # noqa: E402
from bench.measure import floors, forward_call, gradient_call, seconds  # noqa: E402

Section = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP")
    parser.add_argument("--out", type=Path, help="write the changed tiles.toml there instead")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: there is no CUDA device here, and tiles are found on the GPU that they are for", file=sys.stderr)
        return 2
    from kernels import _triton

    file = _triton.TILES
    text = file.read_text()
    with tempfile.TemporaryDirectory() as directory:
        _triton.TILES = Path(directory) / "tiles.toml"  # what the kernels read while candidates are tried
        for op in args.ops or sorted({case.module.removeprefix("kernels.") for case in CASES}):
            for section, candidates in sections(op).items():
                text = tune(text, op, section, candidates)
    (args.out or file).write_text(text)
    return 0


def tune(text: str, op: str, section: str, candidates: list[Section]) -> str:
    """The text of tiles.toml with the best candidate in this architecture's section, or as it was."""
    from kernels import _triton

    device = torch.device("cuda", torch.cuda.current_device())
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    cases = cases_of(op, section)
    modes = ("backward",) if section.endswith("_backward") else ("forward", "backward")

    def use(changed: str) -> str:
        _triton.TILES.write_text(changed)
        _triton._tiles.cache_clear()
        return changed

    def score(sizes: Section) -> float:
        use(with_section(text, architecture, section, sizes))
        return sum(cost(case, mode, device) for case in cases for mode in modes if getattr(case, mode))

    use(text)
    best, before, after = search(dict(_triton.tiles(section, device)), candidates, score)
    changed = use(with_section(text, architecture, section, best))
    for case in cases:
        for check in (c for shape in SMALL for c in check_case(case, shape, device, torch.bfloat16, "triton")):
            if not check.ok:
                print(f"{section}: left as it was, as {best} fails {check.name}: {check.detail}", flush=True)
                return use(text)
    print(f"[{architecture}.{section}] {best}: {before:.2f} -> {after:.2f} times the floor", flush=True)
    return changed


def sections(op: str) -> Mapping[str, list[Section]]:
    """Candidates by section; a plain list is of the section that has the operation's name."""
    found = importlib.import_module(f"kernels.{op}.triton").tune_candidates()
    return found if isinstance(found, dict) else {op: found}


def cases_of(op: str, section: str) -> list[Case]:
    """The operation's cases, without those of a function that has another section."""
    name = section.removesuffix("_backward")
    others = {other.removesuffix("_backward") for other in sections(op)} - {name}
    return [case for case in CASES if case.module == f"kernels.{op}" and case.function not in others]


def search(
    start: Section, candidates: list[Section], score: Callable[[Section], float]
) -> tuple[Section, float, float]:
    """The best of start and of each candidate laid over the best so far, with the scores of start and of the best.

    A candidate that cannot run (too much shared memory, say) is passed over; one must win by 1 % to count.
    """
    best, before = dict(start), score(start)
    after = before
    for candidate in candidates:
        sizes = best | candidate
        if sizes == best:
            continue
        try:
            took = score(sizes)
        except Exception as error:
            print(f"  {candidate}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:150])
            continue
        if took < 0.99 * after:
            best, after = sizes, took
    return best, before, after


def cost(case: Case, mode: str, device: torch.device) -> float:
    """The time of a case, in floors of it, so that long and short ones count alike."""
    arguments = draw(case, LARGE, device, torch.bfloat16)
    work = getattr(case, mode)(*arguments)
    function = case.ours(arguments, "triton")
    call = forward_call(function, arguments) if mode == "forward" else gradient_call(function, arguments, case.inputs)
    return seconds(call, device, graph=case.graph, budget=0.1) / work.floor(*floors(device))


def with_section(text: str, architecture: str, section: str, sizes: Section) -> str:
    """The text of tiles.toml with this section in place of the one there, or at its end; the rest as it was."""
    header = f"[{architecture}.{section}]"
    lines = "".join(f"{key} = {_toml(value)}\n" for key, value in sizes.items())
    block = f"{header}\n{lines}"
    found = re.search(rf"^{re.escape(header)}\n(?:(?!\[).*\n?)*", text, re.MULTILINE)
    if not found:
        return f"{text.rstrip()}\n\n{block}"
    gap = "\n" if text[found.end() :].strip() else ""
    return text[: found.start()] + block + gap + text[found.end() :]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


if __name__ == "__main__":
    sys.exit(main())
