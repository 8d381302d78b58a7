"""Every GPU kernel compiles for sm_90 without a GPU: nothing spilled, shared memory within a block's, wgmma if due."""

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")
from kernels import aot

tree_attention = importlib.import_module("kernels.tree_attention.triton")
ROOT = Path(__file__).resolve().parents[2]
CASES = aot.cases()
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_production_tile(case):
    result = aot.compile_case(case)
    assert result.spill_bytes == 0
    assert result.shared_bytes <= aot.SHARED_LIMIT
    assert not case.wgmma or result.wgmma > 0, "no tensor-core instruction"
    assert result.instructions > 20


@pytest.mark.parametrize("name", tree_attention.KERNELS)
def test_default_tiles_fit_a_smaller_gpu(name):
    tile = tree_attention._tile(name, 128, 2, "sm_86")
    assert aot.compile_case(tree_attention._aot_case(name, 128, tile), 86).shared_bytes <= 99 << 10


def test_no_kernel_is_forgotten():
    written = {f"kernels.{file.parent.name}.triton" for file in (ROOT / "kernels").glob("*/triton.py")}
    assert written <= set(aot.MODULES)
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert aot.cases([names[0]])[0].name == names[0]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_cuda_source_compiles(source, tmp_path):
    from torch.utils.cpp_extension import include_paths

    includes = [flag for path in include_paths("cpu") for flag in ("-isystem", path)]
    command = ["nvcc", "-c", "-std=c++20", "-gencode=arch=compute_90a,code=sm_90a", *includes, str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.o")], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.o").stat().st_size > 0


def test_page_holds_the_table(tmp_path):
    (tmp_path / "op.md").write_text("# An operation\n")
    result = aot.AotResult("op_forward", 40, 0, 2048, 300, 0, False)
    text = aot.page([result], tmp_path)
    assert "- [An operation](op.md)" in text and "| op_forward | 40 | 0 | 2.0 | 300 | 0 |" in text
