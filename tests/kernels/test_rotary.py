"""rotary against fp64 complex rotation, transformers' convention, and itself under other threads and strides."""

import pytest
import torch

from kernels._library import LOADED
from kernels.rotary import rotary, rotary_reference

pytestmark = pytest.mark.usefixtures("poisoned")
needs_library = pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")


def inputs(tokens: int, q_heads: int, k_heads: int, dim: int, g: torch.Generator):
    """q and k as head views of one fused projection, and the angles."""
    fused = torch.randn(tokens, (q_heads + 2 * k_heads) * dim, generator=g)
    q = fused[:, : q_heads * dim].view(tokens, q_heads, dim)
    k = fused[:, q_heads * dim : (q_heads + k_heads) * dim].view(tokens, k_heads, dim)
    return q, k, torch.rand(tokens, dim // 2, generator=g) * 1000


@pytest.mark.parametrize("tokens", [0, 1, 5, 130])
@pytest.mark.parametrize(("q_heads", "k_heads", "dim"), [(4, 2, 32), (3, 1, 18), (1, 1, 2), (8, 8, 128)])
def test_is_a_rotation_of_pairs(tokens, q_heads, k_heads, dim, generator):
    q, k, angle = inputs(tokens, q_heads, k_heads, dim, generator)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.complex(cos.double(), sin.double())[:, None]
    results = rotary(q, k, cos, sin)
    for x, y in zip((q, k), results, strict=True):
        z = torch.complex(*x.double().chunk(2, -1)) * turn
        torch.testing.assert_close(y.double(), torch.cat((z.real, z.imag), -1), rtol=1e-6, atol=1e-6)
        assert y.is_contiguous()
    swapped = rotary(q.transpose(0, 1).contiguous().transpose(0, 1), k.contiguous(), cos, sin)  # other strides
    assert all(map(torch.equal, swapped, results))


def test_gradients_match_fp64_autograd(generator):
    q, k, angle = inputs(37, 6, 2, 36, generator)
    cos, sin = angle.cos(), angle.sin()
    dq, dk = torch.randn(q.shape, generator=generator), torch.randn(36, 2, 37, generator=generator).permute(2, 1, 0)
    narrow = [t.detach().clone().requires_grad_() for t in (q, k)]
    wide = [t.detach().double().requires_grad_() for t in (q, k)]
    expected = torch.autograd.grad(
        rotary_reference(*wide, cos.double(), sin.double()), wide, (dq.double(), dk.double())
    )
    for a, b in zip(torch.autograd.grad(rotary(*narrow, cos, sin), narrow, (dq, dk)), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    only_k = torch.autograd.grad(rotary(*narrow, cos, sin)[1], narrow[1], dk)[0]
    torch.testing.assert_close(only_k.double(), expected[1], rtol=1e-6, atol=1e-6)


def test_follows_transformers(generator):
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    q, k, angle = inputs(21, 4, 2, 64, generator)
    full = torch.cat((angle, angle), -1)
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], full.cos()[None], full.sin()[None])
    for ours, other in zip(rotary(q, k, angle.cos(), angle.sin()), theirs, strict=True):
        torch.testing.assert_close(ours, other[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


def test_relative_angle_only(generator):
    """q·k after rotation depends on the difference of the positions."""
    dim = 32
    q, k = (torch.randn(1, 1, dim, generator=generator).expand(50, 1, dim) for _ in range(2))
    frequency = 10_000.0 ** (-torch.arange(dim // 2) / (dim // 2))
    positions = torch.arange(50.0)[:, None] * frequency
    shifted = (torch.arange(50.0)[:, None] + 7) * frequency
    rotated_q, _ = rotary(q, q, positions.cos(), positions.sin())
    rotated_k, _ = rotary(k, k, shifted.cos(), shifted.sin())
    dots = (rotated_q * rotated_k).sum(-1)
    torch.testing.assert_close(dots, dots[:1].expand(50, 1), rtol=1e-4, atol=1e-4)


def test_bitwise_equal_across_runs_threads_and_batches(generator, with_threads):
    q, k, angle = inputs(700, 5, 2, 34, generator)
    cos, sin = angle.cos(), angle.sin()
    once = rotary(q, k, cos, sin)
    for threads in (1, 2, 3):
        assert all(map(torch.equal, with_threads(threads, lambda: rotary(q, k, cos, sin)), once)), f"{threads} threads"
    rows = slice(311, 312)
    part = rotary(q[rows], k[rows], cos[rows], sin[rows])
    assert all(torch.equal(a, b[rows]) for a, b in zip(part, once, strict=True))


@needs_library
def test_wrong_shapes_are_named():
    q, k, angle = torch.ones(3, 2, 8), torch.ones(3, 1, 8), torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"q has shape \[3, 2, 8\] with cos \[3, 8\]"):
        rotary(q, k, angle, angle)
    with pytest.raises(ValueError, match=r"k has shape \[2, 1, 8\]"):
        rotary(q, k[:2], angle[:, :4], angle[:, :4])


@needs_library
def test_opcheck(generator):
    q, k, angle = inputs(5, 4, 2, 16, generator)
    arguments = (q.clone().requires_grad_(), k.clone().requires_grad_(), angle.cos(), angle.sin())
    torch.library.opcheck(torch.ops.axpo.rotary.default, arguments)


@needs_library
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (9, 4, 2, 32), (70, 3, 1, 18)])
def test_bf16_is_fp32_rounded_once(shape, generator):
    """Bitwise, forward and backward, with fp32 angles; head views of a fused projection."""
    tokens, q_heads, k_heads, dim = shape
    fused = torch.randn(tokens, q_heads + k_heads, dim, generator=generator).bfloat16()
    angles = torch.randn(tokens, dim // 2, generator=generator)
    narrow = [t.requires_grad_() for t in fused.split((q_heads, k_heads), dim=1)]
    wide = [t.detach().float().requires_grad_() for t in narrow]
    ours = rotary(*narrow, angles.cos(), angles.sin(), backend="cpp")
    expected = rotary(*wide, angles.cos(), angles.sin())
    dy = [torch.randn(t.shape, generator=generator).bfloat16() for t in ours]
    grads = torch.autograd.grad(ours, narrow, dy), torch.autograd.grad(expected, wide, [d.float() for d in dy])
    for a, b in (*zip(ours, expected, strict=True), *zip(*grads, strict=True)):
        assert torch.equal(a, b.bfloat16())
