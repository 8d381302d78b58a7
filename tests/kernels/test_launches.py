"""What the host does to launch our kernels on a GPU, without one: no waiting, everything on the device, any size."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from bench.cases import CASES, Case, draw
from bench.gpu_suite import LARGE, SMALL
from kernels import paged_attention, paged_plan
from tests.kernels.fake_cuda import DEVICE, backward, fake_cuda

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", [case for case in CASES if case.plan is None], ids=lambda case: case.name)
def test_every_case_of_the_suite(case: Case) -> None:
    for shape in (LARGE, *SMALL):
        for dtype in (torch.float32, torch.bfloat16):
            with fake_cuda() as launches:
                arguments = draw(case, shape, CPU, dtype)
                arguments = tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)
                with launches:
                    case.ours(arguments, "triton")(*arguments)
                    forward = len(launches.kernels)
                    backward(launches)
            assert forward > 0 and (forward < len(launches.kernels)) == (case.inputs > 0)


@pytest.mark.parametrize("share", [True, False])
def test_paged_attention_of_a_prefix_and_its_forks(share: bool) -> None:
    forks, prefix, blocks = 16, 512, 513
    tables = np.concatenate(
        [np.tile(np.arange(prefix, dtype=np.int32), (forks, 1)), prefix + np.arange(forks, dtype=np.int32)[:, None]], 1
    )
    starts, lengths = np.arange(forks + 1, dtype=np.int32), np.full(forks, blocks * 16, dtype=np.int32)
    with fake_cuda() as launches:
        q = torch.empty(forks, 32, 128, dtype=torch.bfloat16, device=DEVICE)
        cache = torch.empty(1 << 18, 8, 16, 128, dtype=torch.bfloat16, device=DEVICE)  # 2³² values
        plan = paged_plan(tables, starts, lengths, 32, cache, share)
        on_device = [torch.from_numpy(x).to(DEVICE) for x in (tables, starts, lengths)]
        with launches:
            paged_attention(q, cache, cache, *on_device, 128**-0.5, plan)
    assert launches.kernels == ["_attend", "_merge"]


def test_what_would_wait_for_the_device_is_found() -> None:
    with fake_cuda() as launches:
        x = torch.empty(4, device=DEVICE)
        for waits in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x.nonzero(), lambda: torch.ones(2).to(DEVICE)):
            with launches, pytest.raises(Exception, match=r"waits for the device|nonzero|_local_scalar|not linked"):
                waits()
