"""Triton's tree attention in the interpreter: random trees against float64, the plan's spans, determinism, opcheck."""

import sys
from functools import partial

import numpy as np
import pytest
import torch

from kernels import tree_attention
from kernels.tree_attention import tree_attention_reference
from kernels.tree_attention import triton as in_triton
from kernels.tree_attention.plan import make_plan

by_triton = partial(tree_attention, backend="triton")


def random_forest(tokens: int, generator: torch.Generator, longest_run: int = 60) -> torch.Tensor:
    """subtree_end of trees with forks within forks, runs of one token and single runs, until `tokens` are packed."""
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))  # noqa: E731
    end = torch.zeros(tokens, dtype=torch.int64)

    def grow(start: int, depth: int) -> int:
        run_end = stop = min(tokens, start + draw(1, longest_run))
        for _ in range(draw(0, 3) if depth < 6 else 0):
            if stop < tokens:
                stop = grow(stop, depth + 1)
        end[start:run_end] = stop
        return stop

    position = 0
    while position < tokens:
        position = grow(position, 0)
    return end


def draw(generator: torch.Generator, tokens: int, q_heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
    """q, k, v and an upstream gradient."""
    return [torch.randn(tokens, heads, dim, generator=generator) for heads in (q_heads, kv_heads, kv_heads, q_heads)]


def with_gradients(function, x, end, scale) -> list[torch.Tensor]:
    *inputs, grad = x
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, end, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(found: list[torch.Tensor], x: list[torch.Tensor], end: torch.Tensor, scale: float) -> None:
    """The result and the gradients within what the dtype's own rounding explains, beside float64."""
    truth = with_gradients(tree_attention_reference, [t.double() for t in x], end, scale)
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[x[0].dtype]
    for name, a, b in zip(("out", "grad_q", "grad_k", "grad_v"), found, truth, strict=True):
        assert a.shape == b.shape and a.dtype == x[0].dtype, name
        # Of single tokens the gradients of q and k are exactly zero, so the error is also measured beside 0.1.
        error = (a.double() - b).norm() / max(b.norm().item(), 0.1 * b.numel() ** 0.5)
        assert error < tolerance, f"{name}: relative error {error:.1e} above {tolerance:.0e}"


@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "dim", "dtype"),
    [
        (90, 4, 2, 32, torch.float32),
        (67, 3, 1, 48, torch.float32),  # padded to 64
        (333, 2, 1, 64, torch.bfloat16),
        (300, 2, 2, 16, torch.float16),
        (270, 2, 1, 128, torch.bfloat16),
        (70, 1, 1, 256, torch.bfloat16),
    ],
)
def test_random_trees(generator, tokens, q_heads, kv_heads, dim, dtype):
    end = random_forest(tokens, generator)
    x = [t.to(dtype) for t in draw(generator, tokens, q_heads, kv_heads, dim)]
    assert_close(with_gradients(by_triton, x, end, dim**-0.5), x, end, dim**-0.5)


@pytest.mark.parametrize(
    "end",
    [
        torch.arange(1, 131),  # every token a root of its own
        torch.full((129,), 129),  # one causal row, a token behind a block
        torch.full((128,), 128),
        torch.tensor([64] * 64 + [128] * 64 + [140] * 12),  # packed rows that end on blocks
        torch.cat([torch.full((40,), 140), torch.arange(41, 141)]),  # a run with a hundred leaves of one token
        torch.tensor([140 if t % 2 == 0 else t + 1 for t in range(140)]),  # a chain with a leaf at every token
        torch.tensor([1]),
    ],
    ids=["roots", "129", "128", "rows", "leaves", "chain", "one"],
)
def test_particular_trees(generator, end):
    x = [t.bfloat16() for t in draw(generator, len(end), 2, 1, 32)]
    assert_close(with_gradients(by_triton, x, end, 0.2), x, end, 0.2)


@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (32, 16), (16, 64)])
def test_plan_lists_every_block_once_and_masks_only_where_needed(generator, rows, keys, monkeypatch):
    monkeypatch.setattr(sys.modules[make_plan.__module__], "CHUNK", 8)  # spans go on behind a chunk's end
    tokens = int(torch.randint(200, 400, (), generator=generator))
    end = random_forest(tokens, generator)
    index = torch.arange(tokens)
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
    spans, counts = make_plan(end, rows, keys)
    for i in range(len(counts)):
        found = {}
        for kind in (0, 1):
            listed = spans[i, kind, : counts[i, kind]]
            assert (listed[:, 0] < listed[:, 1]).all() and (listed[1:, 0] > listed[:-1, 1]).all()  # apart, in order
            blocks = [j for start, stop in listed.tolist() for j in range(start, stop)]
            found |= dict.fromkeys(blocks, kind)
        for j in range(-(-tokens // keys)):
            block = visible[i * rows : (i + 1) * rows, j * keys : (j + 1) * keys]
            wanted = None if not block.any() else 0 if block.all() and block.shape[1] == keys else 1
            assert found.get(j) == wanted, (i, j)


def test_a_branch_in_a_tree_equals_its_path_alone(generator):
    prefix, first, second = (int(n) for n in torch.randint(1, 50, (3,), generator=generator))
    tokens = prefix + first + second
    end = torch.full((tokens,), tokens)
    end[prefix : prefix + first] = prefix + first
    q, k, v, _ = draw(generator, tokens, 2, 1, 32)
    tree = by_triton(q, k, v, end, 0.2)
    for branch in (range(prefix, prefix + first), range(prefix + first, tokens)):
        path = torch.tensor([*range(prefix), *branch])
        alone = by_triton(q[path], k[path], v[path], torch.full((len(path),), len(path)), 0.2)
        torch.testing.assert_close(tree[path], alone, rtol=2e-5, atol=2e-5)


def test_same_bits_in_every_run(generator):
    end = random_forest(200, generator)
    x = [t.bfloat16() for t in draw(generator, 200, 4, 2, 32)]
    for a, b in zip(*(with_gradients(by_triton, x, end, 0.2) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_what_is_not_seen_has_no_influence_at_all(generator):
    end = torch.tensor([90] * 30 + [60] * 30 + [90] * 30)
    q, k, v, _ = draw(generator, 90, 2, 1, 32)
    clean = by_triton(q, k, v, end, 0.2)
    k[30:60] *= 50
    v[30:60] = 1e30
    poisoned = by_triton(q, k, v, end, 0.2)
    outside = [*range(30), *range(60, 90)]
    assert torch.equal(clean[outside], poisoned[outside])


@pytest.mark.parametrize("shift", [0.0, 1000.0, -1000.0])
def test_peaked_and_offset_scores(generator, shift):
    x = draw(generator, 60, 2, 1, 32)
    x[0][..., 0], x[1][..., 0] = 40.0, shift / 40.0
    end = random_forest(60, generator)
    found = with_gradients(by_triton, x, end, 1.0)
    truth = with_gradients(tree_attention_reference, [t.double() for t in x], end, 1.0)
    for a, b in zip(found, truth, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).norm() < 2e-3 * b.norm()


def test_every_element_is_written(generator, poisoned):
    for tokens, dim in ((1, 16), (70, 48)):
        q, k, v, grad = draw(generator, tokens, 2, 1, dim)
        end = random_forest(tokens, generator)
        out, lse = torch.ops.axpo.triton_tree_attention(q, k, v, end, 0.2)
        grads = torch.ops.axpo.triton_tree_attention_backward(grad, q, k, v, end, out, lse, 0.2)
        assert all(torch.isfinite(x).all() for x in (out, lse, *grads))


def test_lse_is_natural(generator):
    q, k, v, _ = draw(generator, 70, 2, 1, 16)
    end = random_forest(70, generator)
    index = torch.arange(70)
    visible = (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
    scores = torch.einsum("ihd,jd->hij", q, k[:, 0]) * 0.3
    wanted = scores.masked_fill(~visible, float("-inf")).logsumexp(-1)
    torch.testing.assert_close(torch.ops.axpo.triton_tree_attention(q, k, v, end, 0.3)[1], wanted, rtol=1e-5, atol=1e-5)


def test_no_tokens(generator):
    x = draw(generator, 0, 4, 2, 32)
    found = with_gradients(by_triton, x, torch.zeros(0, dtype=torch.int64), 1.0)
    assert [t.shape for t in found] == [t.shape for t in (x[0], *x[:3])]


@pytest.mark.parametrize("layout", ["fused", "transposed", "misaligned", "expanded"])
def test_strides_and_int32_ends(generator, layout):
    q, k, v, grad = (t.half() for t in draw(generator, 90, 4, 2, 16))
    end = random_forest(90, generator)
    if layout == "fused":  # read in place
        x = [*torch.cat([q, k, v], dim=1).split((4, 2, 2), dim=1), grad]
    elif layout == "transposed":
        x = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v, grad)]
    elif layout == "misaligned":
        x = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (q, k, v, grad)]
    else:
        grad = torch.ones((), dtype=q.dtype).expand(grad.shape)
        x = [q, k, v, grad]
    plain = with_gradients(by_triton, [q, k, v, grad.contiguous()], end, 0.2)
    for a, b in zip(plain, with_gradients(by_triton, x, end.int(), 0.2), strict=True):
        assert torch.equal(a, b)


def test_fused_projections_are_not_copied(generator):
    fused = torch.randn(90, 8, 16, generator=generator, dtype=torch.float32)
    q, k, _ = fused.split((4, 2, 2), dim=1)
    launch = in_triton.Launch("forward", q, 2)
    assert launch.queries(q).base.data_ptr() == q.data_ptr() and launch.keys(k).base.data_ptr() == k.data_ptr()


def test_opcheck(generator):
    q, k, v, grad = draw(generator, 20, 1, 1, 16)
    end = random_forest(20, generator)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.axpo.triton_tree_attention.default, (*leaves, end, 0.2))
    out, lse = torch.ops.axpo.triton_tree_attention(q, k, v, end, 0.2)
    torch.library.opcheck(torch.ops.axpo.triton_tree_attention_backward.default, (grad, q, k, v, end, out, lse, 0.2))


def test_under_activation_checkpointing(generator):
    x = draw(generator, 30, 2, 1, 16)
    end = random_forest(30, generator)

    def again(q, k, v, end, scale):
        return torch.utils.checkpoint.checkpoint(by_triton, q, k, v, end, scale, use_reentrant=False)

    for a, b in zip(with_gradients(by_triton, x, end, 0.2), with_gradients(again, x, end, 0.2), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("dim", "dtype", "scale"), [(24, torch.float32, 0.2), (32, torch.float64, 0.2), (32, torch.float32, 0.0)]
)
def test_what_it_does_not_serve_is_an_error(generator, dim, dtype, scale):
    q, k, v, _ = (x.to(dtype) for x in draw(generator, 8, 2, 1, dim))
    with pytest.raises(ValueError, match="the Triton kernel does not know"):
        by_triton(q, k, v, torch.full((8,), 8), scale)


def test_agrees_with_the_cpu_kernel(generator):
    x = draw(generator, 70, 4, 2, 32)
    end = random_forest(70, generator)
    for a, b in zip(with_gradients(by_triton, x, end, 0.2), with_gradients(tree_attention, x, end, 0.2), strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-4, atol=2e-5)
