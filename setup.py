"""Builds csrc/cpu/*.cpp, and with a CUDA torch and nvcc csrc/cuda/* too, into one shared library, kernels/_csrc.so.

All other metadata is in pyproject.toml. Development: `python setup.py build_ext --inplace`. Without a C++ compiler or
without torch the package installs without the library (plain torch is used instead, slower); AXPO_REQUIRE_CSRC=1 makes
that an error.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent


def missing_requirement() -> str | None:
    """What the C++ build lacks on this machine, or None when it can be built."""
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return (
            "torch is not importable at build time (install torch first, then use `pip install --no-build-isolation`)"
        )
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler: {compiler!r} is not on PATH (install g++, or set CXX)"
    return None


def has_nvcc() -> bool:
    """Whether the CUDA kernels can be built: a CUDA torch and the nvcc that it finds."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    return torch.version.cuda is not None and CUDA_HOME is not None


def extension() -> dict:
    """ext_modules and cmdclass for setup(), empty when the library cannot be built."""
    reason = missing_requirement()
    if reason is not None:
        if os.environ.get("AXPO_REQUIRE_CSRC") == "1":
            raise SystemExit(f"AXPO_REQUIRE_CSRC=1, but the C++ kernels cannot be built: {reason}")
        print(f"axpo: installing without the C++ CPU kernels (plain torch is used): {reason}", file=sys.stderr)
        return {}

    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    try:  # ninja from PyPI sits next to the interpreter, which need not be on PATH
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    except ImportError:
        pass
    # One job a core: torch's headers take about a gigabyte a translation unit.
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

    compile_args = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-g0", "-Wall", "-Wno-psabi"]
    link_args = ["-Wl,--strip-debug"]
    if platform.system() == "Linux":
        compile_args.append("-fopenmp")
        link_args.append("-fopenmp")
    cuda = has_nvcc()
    if cuda and not torch.cuda.is_available():  # torch compiles for the GPUs it sees, and fails where it sees none
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0+PTX")
    patterns = ["cpu/*.cpp", *(["cuda/*.cpp", "cuda/*.cu"] if cuda else [])]

    def files(*globs: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for pattern in globs for path in (ROOT / "csrc").glob(pattern))

    library = (CUDAExtension if cuda else CppExtension)(
        name="kernels._csrc",
        sources=files(*patterns),
        depends=[*files("cpu/*.h"), torch.version.__file__],  # a library of another torch's is not up to date
        extra_compile_args={"cxx": compile_args, "nvcc": ["-O3", "-std=c++20"]},
        extra_link_args=link_args,
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
    }


setup(**extension())
