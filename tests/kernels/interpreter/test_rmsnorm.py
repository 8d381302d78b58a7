"""The Triton rmsnorm and add_rmsnorm, interpreted: against fp64, in every layout, and against themselves."""

import pytest
import torch

pytest.importorskip("triton")
from kernels.rmsnorm import add_rmsnorm, add_rmsnorm_reference, rmsnorm, rmsnorm_reference

EPS = 1e-6
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # one unit in the last place of bf16, relative
pytestmark = pytest.mark.usefixtures("poisoned")


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Largest error, relative to the largest expected value or 1."""
    assert actual.shape == expected.shape, what
    assert actual.isfinite().all(), f"{what}: an element was not written"
    if expected.numel():
        error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1)
        assert error <= ROUNDING[actual.dtype], f"{what}: relative error {error:.2e}"


def gradients(f, tensors, grads):
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    outputs = f(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [o.detach() for o in outputs], torch.autograd.grad(outputs, inputs, grads[: len(outputs)])


def check(x, residual, w, dy, ds, what):
    wide = [t.double() for t in (x, residual, w, dy, ds)]
    for name, pair, take in (
        ("rmsnorm", (rmsnorm, rmsnorm_reference), (0, 2)),
        ("add_rmsnorm", (add_rmsnorm, add_rmsnorm_reference), (0, 1, 2)),
    ):
        tensors, exact = ([source[i] for i in take] for source in ((x, residual, w), wide))
        ours = gradients(lambda *t, f=pair[0]: f(*t, EPS, backend="triton"), tensors, (dy, ds))
        theirs = gradients(lambda *t, f=pair[1]: f(*t, EPS), exact, wide[3:])
        for i, (a, b) in enumerate(zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True)):
            close(a, b, f"{what}: {name}, result {i}")


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 17), (300, 129), (7, 3, 64), (2, 3, 4, 36), (48,), (3, 5000)])
def test_matches_fp64(shape, dtype, generator):
    x, residual, dy, ds = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    check(x, residual, torch.randn(shape[-1], generator=generator).to(dtype), dy, ds, f"{shape}")


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_every_layout(dtype, generator):
    shape = (9, 5, 48)
    residual, dy, ds = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    w = torch.randn(48, 2, generator=generator).to(dtype)[:, 0]
    fused = torch.randn(9, 7, 103, generator=generator).to(dtype)
    views = {
        "heads of a wider projection": fused[:, 1:6, 48:96],
        "one element off alignment": torch.randn(2161, generator=generator).to(dtype)[1:].view(shape),
        "last dimension strided": torch.randn(*shape, 2, generator=generator).to(dtype)[..., 0],
        "one row seen many times": torch.randn(1, 1, 48, generator=generator).to(dtype).expand(shape),
        "transposed": torch.randn(5, 9, 48, generator=generator).to(dtype).transpose(0, 1),
    }
    for name, x in views.items():
        check(x, residual, w, dy, ds, name)
        check(residual, x, w, x, ds, f"{name}, as residual and gradient")


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_scale_and_offset(scale, offset, generator):
    x = torch.randn(20, 192, generator=generator) * scale + offset
    w = torch.randn(192, generator=generator)
    close(rmsnorm(x, w, EPS, backend="triton"), rmsnorm_reference(x.double(), w.double(), EPS), "y")


def test_bf16_rounds_like_the_reference(generator):
    """Two roundings, as in transformers: only a statistic that differs in its last bit may move a result."""
    x, w = torch.randn(64, 256, generator=generator).bfloat16(), torch.randn(256, generator=generator).bfloat16()
    equal = rmsnorm(x, w, EPS, backend="triton") == rmsnorm_reference(x, w, EPS)
    assert equal.float().mean() > 0.999
    total = add_rmsnorm(x, x.flip(0), w, EPS, backend="triton")[1]
    assert torch.equal(total, x + x.flip(0))


def test_bitwise_equal_across_runs_and_batches(generator):
    x, dy = (torch.randn(1000, 160, generator=generator).bfloat16() for _ in range(2))
    w = torch.randn(160, generator=generator).bfloat16()

    def run(rows=slice(None)):
        (y,), (dx, dw) = gradients(lambda x, w: rmsnorm(x, w, EPS, backend="triton"), (x[rows], w), (dy[rows],))
        return y, dx, dw

    once = run()
    assert all(map(torch.equal, run(), once))
    for rows in (slice(3, 4), slice(137, 900)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows)[:2], once[:2], strict=True)), f"rows {rows}"


def test_one_output_used_or_one_input_frozen(generator):
    x, r, dy = (torch.randn(9, 40, generator=generator) for _ in range(3))
    w = torch.randn(40, generator=generator)
    for output in (0, 1):
        for mask in ((True, False, False), (False, False, True), (True, True, True)):
            ours, theirs = (
                [t.detach().to(dtype).requires_grad_(need) for t, need in zip((x, r, w), mask, strict=True)]
                for dtype in (torch.float32, torch.float64)
            )
            if output == 1 and not mask[0]:
                continue  # the plain sum does not depend on the weight
            add_rmsnorm(*ours, EPS, backend="triton")[output].backward(dy)
            add_rmsnorm_reference(*theirs, EPS)[output].backward(dy.double())
            for a, b in zip(ours, theirs, strict=True):
                assert (a.grad is None or not a.grad.any()) == (b.grad is None or not b.grad.any())
                if a.grad is not None and b.grad is not None:
                    close(a.grad, b.grad, f"output {output}, needs {mask}")


def test_nan_stays_in_its_row(generator):
    x = torch.randn(3, 70, generator=generator)
    x[1, 69] = torch.nan
    y = rmsnorm(x, torch.ones(70), EPS, backend="triton")
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


def test_what_it_does_not_serve_is_named():
    with pytest.raises(ValueError, match="does not know this shape or dtype"):
        rmsnorm(torch.ones(2, 8).double(), torch.ones(8).double(), EPS, backend="triton")
    with pytest.raises(ValueError, match=r"weight has shape \[4\]"):
        rmsnorm(torch.ones(2, 5), torch.ones(4), EPS, backend="triton")


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_opcheck(dtype, generator):
    x, r = (torch.randn(3, 4, 24, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    w = torch.randn(24, generator=generator).to(dtype).requires_grad_()
    rmsnorm(x, w, EPS, backend="triton")
    torch.library.opcheck(torch.ops.axpo.triton_rmsnorm.default, (x, w, EPS))
    torch.library.opcheck(torch.ops.axpo.triton_add_rmsnorm.default, (x, r, w, EPS))
    plain = [t.detach() for t in (x, r, x, w)]
    torch.library.opcheck(torch.ops.axpo.triton_rmsnorm_backward.default, (*plain, EPS))
