"""The Triton swiglu, interpreted: against fp64, at extreme gates, and against itself."""

import pytest
import torch

pytest.importorskip("triton")
from kernels.swiglu import swiglu, swiglu_reference

pytestmark = pytest.mark.usefixtures("poisoned")


def check(gate: torch.Tensor, up: torch.Tensor, dy: torch.Tensor) -> None:
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    expected = swiglu_reference(*wide)
    narrow = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (gate, up)]
    y = swiglu(*narrow, backend="triton")
    rtol = 1e-5 if gate.dtype == torch.float32 else 2**-8  # half a unit in the last place of bf16
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=1e-30)
    for name, a, b in zip(
        ("dgate", "dup"),
        torch.autograd.grad(y, narrow, dy),
        torch.autograd.grad(expected, wide, dy.double()),
        strict=True,
    ):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 127), (50, 129), (3, 5000), (2, 3, 20), (33,)])
def test_matches_fp64(shape, dtype, generator):
    gate, up, dy = ((torch.randn(shape, generator=generator) * 3).to(dtype) for _ in range(3))
    check(gate, up, dy)
    fused = torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=generator).to(dtype)
    check(fused[..., : shape[-1]], fused[..., shape[-1] : -1], dy)  # halves of one projection, the second misaligned
    check(gate, torch.randn(*shape, 2, generator=generator).to(dtype)[..., 1], dy)


def test_large_gates(generator):
    gate = torch.tensor([[-1000.0, -104.0, -88.0, -20.0, -1e-20, 0.0, 1e-20, 20.0, 88.0, 104.0, 1000.0]])
    check(gate, torch.ones_like(gate), torch.ones_like(gate))
    check(gate.bfloat16(), torch.ones_like(gate).bfloat16(), torch.ones_like(gate).bfloat16())
    assert swiglu(torch.tensor([[torch.nan]]), torch.ones(1, 1), backend="triton").isnan().all()


def test_bitwise_equal_across_runs_and_batches(generator):
    gate, up, dy = (torch.randn(200, 131, generator=generator).bfloat16() for _ in range(3))

    def run(rows=slice(None)):
        inputs = [t[rows].clone().requires_grad_() for t in (gate, up)]
        y = swiglu(*inputs, backend="triton")
        return y.detach(), *torch.autograd.grad(y, inputs, dy[rows])

    once = run()
    for rows in (slice(None), slice(5, 6), slice(40, 151)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), once, strict=True)), f"rows {rows}"


def test_what_it_does_not_serve_is_named():
    with pytest.raises(ValueError, match="does not know this shape or dtype"):
        swiglu(torch.ones(2, 8), torch.ones(2, 8).bfloat16(), backend="triton")
    with pytest.raises(ValueError, match=r"gate has shape \[2, 5\], but up has \[2, 4\]"):
        swiglu(torch.ones(2, 5), torch.ones(2, 4), backend="triton")


def test_opcheck(generator):
    gate, up = (torch.randn(3, 24, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    swiglu(gate, up, backend="triton")
    torch.library.opcheck(torch.ops.axpo.triton_swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.axpo.triton_swiglu_backward.default, (gate.detach(), gate.detach(), up.detach()))
