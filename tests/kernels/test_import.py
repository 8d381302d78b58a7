"""`kernels` is also the import name of a Hugging Face distribution: ours wins, and transformers keeps working."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from transformers.utils.import_utils import KERNELS_MIN_VERSION

ROOT = Path(__file__).resolve().parents[2]

# Every name that transformers imports from the distribution when it finds a version it accepts.
FOREIGN = """
HUGGING_FACE = True
class CUDAProperties: pass
class Device: pass
class KernelizeFallback: pass
class LayerRepository: pass
class LocalLayerRepository: pass
class Mode: pass
class ROCMProperties: pass
def identity(*args, **kwargs): return lambda x: x
get_kernel = kernelize = register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = identity
use_kernel_forward_from_hub = use_kernelized_func = identity
"""

USES_OURS = f"""
import kernels, torch
assert kernels.__file__ == {str(ROOT / "kernels" / "__init__.py")!r}, kernels.__file__
from kernels.tree_attention import tree_attention_reference
out = kernels.tree_attention(torch.ones(2, 1, 8), torch.ones(2, 1, 8), torch.ones(2, 1, 8), torch.tensor([2, 2]), 1.0)
assert torch.equal(out, torch.ones(2, 1, 8))
"""

USES_TRANSFORMERS = """
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
config = Qwen3Config(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8, vocab_size=32)
assert Qwen3ForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)
"""


def install_foreign(site: Path, version: str) -> Path:
    """Puts the Hugging Face distribution, reduced to the names that count, into a site directory."""
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(FOREIGN)
    info = site / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return site


def run(site: Path, *parts: str) -> subprocess.CompletedProcess:
    """A fresh interpreter in another directory, with the site directory before the repository on its path."""
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(textwrap.dedent(part) for part in parts)],
        cwd=site.parent,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_engine_first_and_a_version_that_transformers_accepts(tmp_path):
    run(install_foreign(tmp_path, KERNELS_MIN_VERSION), "import engine", USES_OURS, USES_TRANSFORMERS)


def test_nothing_else_installed(tmp_path):
    run(tmp_path, "import axpo", USES_OURS, "import transformers.integrations.hub_kernels")


def test_axpo_alone_claims_the_name_without_importing_torch(tmp_path):
    site = install_foreign(tmp_path, "0.99")
    run(site, "import sys, axpo", "assert 'torch' not in sys.modules and 'kernels' not in sys.modules", USES_OURS)


def test_transformers_first_then_engine(tmp_path):
    """Too late to keep the other one out: it gives way, with a warning."""
    first = """
    from transformers.utils.import_utils import is_kernels_available
    import transformers.integrations.hub_kernels, sys
    assert is_kernels_available() and sys.modules["kernels"].HUGGING_FACE
    """
    after = "assert not is_kernels_available()"
    site = install_foreign(tmp_path, KERNELS_MIN_VERSION)
    done = run(site, first, "import engine", USES_OURS, USES_TRANSFORMERS, after)
    assert "import engine or axpo before transformers" in done.stderr


def test_the_other_one_would_win_without_the_claim(tmp_path):
    """What the mechanism is for: the same path, without it."""
    run(install_foreign(tmp_path, "0.99"), "import kernels", "assert kernels.HUGGING_FACE")
