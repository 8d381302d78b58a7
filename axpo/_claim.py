"""Imported first of all: in this process `kernels` is the package beside axpo, whatever else has that name."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "kernels" / "_claim.py"))
