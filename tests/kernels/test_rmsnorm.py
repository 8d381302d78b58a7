"""rmsnorm and add_rmsnorm against fp64, transformers, and themselves under other threads, batches and strides."""

import pytest
import torch

from kernels._library import LOADED
from kernels.rmsnorm import add_rmsnorm, add_rmsnorm_reference, rmsnorm, rmsnorm_reference

EPS = 1e-6
pytestmark = pytest.mark.usefixtures("poisoned")
needs_library = pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")


def views(shape: tuple[int, ...], g: torch.Generator) -> dict[str, torch.Tensor]:
    """The same kind of data in several memory layouts."""
    *lead, h = shape
    return {
        "dense": torch.randn(shape, generator=g),
        "slice of a wider projection": torch.randn((*lead, 2 * h + 3), generator=g)[..., h : 2 * h],
        "one float off alignment": torch.randn(torch.Size(shape).numel() + 1, generator=g)[1:].view(shape),
        "last dimension strided": torch.randn((*lead, h, 2), generator=g)[..., 0],
        "one row seen many times": torch.randn((1,) * len(lead) + (h,), generator=g).expand(shape),
    }


def close(actual: torch.Tensor, expected: torch.Tensor, what: str, rtol: float = 2e-6) -> None:
    """Largest error, relative to the largest expected value or 1."""
    assert actual.shape == expected.shape, what
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1)
        assert error <= rtol, f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("shape", [(0, 64), (1, 17), (1, 127), (5, 128), (300, 129), (7, 3, 64), (2, 3, 4, 36), (48,)])
def test_matches_fp64_in_every_layout(shape, generator):
    w = torch.randn(shape[-1], generator=generator).requires_grad_()
    for name, data in views(shape, generator).items():
        x, residual = data.requires_grad_(), torch.randn(shape, generator=generator).requires_grad_()
        dy, ds = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        wide = [t.detach().double().requires_grad_() for t in (data, residual, w)]

        close(rmsnorm(x, w, EPS), rmsnorm_reference(wide[0], wide[2], EPS), f"{name}: y")
        grads = torch.autograd.grad(rmsnorm(x, w, EPS), (x, w), dy)
        expected = torch.autograd.grad(rmsnorm_reference(wide[0], wide[2], EPS), (wide[0], wide[2]), dy.double())
        close(grads[0], expected[0], f"{name}: dx", 1e-5)
        close(grads[1], expected[1], f"{name}: dw", 1e-5)

        outputs = add_rmsnorm(x, residual, w, EPS)
        expected_outputs = add_rmsnorm_reference(*wide, EPS)
        close(outputs[0], expected_outputs[0], f"{name}: y of the sum")
        close(outputs[1], expected_outputs[1], f"{name}: sum")
        grads = torch.autograd.grad(outputs, (x, residual, w), (dy, ds))
        expected = torch.autograd.grad(expected_outputs, wide, (dy.double(), ds.double()))
        for label, actual, want in zip(("dx", "dresidual", "dw"), grads, expected, strict=True):
            close(actual, want, f"{name}: {label} of add_rmsnorm", 1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_scale_and_offset(scale, offset, generator):
    x = torch.randn(20, 192, generator=generator) * scale + offset
    w = torch.randn(192, generator=generator)
    close(rmsnorm(x, w, EPS), rmsnorm_reference(x.double(), w.double(), EPS), f"scale {scale}, offset {offset}")


def test_one_output_used_or_one_input_frozen(generator):
    x, r, dy = (torch.randn(9, 40, generator=generator) for _ in range(3))
    w = torch.randn(40, generator=generator)
    for output in (0, 1):
        for mask in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
            if output == 1 and mask == (False, False, True):
                continue  # the plain sum does not depend on the weight
            ours, theirs = (
                [t.detach().to(dtype).requires_grad_(need) for t, need in zip((x, r, w), mask, strict=True)]
                for dtype in (torch.float32, torch.float64)
            )
            for f, inputs in ((add_rmsnorm, ours), (add_rmsnorm_reference, theirs)):
                f(*inputs, EPS)[output].backward(dy.to(inputs[0].dtype))
            for a, b in zip(ours, theirs, strict=True):
                assert (a.grad is None or not a.grad.any()) == (b.grad is None or not b.grad.any())
                if b.grad is not None:
                    close(a.grad, b.grad, f"output {output}, needs {mask}", 1e-5)


def test_bitwise_equal_across_runs_threads_and_batches(generator, with_threads):
    x, dy = torch.randn(1000, 160, generator=generator), torch.randn(1000, 160, generator=generator)
    w = torch.randn(160, generator=generator)

    def run(rows=slice(None)):
        xs, ws = x[rows].clone().requires_grad_(), w.clone().requires_grad_()
        y = rmsnorm(xs, ws, EPS)
        return y.detach(), *torch.autograd.grad(y, (xs, ws), dy[rows])

    once = run()
    for threads in (1, 2, 3):
        for a, b in zip(with_threads(threads, run), once, strict=True):
            assert torch.equal(a, b), f"{threads} threads"
    for rows in (slice(0, 1), slice(3, 4), slice(137, 900)):
        y, dx, _ = run(rows)
        assert torch.equal(y, once[0][rows]), f"rows {rows}"
        assert torch.equal(dx, once[1][rows]), f"rows {rows}"


def test_other_dtypes_follow_transformers(generator):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(11, 96, generator=generator).to(dtype)
        norm = Qwen3RMSNorm(96, eps=EPS).to(dtype)
        norm.weight.data.copy_(torch.randn(96, generator=generator))
        y = rmsnorm(x, norm.weight, EPS)
        assert y.dtype == dtype
        if dtype == torch.float32:
            close(y, norm(x), "fp32")
        else:  # which rounds once more in between
            assert torch.equal(rmsnorm(x, norm.weight, EPS, backend="reference"), norm(x)), f"{dtype}"
            torch.testing.assert_close(y, norm(x), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_nan_reaches_the_output(generator):
    x = torch.randn(3, 70, generator=generator)
    x[1, 69] = torch.nan
    y = rmsnorm(x, torch.ones(70), EPS)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@needs_library
def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"weight has shape \[4\]"):
        rmsnorm(torch.ones(2, 5), torch.ones(4), EPS)
    with pytest.raises(ValueError, match=r"residual has shape \[3, 5\]"):
        add_rmsnorm(torch.ones(2, 5), torch.ones(3, 5), torch.ones(5), EPS)


@needs_library
def test_opcheck(generator):
    x, r = (torch.randn(3, 4, 24, generator=generator).requires_grad_() for _ in range(2))
    w = torch.randn(24, generator=generator).requires_grad_()
    torch.library.opcheck(torch.ops.axpo.rmsnorm.default, (x, w, EPS))
    torch.library.opcheck(torch.ops.axpo.add_rmsnorm.default, (x, r, w, EPS))
    plain = [t.detach() for t in (x, r, x, w)]
    torch.library.opcheck(torch.ops.axpo.rmsnorm_backward.default, (*plain, EPS))


@needs_library
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (300, 64), (5, 3, 40)])
def test_bf16_is_fp32_rounded_once(shape, generator):
    """Bitwise, forward and backward; behind an addition the norm sees the rounded sum. Strided rows too."""
    x, r, dy = (torch.randn(*shape[:-1], shape[-1] + 3, generator=generator).bfloat16()[..., 3:] for _ in range(3))
    w = torch.randn(shape[-1], generator=generator).bfloat16()
    narrow = [t.requires_grad_() for t in (x, w)]
    wide = [t.detach().float().requires_grad_() for t in (x, w)]
    y, expected = rmsnorm(*narrow, EPS, backend="cpp"), rmsnorm(*wide, EPS)
    assert torch.equal(y, expected.bfloat16())
    grads = torch.autograd.grad(y, narrow, dy), torch.autograd.grad(expected, wide, dy.float())
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(*grads, strict=True))
    added = add_rmsnorm(x.detach(), r, w.detach(), EPS, backend="cpp")
    assert torch.equal(added[1], x.detach() + r)
    assert torch.equal(added[0], rmsnorm((x.detach() + r).float(), w.detach().float(), EPS).bfloat16())
