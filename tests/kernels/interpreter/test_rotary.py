"""The Triton rotary, interpreted: a rotation of pairs, its gradient the rotation back."""

import pytest
import torch

pytest.importorskip("triton")
from kernels.rotary import rotary, rotary_reference

pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(tokens: int, q_heads: int, k_heads: int, dim: int, g: torch.Generator, dtype=torch.float32):
    """q and k as head views of one fused projection, and the angles."""
    fused = torch.randn(tokens, q_heads + 2 * k_heads, dim, generator=g).to(dtype)
    angle = torch.rand(tokens, dim // 2, generator=g) * 1000
    return fused[:, :q_heads], fused[:, q_heads : q_heads + k_heads], angle.cos(), angle.sin()


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-6 if actual.dtype == torch.float32 else 2**-8  # half a unit in the last place of bf16
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=1e-6)
    assert actual.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 23])
@pytest.mark.parametrize(("q_heads", "k_heads", "dim"), [(4, 2, 32), (3, 1, 18), (1, 1, 2), (28, 4, 128)])
def test_is_a_rotation_of_pairs(tokens, q_heads, k_heads, dim, dtype, generator):
    q, k, cos, sin = inputs(tokens, q_heads, k_heads, dim, generator, dtype)
    turn = torch.complex(cos.double(), sin.double())[:, None]
    results = rotary(q, k, cos, sin, backend="triton")
    for x, y in zip((q, k), results, strict=True):
        z = torch.complex(*x.double().chunk(2, -1)) * turn
        close(y, torch.cat((z.real, z.imag), -1))
    strided = rotary(q.transpose(0, 1).contiguous().transpose(0, 1), k[..., :].clone(), cos, sin, backend="triton")
    assert all(map(torch.equal, strided, results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_match_fp64_autograd(dtype, generator):
    q, k, cos, sin = inputs(17, 6, 2, 36, generator, dtype)
    dq = torch.randn(q.shape, generator=generator).to(dtype)
    dk = torch.randn(36, 2, 17, generator=generator).permute(2, 1, 0).to(dtype)
    narrow = [t.detach().clone().requires_grad_() for t in (q, k)]
    wide = [t.detach().double().requires_grad_() for t in (q, k)]
    expected = torch.autograd.grad(
        rotary_reference(*wide, cos.double(), sin.double()), wide, (dq.double(), dk.double())
    )
    outputs = rotary(*narrow, cos, sin, backend="triton")
    for a, b in zip(torch.autograd.grad(outputs, narrow, (dq, dk), retain_graph=True), expected, strict=True):
        close(a, b)
    close(torch.autograd.grad(outputs[1], narrow[1], dk)[0], expected[1])


def test_bf16_equals_the_reference(generator):
    q, k, cos, sin = inputs(9, 4, 2, 64, generator, torch.bfloat16)
    for ours, theirs in zip(rotary(q, k, cos, sin, backend="triton"), rotary_reference(q, k, cos, sin), strict=True):
        assert torch.equal(ours, theirs)


def test_there_and_back(generator):
    q, k, cos, sin = inputs(5, 4, 2, 32, generator)
    there = rotary(q, k, cos, sin, backend="triton")
    for x, y in zip((q, k), rotary(*there, cos, -sin, backend="triton"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_bitwise_equal_across_runs_and_batches(generator):
    q, k, cos, sin = inputs(40, 5, 2, 34, generator, torch.bfloat16)
    once = rotary(q, k, cos, sin, backend="triton")
    assert all(map(torch.equal, rotary(q, k, cos, sin, backend="triton"), once))
    rows = slice(11, 19)
    part = rotary(q[rows], k[rows], cos[rows], sin[rows], backend="triton")
    assert all(torch.equal(a, b[rows]) for a, b in zip(part, once, strict=True))


def test_what_it_does_not_serve_is_named():
    q, angle = torch.ones(3, 2, 8), torch.ones(3, 4)
    with pytest.raises(ValueError, match="does not know this shape or dtype"):
        rotary(q.double(), q.double(), angle, angle, backend="triton")
    with pytest.raises(ValueError, match=r"k has shape \[2, 2, 8\]"):
        rotary(q, q[:2], angle, angle, backend="triton")


def test_opcheck(generator):
    q, k, cos, sin = inputs(5, 4, 2, 16, generator, torch.bfloat16)
    rotary(q, k, cos, sin, backend="triton")
    leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
    torch.library.opcheck(torch.ops.axpo.triton_rotary.default, (*leaves, cos, sin, False))
    torch.library.opcheck(torch.ops.axpo.triton_rotary.default, (q, k, cos, sin, True))
