"""linear_logprob_entropy against fp64 autograd on easy and nasty logits, and its invariants."""

import importlib
import itertools
import math
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_logprob_state, merge_shards
from kernels._library import LOADED, MODE
from kernels.linear_logprob_entropy import linear_logprob_entropy, linear_logprob_entropy_reference

module = importlib.import_module("kernels.linear_logprob_entropy.chunked")
pytestmark = pytest.mark.usefixtures("poisoned")
fused_only = pytest.mark.skipif(MODE == "reference", reason="AXPO_KERNELS=reference asks for log_softmax")


@pytest.fixture
def small_chunks(monkeypatch):
    """Makes a few hundred columns and a few dozen rows take several chunks."""
    monkeypatch.setattr(module, "VOCAB_CHUNK", 100)
    monkeypatch.setattr(module, "ROW_CHUNK", 16)


def problem(n: int, v: int, g: torch.Generator, h: int = 40, kind: str = "gaussian"):
    """hidden, weight, labels, temperature, upstream gradients. The last weight column adds a common offset to a row."""
    hidden, weight = torch.randn(n, h, generator=g), torch.randn(v, h, generator=g) / h**0.5
    labels, temperature = torch.randint(0, v, (n,), generator=g), 0.3 + 1.4 * torch.rand(n, generator=g)
    if kind == "peaked":  # hidden row i points at its label: p(label) is close to 1
        hidden = 12 * weight[labels] / weight[labels].norm(dim=1, keepdim=True) ** 2
    if kind.startswith("offset"):
        weight[:, -1], hidden[:, -1] = 1.0, float(kind.split()[1])
    return hidden, weight, labels, temperature, torch.randn(n, generator=g), torch.randn(n, generator=g)


def run(f, hidden, weight, labels, temperature, grad_logprob, grad_entropy, dtype=torch.float32):
    """(logprob, entropy, dhidden, dweight) of f in the given dtype."""
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
    logprob, entropy = f(hidden, weight, labels, temperature.to(torch.promote_types(dtype, torch.float32)))
    grads = torch.autograd.grad(
        (logprob, entropy), (hidden, weight), (grad_logprob.to(logprob), grad_entropy.to(entropy))
    )
    return logprob.detach(), entropy.detach(), *grads


def assert_close(actual, expected, tolerance=1e-5, what=""):
    for name, a, b in zip(("logprob", "entropy", "dhidden", "dweight"), actual, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1)
            assert error <= tolerance, f"{what} {name}: error {error:.2e}"


@pytest.mark.parametrize("v", [1, 127, 128, 129, 1187])
@pytest.mark.parametrize("n", [0, 1, 3, 50])
def test_matches_fp64(n, v, generator, small_chunks):
    case = problem(n, v, generator)
    expected = run(linear_logprob_entropy_reference, *case, dtype=torch.float64)
    assert_close(run(linear_logprob_entropy, *case), expected)
    assert_close(run(linear_logprob_entropy, *case, dtype=torch.float64), expected, 1e-12, "fp64")
    assert_close(run(linear_logprob_entropy_reference, *case), expected, what="reference")


@pytest.mark.parametrize("kind", ["peaked", "offset 1000", "offset -1000"])
def test_peaked_and_offset_logits(kind, generator, small_chunks):
    case = problem(40, 333, generator, kind=kind)
    expected = run(linear_logprob_entropy_reference, *case, dtype=torch.float64)
    # An fp32 logit of 1000 / 0.3 is itself known to 1e-4 only.
    assert_close(run(linear_logprob_entropy, *case), expected, 1e-5 if kind == "peaked" else 2e-3)


@fused_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_at_a_certain_label_keeps_its_digits(dtype):
    """p(label) = 1 − 3e-9: fp32's 1 − p is 0, and the gradient must not be."""
    weight, hidden = torch.eye(4)[:, :2].to(dtype).requires_grad_(), torch.tensor([[20.0, 0.0]]).to(dtype)
    logprob, _ = linear_logprob_entropy(hidden, weight, torch.tensor([0]))
    logprob.backward()
    expected = 20 * 3 / (torch.tensor(20.0, dtype=torch.float64).exp() + 3)
    torch.testing.assert_close(weight.grad[0, 0].double(), expected, rtol=1e-4, atol=0)


def test_one_output_or_one_input(generator):
    hidden, weight, labels, temperature, g, _ = problem(30, 130, generator)
    for output in (0, 1):
        for needs in ((True, True), (True, False), (False, True)):
            grads = []
            for f, dtype in (
                (linear_logprob_entropy, torch.float32),
                (linear_logprob_entropy_reference, torch.float64),
            ):
                inputs = [t.detach().to(dtype).requires_grad_(n) for t, n in zip((hidden, weight), needs, strict=True)]
                f(*inputs, labels, temperature.to(dtype))[output].backward(g.to(dtype))
                grads.append([t.grad for t in inputs])
            for need, a, b in zip(needs, *grads, strict=True):
                assert (a is not None) == need
                if need:
                    torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_ignored_rows(generator, small_chunks):
    hidden, weight, labels, temperature, g, h = problem(60, 250, generator)
    labels[::3] = -100
    expected = run(linear_logprob_entropy_reference, hidden, weight, labels, temperature, g, h, dtype=torch.float64)
    results = run(linear_logprob_entropy, hidden, weight, labels, temperature, g, h)
    assert_close(results, expected)
    assert not torch.stack(results[:2])[:, ::3].any()
    results = run(linear_logprob_entropy, hidden, weight, torch.full((60,), -100), temperature, g, h)
    assert not any(r.any() for r in results), "all ignored"
    if MODE != "reference":
        g[::3], h[::3] = torch.nan, torch.inf  # what a masked loss may send back there
        assert_close(run(linear_logprob_entropy, hidden, weight, labels, temperature, g, h), expected)


def test_scalar_temperature_and_float_inputs_agree(generator):
    hidden, weight, labels, *_ = problem(20, 100, generator)
    for t in (0.7, 1, 2.0):
        for a, b in zip(
            linear_logprob_entropy(hidden, weight, labels, t),
            linear_logprob_entropy(hidden, weight, labels, torch.full((20,), float(t))),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_keep_fp32_logits(dtype, generator, small_chunks):
    hidden, weight, *rest = problem(48, 700, generator)
    case = (hidden.to(dtype), weight.to(dtype), *rest)
    results, expected = (
        run(linear_logprob_entropy, *case, dtype=dtype),
        run(linear_logprob_entropy_reference, *case, dtype=torch.float64),
    )
    assert [r.dtype for r in results] == [torch.float32, torch.float32, dtype, dtype]
    assert_close(results[:2] + expected[2:], expected)
    assert_close(results, expected, 2 * torch.finfo(dtype).eps, "one rounding at the end")


def test_strided_and_misaligned(generator):
    hidden, weight, labels, temperature, *_ = problem(33, 129, generator)
    expected = linear_logprob_entropy(hidden, weight, labels, temperature)
    wide = torch.randn(33, 90, generator=generator)
    wide[:, 1:41] = hidden
    spread = torch.zeros(66, dtype=torch.int64)
    spread[::2] = labels
    shifted = torch.cat((torch.ones(1), temperature))[1:]
    results = linear_logprob_entropy(wide[:, 1:41], weight.T.contiguous().T, spread[::2], shifted)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gaussian", "peaked", "offset 1000"])
def test_invariants(kind, generator, small_chunks):
    hidden, weight, labels, temperature, g, h = problem(64, 515, generator, kind=kind)
    logprob, entropy, _, dweight = run(linear_logprob_entropy, hidden, weight, labels, temperature, g, h)
    assert (logprob <= 0).all()
    assert (entropy >= 0).all()
    assert (entropy <= math.log(515) * (1 + 1e-6)).all()
    # Σ_j dz_j = 0 for each row, so the columns of dweight add up to Σ_i x_i Σ_j dz_ij = 0.
    assert (dweight.sum(0).abs() <= 1e-4 * dweight.abs().sum(0).clamp_min(1)).all()


@pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")
@pytest.mark.parametrize(("h", "v"), [(40, 100), (128, 600), (600, 9000)])
def test_bitwise_equal_across_runs_threads_and_batches(h, v, generator, with_threads):
    """Rows of hidden's gradient and both outputs do not depend on the other rows; nothing depends on the threads.

    (Of more threads than cores, MKL gives some products other bits in the first call, unless MKL_CBWR forbids it.)
    """
    case = problem(200, v, generator, h=h)
    once = run(linear_logprob_entropy, *case)
    for threads in {1, min(2, os.cpu_count() or 1)}:
        again = with_threads(threads, lambda: run(linear_logprob_entropy, *case))
        assert all(map(torch.equal, again, once)), f"{threads} threads"
        for rows in (slice(0, 1), slice(7, 9), slice(50, 53), slice(11, 177)):
            hidden, weight, *rest = case
            part = run(linear_logprob_entropy, hidden[rows], weight, *(t[rows] for t in rest))
            for name, a, b in zip(("logprob", "entropy", "dhidden"), part[:3], once[:3], strict=True):
                assert torch.equal(a, b[rows]), f"{name} of rows {rows}, {threads} threads"


@pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")
def test_more_rows_and_columns_than_are_held_at_a_time(generator):
    case = problem(2100, 9000, generator, h=8)
    for dtype in (torch.float32, torch.bfloat16):
        part = (case[0].to(dtype), case[1].to(dtype), *case[2:])
        results = run(linear_logprob_entropy, *part, dtype=dtype)
        expected = run(linear_logprob_entropy_reference, *part, dtype=torch.float64)
        assert_close(results, expected, 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@fused_only
def test_no_full_logits_are_made(generator, monkeypatch):
    n, v, h = 300, 2000, 16
    monkeypatch.setattr(module, "VOCAB_CHUNK", 256)
    monkeypatch.setattr(module, "ROW_CHUNK", 64)
    hidden, weight, labels, temperature, *_ = problem(n, v, generator, h=h)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    ones = torch.ones(n)
    with Watch():
        stats = module.chunked._init_fn(hidden, weight, labels, temperature, -100)
        module.backward._init_fn(ones, ones, hidden, weight, labels, temperature, *stats, 0, -100, True, True)
    logprob = stats[0]
    assert logprob.shape == (n,)
    assert largest <= max(weight.nbytes, 80 << 10), f"a tensor of {largest} bytes; all logits take {n * v * 4}"

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear_logprob_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, temperature)
    assert max(t.numel() for t in saved) == max(hidden.numel(), weight.numel())


@pytest.mark.parametrize(
    "loaded", [False, pytest.param(True, marks=pytest.mark.skipif(not LOADED, reason="not built"))]
)
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_state_of_given_logits(offset, loaded, generator, small_chunks, monkeypatch):
    """The C++ form and plain torch's, on logits with a −inf, against fp64. The weight picks hidden's columns."""
    monkeypatch.setattr(module, "use_cpp", lambda *tensors, **options: loaded)
    n, v = 37, 301
    logits = torch.randn(n, v, generator=generator) * 4 + offset
    logits[5, 7], labels = -1e30, torch.randint(0, v, (n,), generator=generator)
    temperature = 0.5 + torch.rand(n, generator=generator)
    exact = torch.log_softmax(logits.double() / temperature.double()[:, None], -1)
    maximum, total, centred, at_label = module.state(logits, torch.eye(v), labels + 9, temperature, 9).unbind(1)
    logprob = exact.gather(1, labels[:, None])[:, 0]
    entropy = -(exact.exp() * exact.clamp_min(-1e30)).sum(1)
    tolerance = 1e-5 if offset == 0 else 3e-4  # 1000 / T is rounded to fp32
    torch.testing.assert_close(at_label - maximum - total.log(), logprob, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total.log() - centred / total, entropy, rtol=tolerance, atol=tolerance)


def test_nan_is_not_lost(generator, small_chunks):
    hidden, weight, labels, *_ = problem(6, 350, generator)
    hidden[2, 3] = torch.nan
    for result in linear_logprob_entropy(hidden, weight, labels):
        assert result[2].isnan()
        assert result[[0, 1, 3, 4, 5]].isfinite().all()
    for broken in (0, 150, 349):  # in the first, a middle and the last chunk of the vocabulary
        weight_broken = weight.clone()
        weight_broken[broken] = torch.nan
        assert all(result.isnan().all() for result in linear_logprob_entropy(hidden, weight_broken, labels))


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_shards_merge_to_the_whole(shards, generator, small_chunks):
    hidden, weight, labels, temperature, g, h = problem(30, 450, generator)
    labels[5] = -100
    cuts = [0, *sorted((torch.randperm(449, generator=generator)[: shards - 1] + 1).tolist()), 450]
    parts = [weight[a:b].clone().requires_grad_() for a, b in itertools.pairwise(cuts)]
    # And shards without any token, first and last.
    empty = linear_logprob_state(hidden, weight[:0], labels, temperature)
    assert (empty == torch.tensor([-math.inf, 0, 0, -math.inf])).all()
    states = torch.stack(
        [empty]
        + [linear_logprob_state(hidden, w, labels, temperature, a) for w, a in zip(parts, cuts, strict=False)]
        + [empty]
    )
    x, grads = hidden.clone().requires_grad_(), []
    for w, start in zip(parts, cuts, strict=False):
        outputs = merge_shards(states, x, w, labels, temperature, start)
        grads.append(torch.autograd.grad(outputs, (x, w), (g, h)))
    merged = (*outputs, sum(dx for dx, _ in grads), torch.cat([dw for _, dw in grads]))
    expected = run(linear_logprob_entropy_reference, hidden, weight, labels, temperature, g, h, dtype=torch.float64)
    assert_close(merged, expected)
    arguments = (states, x, parts[0], labels, temperature, 0, -100, False)
    torch.library.opcheck(importlib.import_module("kernels.linear_logprob_entropy.shards").merge, arguments)
    with pytest.raises(ValueError, match=r"states \[30, 4\]"):
        merge_shards(states[0], x, parts[0], labels)


def test_a_label_that_no_shard_holds_is_minus_infinity(generator):
    hidden, weight, *_ = problem(3, 20, generator)
    labels = torch.tensor([0, 19, 20])
    logprob, _ = merge_shards(linear_logprob_state(hidden, weight, labels)[None], hidden, weight, labels)
    assert logprob.isinf().tolist() == [False, False, True]


def test_an_explicit_backend_is_used(generator):
    case = problem(9, 130, generator)[:4]
    expected = linear_logprob_entropy_reference(*(t.double() if t.is_floating_point() else t for t in case))
    for backend in ("reference", "cpp") if LOADED else ("reference",):
        for a, b in zip(linear_logprob_entropy(*case, backend=backend), expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="backend='cuda'"):
        linear_logprob_entropy(*case, backend="cuda")


def test_errors_name_the_value():
    hidden, weight, labels = torch.ones(3, 4), torch.ones(7, 4), torch.tensor([0, 6, 7])
    with pytest.raises(ValueError, match=r"weight \[7, 5\]"):
        linear_logprob_entropy(hidden, torch.ones(7, 5), labels)
    with pytest.raises(ValueError, match="temperature is 0"):
        linear_logprob_entropy(hidden, weight, labels, 0.0)
    if MODE != "reference":
        with pytest.raises(ValueError, match="label 7 is outside the vocabulary of 7"):
            linear_logprob_entropy(hidden, weight, labels)


@fused_only
def test_opcheck(generator):
    hidden, weight, labels, temperature, *_ = problem(6, 50, generator)
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), labels, temperature, -100)
    torch.library.opcheck(module.chunked, arguments)
    if LOADED:
        plain = (hidden.detach(), weight.detach(), labels, temperature)
        torch.library.opcheck(torch.ops.axpo.linear_logprob_state_cpu.default, (*plain, 3))
        rows = tuple(torch.rand(6) for _ in range(6))
        backward = (*rows[:2], *plain, *rows[2:], 0, -100, True, True)
        torch.library.opcheck(torch.ops.axpo.linear_logprob_backward_cpu.default, backward)


def test_more_logits_than_32_bits_count(generator: torch.Generator) -> None:
    """N · V beyond 2³¹: the last rows, whose logits lie behind it, are those of a small call."""
    n, vocabulary = 14_200, 151_936
    assert n * vocabulary > 2**31
    hidden = torch.randn(n, 8, generator=generator)
    weight = torch.randn(vocabulary, 8, generator=generator)
    labels = torch.randint(vocabulary, (n,), generator=generator)
    logprob, entropy = linear_logprob_entropy(hidden, weight, labels)
    last = slice(n - 16, n)
    expected = linear_logprob_entropy_reference(hidden[last].double(), weight.double(), labels[last])
    torch.testing.assert_close(logprob[last].double(), expected[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(entropy[last].double(), expected[1], atol=1e-4, rtol=1e-5)
