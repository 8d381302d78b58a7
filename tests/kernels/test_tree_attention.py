"""tree_attention against float64, on random trees, with its promises: skipping is exact, gradients, determinism."""

import itertools

import numpy as np
import pytest
import torch

from kernels import tree_attention
from kernels._library import LOADED
from kernels.tree_attention import tree_attention_reference

needs_cpp = pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")


def fresh_seed() -> int:
    return int(np.random.SeedSequence().entropy % 2**32)


def random_forest(tokens: int, rng: np.random.Generator, longest_run: int = 40) -> torch.Tensor:
    """subtree_end of trees drawn depth first until `tokens` tokens are packed."""
    end = np.zeros(tokens, dtype=np.int64)

    def grow(start: int, depth: int) -> int:
        run_end = min(tokens, start + int(rng.integers(1, longest_run + 1)))
        stop = run_end
        children = int(rng.integers(0, 4)) if depth < 5 else 0
        for _ in range(children):
            if stop < tokens:
                stop = grow(stop, depth + 1)
        end[start:run_end] = stop
        return stop

    position = 0
    while position < tokens:
        position = grow(position, 0)
    return torch.from_numpy(end)


def draw(tokens: int, q_heads: int, kv_heads: int, dim: int, seed: int) -> list[torch.Tensor]:
    """q, k, v and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, q_heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim), (tokens, q_heads, dim)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def with_gradients(function, q, k, v, grad, end, scale):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, end, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def lse_rounding(q, k, v, grad, end, scale) -> list[torch.Tensor]:
    """How far the gradients may move by keeping a query's log-sum-exp in fp32: of out (not at all), q, k and v.

    The backward recomputes p = 2^(log2(e) (score - lse)), so a rounding of lse and one of its multiple change all of a
    query's p by up to |lse| 2^-23 of their size. (The plain reference normalises p itself, without such an error.)
    """
    tokens, group = len(q), q.shape[1] // max(k.shape[1], 1)
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    scores = torch.einsum("ihd,jhd->hij", q, k).mul(scale).masked_fill((j > i) | (i >= end[None]), -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    moved = (scores - lse).exp() * lse.abs() * 2.0**-23
    by_weight = torch.einsum("ihd,jhd->hij", grad, v)
    mean = (torch.softmax(scores, -1) * by_weight).sum(-1, keepdim=True)
    by_score = moved * (by_weight - mean).abs() * abs(scale)
    to_kv = [torch.einsum("hij,ihd->jhd", x, y.abs()) for x, y in ((by_score, q), (moved, grad))]
    to_kv = [x.unflatten(1, (-1, group)).sum(2) for x in to_kv]
    return [torch.zeros_like(q), torch.einsum("hij,jhd->ihd", by_score, k.abs()), *to_kv]


def assert_matches_float64(q, k, v, grad, end, scale, note: str) -> None:
    """Errors of at most three times those of plain fp32, and what the fp32 log-sum-exp adds."""
    found = with_gradients(tree_attention, q, k, v, grad, end, scale)
    truth = with_gradients(tree_attention_reference, *(x.double() for x in (q, k, v, grad)), end, scale)
    plain = with_gradients(tree_attention_reference, q, k, v, grad, end, scale)
    rounding = lse_rounding(q, k, v, grad, end, scale)
    for name, a, b, c, d in zip(("out", "grad_q", "grad_k", "grad_v"), found, truth, plain, rounding, strict=True):
        assert a.shape == b.shape == d.shape and a.dtype == torch.float32
        allowed = 3 * (c - b).abs().amax() + 2e-6 * (1 + b.abs().amax()) + d
        excess = (a - b).abs() - allowed
        assert (excess <= 0).all(), f"{name}: error {(a - b).abs().max():.2e}, {excess.max():.2e} too much; {note}"


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "dim"), [(4, 2, 32), (2, 2, 64), (3, 1, 8), (2, 1, 24), (4, 4, 128), (1, 1, 256)]
)
def test_random_forests_match_float64(q_heads, kv_heads, dim):
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    for _ in range(3):
        tokens = int(rng.integers(1, 420))
        end = random_forest(tokens, rng, longest_run=int(rng.integers(1, 90)))
        q, k, v, grad = draw(tokens, q_heads, kv_heads, dim, seed)
        assert_matches_float64(q, k, v, grad, end, dim**-0.5, f"seed {seed}, T {tokens}")


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 47, 48, 49, 63, 64, 65, 96, 239, 240, 241])
def test_lengths_around_the_tiles(tokens):
    seed = fresh_seed()
    q, k, v, grad = draw(tokens, 2, 1, 16, seed)
    assert_matches_float64(q, k, v, grad, torch.full((tokens,), tokens), 0.3, f"seed {seed}, T {tokens}")


def test_no_tokens():
    q, k, v, grad = draw(0, 4, 2, 32, 0)
    out, grad_q, grad_k, grad_v = with_gradients(tree_attention, q, k, v, grad, torch.zeros(0, dtype=torch.int64), 1.0)
    assert out.shape == grad_q.shape == (0, 4, 32) and grad_k.shape == grad_v.shape == (0, 2, 32)


def test_one_token_returns_its_value():
    q, k, v, _ = draw(1, 4, 2, 32, fresh_seed())
    out = tree_attention(q, k, v, torch.tensor([1]), 0.2)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=1), rtol=0, atol=0)


def test_sequences_side_by_side_equal_each_alone():
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(1, 150, size=5)]
    bounds = np.cumsum([0, *lengths])
    tokens = int(bounds[-1])
    q, k, v, grad = draw(tokens, 4, 2, 32, seed)
    end = torch.cat([torch.full((n,), int(stop)) for n, stop in zip(lengths, bounds[1:], strict=True)])
    packed = with_gradients(tree_attention, q, k, v, grad, end, 0.2)
    for start, stop in itertools.pairwise(bounds):
        part = [x[start:stop] for x in (q, k, v, grad)]
        alone = with_gradients(tree_attention, *part, torch.full((int(stop - start),), int(stop - start)), 0.2)
        for a, b in zip(packed, alone, strict=True):
            torch.testing.assert_close(a[start:stop], b, rtol=2e-5, atol=2e-5, msg=lambda m: f"{m} (seed {seed})")


def test_forks_equal_their_paths_alone():
    """Two branches behind one prefix: each branch's rows are those of prefix + branch as an ordinary sequence."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    prefix, first, second = (int(n) for n in rng.integers(1, 120, size=3))
    tokens = prefix + first + second
    end = torch.full((tokens,), tokens)
    end[prefix : prefix + first] = prefix + first
    q, k, v, _ = draw(tokens, 4, 2, 32, seed)
    tree = tree_attention(q, k, v, end, 0.2)
    for branch in (range(prefix, prefix + first), range(prefix + first, tokens)):
        path = torch.tensor([*range(prefix), *branch])
        alone = tree_attention(q[path], k[path], v[path], torch.full((len(path),), len(path)), 0.2)
        torch.testing.assert_close(tree[path], alone, rtol=2e-5, atol=2e-5, msg=lambda m: f"{m} (seed {seed})")


def test_what_is_not_seen_has_no_influence_at_all():
    """Poison in a subtree must not reach any query outside of it: skipped or masked, never multiplied by zero."""
    seed = fresh_seed()
    end = torch.tensor([90] * 30 + [60] * 30 + [90] * 30)
    q, k, v, _ = draw(90, 2, 1, 32, seed)
    clean = tree_attention(q, k, v, end, 0.2)
    k[30:60] *= 50
    v[30:60] = 1e30
    poisoned = tree_attention(q, k, v, end, 0.2)
    outside = [*range(30), *range(60, 90)]
    assert torch.equal(clean[outside], poisoned[outside]), f"seed {seed}"


@pytest.mark.parametrize("factor", [1e-4, 30.0])
def test_flat_and_peaked_scores(factor):
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    q, k, v, grad = draw(200, 2, 1, 32, seed)
    assert_matches_float64(q, k, v, grad, random_forest(200, rng), factor * 32**-0.5, f"seed {seed}")


def test_common_offset_of_the_scores():
    """Scores around 1000 with small differences: the maximum is subtracted before the exponential."""
    seed = fresh_seed()
    q, k, v, grad = draw(130, 2, 2, 32, seed)
    q[..., 0] = 40.0
    k[..., 0] = 25.0
    found = with_gradients(tree_attention, q, k, v, grad, torch.full((130,), 130), 1.0)
    truth = with_gradients(
        tree_attention_reference, *(x.double() for x in (q, k, v, grad)), torch.full((130,), 130), 1.0
    )
    for a, b in zip(found, truth, strict=True):
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() < 3e-3 * b.abs().max(), f"seed {seed}"


@needs_cpp
def test_every_element_of_the_results_is_written(monkeypatch):
    """Outputs come from uninitialised memory: filled with NaN here, none may survive."""
    seed = fresh_seed()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.isnan(torch.empty(7)).all()
        for tokens in (1, 50, 333):
            q, k, v, grad = draw(tokens, 4, 2, 24, seed)
            end = random_forest(tokens, np.random.default_rng(seed))
            out, lse = torch.ops.axpo.tree_attention(q, k, v, end, 0.2)
            grads = torch.ops.axpo.tree_attention_backward(grad, q, k, v, end, out, lse, 0.2)
            assert all(torch.isfinite(x).all() for x in (out, lse, *grads)), f"seed {seed}, T {tokens}"
    finally:
        torch.use_deterministic_algorithms(False)


@needs_cpp
def test_bitwise_equal_for_any_number_of_threads_and_in_every_run():
    seed = fresh_seed()
    end = random_forest(700, np.random.default_rng(seed), longest_run=100)
    q, k, v, grad = draw(700, 4, 2, 32, seed)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(tree_attention, q, k, v, grad, end, 0.2))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), f"seed {seed}"


def test_strided_inputs_and_int32_ends():
    seed = fresh_seed()
    q, k, v, grad = draw(90, 4, 2, 32, seed)
    end = random_forest(90, np.random.default_rng(seed))
    plain = with_gradients(tree_attention, q, k, v, grad, end, 0.2)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, grad)]
    assert not strided[0].is_contiguous()
    for a, b in zip(plain, with_gradients(tree_attention, *strided, end.int(), 0.2), strict=True):
        assert torch.equal(a, b), f"seed {seed}"


def test_bf16():
    """Widened to fp32 inside: the only error is the rounding of the results."""
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    for tokens, dim in ((1, 8), (203, 24), (330, 64)):
        end = random_forest(tokens, rng)
        q, k, v, grad = (x.bfloat16() for x in draw(tokens, 4, 2, dim, seed))
        found = with_gradients(tree_attention, q, k, v, grad, end, 0.2)
        truth = with_gradients(tree_attention_reference, *(x.double() for x in (q, k, v, grad)), end, 0.2)
        for name, a, b in zip(("out", "grad_q", "grad_k", "grad_v"), found, truth, strict=True):
            assert a.dtype == torch.bfloat16 and a.shape == b.shape
            error, allowed = (a - b).norm().item(), 6e-3 * b.norm().item() + 1e-2 * tokens**0.5
            assert error <= allowed, f"{name}: {error:.2e} above {allowed:.2e} (seed {seed}, T {tokens})"


@needs_cpp
def test_bf16_rounds_to_the_nearest_even():
    """One token returns its value, so v comes back bit for bit, NaN and infinity included."""
    v = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(fresh_seed())).bfloat16()
    v[0, 0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    out = tree_attention(
        torch.zeros(1, 2, 16).bfloat16(), torch.zeros_like(v), v, torch.tensor([1]), 1.0, backend="cpp"
    )
    torch.testing.assert_close(out, v, rtol=0, atol=0, equal_nan=True)


def test_other_dtypes_and_dims_take_the_reference():
    seed = fresh_seed()
    end = random_forest(40, np.random.default_rng(seed))
    q, k, v, _ = draw(40, 4, 2, 12, seed)
    wanted = tree_attention_reference(q, k, v, end, 0.2)
    torch.testing.assert_close(tree_attention(q, k, v, end, 0.2), wanted, rtol=0, atol=0)
    half = tree_attention(q.half(), k.half(), v.half(), end, 0.2)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), wanted, rtol=0.01, atol=0.01)


def test_gradcheck_of_the_reference():
    end = torch.tensor([6, 6, 4, 4, 6, 6, 8, 8])
    q, k, v = (torch.randn(8, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: tree_attention_reference(*x, end, 0.5), (q, k, v))


@needs_cpp
def test_opcheck():
    q, k, v, grad = draw(70, 4, 2, 32, fresh_seed())
    end = random_forest(70, np.random.default_rng(0))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.axpo.tree_attention.default, (*leaves, end, 0.2))
    out, lse = torch.ops.axpo.tree_attention(q, k, v, end, 0.2)
    torch.library.opcheck(torch.ops.axpo.tree_attention_backward.default, (grad, q, k, v, end, out, lse, 0.2))
    half = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.axpo.tree_attention.default, (*half, end, 0.2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, e: (q, k[:-1], v[:-1], e), "with the same T and D"),
        (lambda q, k, v, e: (q[:, :3], k, v, e), "3 query heads are not a multiple of 2"),
        (lambda q, k, v, e: (q, k, v, e[:-1]), "int32 or int64 of shape"),
        (lambda q, k, v, e: (q, k, v, e.float()), "int32 or int64 of shape"),
        (lambda q, k, v, e: (q, k, v, e + 1), "subtree_end"),
        (lambda q, k, v, e: (q, k, v, torch.arange(20)), "subtree_end"),
    ],
)
def test_mistakes_are_named(change, message):
    q, k, v, _ = draw(20, 4, 2, 32, 0)
    with pytest.raises(ValueError, match=message):
        tree_attention(*change(q, k, v, torch.full((20,), 20)), 0.2)
