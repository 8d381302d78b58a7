"""The GPU suite and the tuning command: their pure parts, and a rehearsal of the suite on the CPU."""

import dataclasses
import json
import math
import tomllib

import pytest
import torch

pytest.importorskip("triton")
from bench import gpu_suite, tune
from bench.cases import CASES, Case, draw
from bench.checks import check_case

CPU = torch.device("cpu")


def test_rehearsal_writes_what_it_prints(tmp_path, capsys):
    assert gpu_suite.main(["--cpu", "--only", "swiglu", "engine", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    (report,) = tmp_path.glob("*.json")
    data = json.loads(report.read_text())
    assert {check["name"] for check in data["checks"]} >= {"swiglu, tiny, float32", "swiglu, tiny, bfloat16"}
    assert {(row["mode"], row["implementation"]) for row in data["rows"]} == {
        (mode, name) for mode in ("forward", "backward") for name in ("ours", "torch")
    }
    assert all(row["seconds"] > 0 and not row["error"] for row in data["rows"])
    assert len(data["checks"]) > 15 and all(check["ok"] for check in data["checks"])
    targets = {(figure["least"], figure["most"]) for figure in data["figures"]}
    assert targets == {(0, 6.0), (500, math.inf), (1.6, math.inf), (80, math.inf)}
    assert all(figure["value"] > 0 for figure in data["figures"])
    assert data["versions"]["torch"] == torch.__version__ and data["commit"] and data["copy_bytes_per_s"] > 0
    (page,) = tmp_path.glob("*.md")
    assert page.read_text() in printed and "| swiglu | backward |" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_one_message(capsys):
    assert gpu_suite.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


class Wrong(Case):
    """A case whose reference is another function."""

    @property
    def reference(self):
        return lambda gate, up: gate * up


def test_a_wrong_kernel_is_found():
    swiglu = next(case for case in CASES if case.name == "swiglu")
    fields = {field.name: getattr(swiglu, field.name) for field in dataclasses.fields(swiglu)}
    checks = list(check_case(Wrong(**fields), gpu_suite.REHEARSAL[0], CPU, torch.float32, "triton"))
    assert [check.ok for check in checks] == [True, False]  # it repeats itself, and is wrong
    assert "seed" in checks[-1].detail


def test_targets():
    row = gpu_suite.Row("x", "forward", "ours", seconds=1e-3, flops=400 * 10**9, floor_s=0.9e-3, workspace_bytes=10)
    assert gpu_suite.Target(seconds=1e-3, workspace=10, flops=399e12, share=0.89).met(row)
    for missed in ({"seconds": 0.9e-3}, {"workspace": 9}, {"flops": 401e12}, {"share": 0.91}):
        assert not gpu_suite.Target(**missed).met(row)
    failed = gpu_suite.Row("x", "forward", "ours", error="OutOfMemoryError")
    assert not gpu_suite.Target().met(failed)
    assert str(gpu_suite.Target(seconds=16e-3, workspace=0.5e9)) == "≤ 16 ms, ≤ 0.5 GB"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_work_of_every_case(case):
    arguments = draw(case, gpu_suite.REHEARSAL[0], CPU, torch.float32)
    forward = case.forward(*arguments)
    assert 0 < forward.bytes <= 8 * sum(t.untyped_storage().nbytes() for t in arguments if torch.is_tensor(t))
    if case.backward:
        backward = case.backward(*arguments)
        assert backward.bytes >= forward.bytes or case.name == "rotary"
        assert backward.flops >= 2 * forward.flops
    assert (case.inputs > 0) == (case.backward is not None)
    assert "torch" in case.peer_names


def test_search_keeps_what_helps_and_passes_over_what_fails():
    times = {(1, 1): 10.0, (2, 1): 8.0, (3, 1): 7.95, (2, 2): 5.0}

    def score(sizes):
        return times[sizes["a"], sizes["b"]]

    best, before, after = tune.search({"a": 1, "b": 1}, [{"a": 2}, {"a": 9}, {"a": 3}, {"b": 2}], score)
    assert (best, before, after) == ({"a": 2, "b": 2}, 10.0, 5.0)  # 3 is no 1 % better than 2


def test_a_section_is_replaced_in_place_or_added():
    text = "# why\n[default.op]\nrows = 1  # a row\n\n[sm_90.op]\nrows = 2\nold = 3\n\n[sm_90.other]\nflag = true\n"
    sizes = {"rows": 4, "flag": False, "shape": [64, 32], "name": "tiles"}
    changed = tune.with_section(text, "sm_90", "op", sizes)
    assert tomllib.loads(changed)["sm_90"] == {"op": sizes, "other": {"flag": True}}
    assert changed.startswith("# why\n[default.op]\nrows = 1  # a row\n")
    added = tune.with_section(text, "sm_100", "op", sizes)
    assert tomllib.loads(added) == tomllib.loads(text) | {"sm_100": {"op": sizes}}
    assert added.startswith(text.rstrip())


def test_every_candidate_is_of_a_section_that_there_is():
    from kernels import _triton

    ops = {case.module.removeprefix("kernels.") for case in CASES}
    written = {file.parent.name for file in _triton.TILES.parent.glob("*/triton.py")}
    for op in sorted(ops & written):
        for section, candidates in tune.sections(op).items():
            known = set(_triton.tiles(section, "sm_90"))
            assert candidates and all(set(candidate) <= known for candidate in candidates), section
            assert tune.cases_of(op, section), f"nothing measures {section}"
