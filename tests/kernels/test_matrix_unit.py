"""AMX on any processor: the tile kernels on emulated tiles, and the compiled instructions with each of them trapped."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels._library import LOADED, why_not_amx
from tests.kernels.matrix_worker import ATTENTION, KINDS, LINEAR
from tests.kernels.test_paged_attention import fresh_seed

ROOT = Path(__file__).parents[2]
CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
pytestmark = pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")


def work(mode: str, out: Path, seed: int, trap: str = "") -> dict:
    """What matrix_worker.py computes with AXPO_AMX=mode."""
    environment = {**os.environ, "AXPO_AMX": mode, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/kernels/matrix_worker.py"), str(out), trap, str(seed)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stdout}{done.stderr}"
    return torch.load(out)


@pytest.fixture(scope="module")
def seed() -> int:
    return fresh_seed()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory, seed) -> dict:
    return work("emulate", tmp_path_factory.mktemp("amx") / "emulated.pt", seed)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_exact_and_invariant(emulated, seed, name):
    """Bits do not depend on sharing, the batch or how a prompt is cut; errors are those of rounding the result."""
    found = {key.split("/")[1]: value for key, value in emulated["found"].items() if key.startswith(f"{name}/")}
    for other in ("unshared", "alone"):
        assert torch.equal(found["shared"], found[other]), f"seed {seed}: {other}"
    assert torch.equal(found["whole"], found["chunks"]), f"seed {seed}"
    assert torch.isfinite(found["whole"]).all()
    error = (found["shared"].double() - found["exact"]).abs()
    assert (error <= 2.0**-8 * found["exact"].abs() + 2e-5 * found["exact"].abs().max()).all(), f"seed {seed}"


@pytest.mark.parametrize("shape", LINEAR)
def test_linear_is_exact_and_invariant(emulated, seed, shape):
    found = {
        key.split("/")[1]: value
        for key, value in emulated["found"].items()
        if key.startswith("linear {} {} {}/".format(*shape))
    }
    assert torch.equal(found["some"], found["alone"]), f"seed {seed}"
    assert torch.equal(found["together"].bfloat16(), found["narrow"]), f"seed {seed}"
    assert ((found["together"] - found["exact"]).abs() <= 1e-6 * found["size"]).all(), f"seed {seed}"
    assert not found["flushed"].any()  # of products below fp32's normal range


def test_the_instructions_give_the_bits_of_the_emulation(emulated, tmp_path, seed):
    """On a processor with AMX they run; elsewhere each raises SIGILL and amx_trap.c does what the manual says."""
    compiler = shutil.which("gcc")
    if platform.machine() != "x86_64" or compiler is None or "this build" in (why_not_amx() or ""):
        pytest.skip("takes a build with AMX, and gcc")
    if not {"avx512f", "fma"} <= set(CPU.split()):
        pytest.skip("what stands around the tiles takes AVX-512")
    trap = tmp_path / "trap.so"
    source = Path(__file__).with_name("amx_trap.c")
    subprocess.run([compiler, "-O2", "-Wall", "-Werror", "-mfma", "-shared", "-fPIC", source, "-o", trap], check=True)
    run = work("assume", tmp_path / "instructions.pt", seed, str(trap))
    if "amx_bf16" not in CPU:
        assert all(run["trapped"][kind] > 0 for kind in KINDS), run["trapped"]
    assert run["found"].keys() == emulated["found"].keys()
    for key, value in emulated["found"].items():
        assert torch.equal(run["found"][key], value), f"seed {seed}: {key}"


def test_the_choice_can_be_told_and_mistakes_are_named(emulated):
    assert emulated["why_not"] == "AXPO_AMX=emulate"
    for mode, expected in (
        ("off", "AXPO_AMX=off"),
        ("on", "ValueError: AXPO_AMX='on' is not one of auto, off, emulate"),
    ):
        command = [sys.executable, "-c", "import kernels._library as k; print(k.why_not_amx())"]
        environment = {**os.environ, "AXPO_AMX": mode, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert expected in done.stdout + done.stderr
