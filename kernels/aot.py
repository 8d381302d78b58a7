"""Compiles every Triton kernel ahead of time for sm_90, without a GPU: `python -m kernels.aot [NAME …]`.

What it prints of each production tile is what the tests assert and the docs show: registers, spills, shared memory,
instructions and matrix instructions. `--page docs/kernels/README.md` writes that page, `--json` prints for programs.
"""

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

ARCHITECTURE = 90
SHARED_LIMIT = 227 << 10  # bytes that one block of sm_90 can have
MODULES = (  # "kernels.<op>.triton" of every operation that has a Triton form
    "kernels.kv_cache.triton",
    "kernels.linear_logprob_entropy.triton",
    "kernels.paged_attention.triton",
    "kernels.rmsnorm.triton",
    "kernels.rotary.triton",
    "kernels.sampling.triton",
    "kernels.swiglu.triton",
    "kernels.tree_attention.triton",
)


@dataclass(frozen=True, slots=True)
class AotCase:
    """One kernel at one production tile.

    signature: Triton's type of every argument in order ("*bf16", "i32", "fp32", …), or the value of a constexpr.
    aligned: names of the arguments that are multiples of 16 (pointers and strides of production shapes).
    wgmma: whether it must use the tensor cores' warp-group instructions.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    wgmma: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AotResult:
    """registers a thread, bytes spilled a thread, bytes of shared memory a block, SASS and wgmma instructions."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    wgmma: int
    must_wgmma: bool


def compile_case(case: AotCase, architecture: int = ARCHITECTURE) -> AotResult:
    """architecture: the compute capability, as 90 for 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = {k: v if isinstance(v, str) and _is_type(v) else "constexpr" for k, v in case.signature.items()}
    constants = {k: v for k, v in case.signature.items() if types[k] == "constexpr"}
    names = list(case.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    fusion = {"enable_fp_fusion": getattr(case.kernel, "fp_fusion", True)}  # as kernels._triton.jit launches it
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **fusion, **case.options}
    source = ASTSource(fn=case.kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled = compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage, sass = _inspect(compiled.asm["cubin"])
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[union-attr]
    return AotResult(
        case.name,
        registers,
        stack + local,
        compiled.metadata.shared,
        len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
        len(re.findall(r"\bHGMMA\b", sass)),
        case.wgmma,
    )


def _is_type(text: str) -> bool:
    return re.fullmatch(r"\*?(i1|[iu](8|16|32|64)|fp(16|32|64)|bf16)|tensordesc<.*>", text) is not None


def _inspect(cubin: bytes) -> tuple[str, str]:
    """cuobjdump's resource usage and SASS, with the tools that come with triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        run = lambda *command: subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: E731
        usage = run(str(tools / "cuobjdump"), "--dump-resource-usage", str(file))
        sass = run(str(tools / "nvdisasm"), "-c", str(file))
    return usage, sass


def cases(names: list[str] | None = None) -> list[AotCase]:
    """The cases of all modules, or those whose name begins with one of `names`."""
    every = [case for module in MODULES for case in importlib.import_module(module).aot_cases()]
    return [case for case in every if not names or case.name.startswith(tuple(names))]


def table(results: list[AotResult]) -> str:
    """A Markdown table, a line a kernel."""
    lines = ["| kernel | registers | spilled bytes | shared KiB | instructions | wgmma |", "|---|--:|--:|--:|--:|--:|"]
    for r in results:
        shared = f"{r.shared_bytes / 1024:.1f}"
        lines.append(f"| {r.name} | {r.registers} | {r.spill_bytes} | {shared} | {r.instructions} | {r.wgmma} |")
    return "\n".join(lines)


def page(results: list[AotResult], directory: Path) -> str:
    """docs/kernels/README.md: the pages beside it, each by its own title, and the table."""
    import triton

    pages = sorted(file for file in directory.glob("*.md") if file.name != "README.md")
    links = [f"- [{file.read_text().splitlines()[0].lstrip('# ')}]({file.name})" for file in pages]
    return f"""# Kernels

Each operation is a folder of `kernels/`: a plain-torch reference, the form that is fast, and one public function that
chooses: Triton on CUDA, C++ on the CPU, the reference elsewhere; `backend=` or `AXPO_KERNELS` force a choice.

{chr(10).join(links)}

## What the GPU gets

Every Triton kernel at its production tile (bf16, sm_90), compiled without a GPU. `make test` asserts that nothing is
spilled, that a block has at most {SHARED_LIMIT >> 10} KiB of shared memory, and that the matrix kernels use wgmma.
Written by `python -m kernels.aot --page docs/kernels/README.md` on {date.today()} with Triton {triton.__version__}.

{table(results)}

Times on a GPU are another matter: `python bench/gpu_suite.py` measures them, `python bench/tune.py` finds the tiles.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of kernel names; default all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the docs page instead of printing")
    args = parser.parse_args()
    results = [compile_case(case) for case in cases(args.names)]
    if args.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    elif args.page:
        args.page.write_text(page(results, args.page.parent))
    else:
        print(table(results))


if __name__ == "__main__":
    main()
