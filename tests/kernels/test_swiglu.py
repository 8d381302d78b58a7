"""swiglu against fp64, and against itself under other threads, batches and strides."""

import pytest
import torch

from kernels._library import LOADED
from kernels.swiglu import swiglu, swiglu_reference

pytestmark = pytest.mark.usefixtures("poisoned")
needs_library = pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")


def check(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor) -> None:
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    expected = swiglu_reference(*wide)
    torch.testing.assert_close(swiglu(gate, up).double(), expected, rtol=2e-6, atol=1e-30)
    narrow = [t.detach().clone().requires_grad_() for t in (gate, up)]
    grads = torch.autograd.grad(swiglu(*narrow), narrow, dy)
    for name, a, b in zip(("dgate", "dup"), grads, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 127), (3, 128), (50, 129), (257, 384), (2, 3, 20)])
def test_matches_fp64(shape, generator):
    gate, up, dy = (torch.randn(shape, generator=generator) * 3 for _ in range(3))
    check(gate, up, dy)
    fused = torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=generator)
    check(fused[..., : shape[-1]], fused[..., shape[-1] : -1], dy)  # halves of one projection, the second misaligned
    check(gate, torch.randn(*shape, 2, generator=generator)[..., 1], dy)


def test_large_gates(generator):
    gate = torch.tensor([[-1000.0, -104.0, -88.0, -20.0, -1e-20, 0.0, 1e-20, 20.0, 88.0, 104.0, 1000.0]])
    up, dy = torch.ones_like(gate), torch.ones_like(gate)
    wide = gate.double().requires_grad_()
    expected = torch.autograd.grad(swiglu_reference(wide, up.double()), wide, dy.double())[0]
    narrow = gate.clone().requires_grad_()
    torch.testing.assert_close(swiglu(gate, up).double(), swiglu_reference(wide, up.double()), rtol=2e-6, atol=1e-35)
    torch.testing.assert_close(
        torch.autograd.grad(swiglu(narrow, up), narrow, dy)[0].double(), expected, rtol=1e-5, atol=1e-6
    )
    assert swiglu(torch.tensor([[torch.nan]]), torch.ones(1, 1)).isnan().all()


def test_bitwise_equal_across_runs_threads_and_batches(generator, with_threads):
    gate, up, dy = (torch.randn(600, 131, generator=generator) for _ in range(3))

    def run(rows=slice(None)):
        inputs = [t[rows].clone().requires_grad_() for t in (gate, up)]
        y = swiglu(*inputs)
        return y.detach(), *torch.autograd.grad(y, inputs, dy[rows])

    once = run()
    for threads in (1, 2, 3):
        assert all(map(torch.equal, with_threads(threads, run), once)), f"{threads} threads"
    for rows in (slice(5, 6), slice(100, 451)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), once, strict=True)), f"rows {rows}"


def test_other_dtypes(generator):
    gate, up = (torch.randn(4, 33, generator=generator).bfloat16() for _ in range(2))
    assert torch.equal(swiglu(gate, up, backend="reference"), torch.nn.functional.silu(gate) * up)
    assert swiglu(gate, up).dtype == torch.bfloat16


@needs_library
def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"gate has shape \[2, 5\], but up has \[2, 4\]"):
        swiglu(torch.ones(2, 5), torch.ones(2, 4))


@needs_library
def test_opcheck(generator):
    gate, up = (torch.randn(3, 24, generator=generator).requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.axpo.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.axpo.swiglu_backward.default, (gate.detach(), gate.detach(), up.detach()))


@needs_library
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (40, 256), (2, 3, 20)])
def test_bf16_is_fp32_rounded_once(shape, generator):
    """Bitwise, forward and backward; halves of a fused projection too."""
    fused, dy = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).bfloat16(), torch.randn(shape).bfloat16()
    narrow = [t.requires_grad_() for t in fused.chunk(2, dim=-1)]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    y, expected = swiglu(*narrow, backend="cpp"), swiglu(*wide)
    assert torch.equal(y, expected.bfloat16())
    grads = torch.autograd.grad(y, narrow, dy), torch.autograd.grad(expected, wide, dy.float())
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(*grads, strict=True))
