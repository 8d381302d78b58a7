"""The Triton LM head, interpreted: against fp64 autograd on easy and nasty logits, its invariants, and its shards."""

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")
from kernels import linear_logprob_entropy, linear_logprob_state, merge_shards
from kernels.linear_logprob_entropy import linear_logprob_entropy_reference
from kernels.linear_logprob_entropy import triton as module

pytestmark = pytest.mark.usefixtures("poisoned")
FORMS = ("tiles", "matmul")


@pytest.fixture
def tile(monkeypatch):
    """tile(name=value, …): other sizes than tiles.toml's, for both passes. Small chunks make several of each."""

    def use(**sizes):
        base = {"forward": "tiles", "block_m": 32, "block_n": 128, "block_k": 64, "tiles_per_split": 2, "group": 2}
        options = {"tma": False, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr(module, "tiles", lambda op, device: base | options | sizes)

    use()
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    return use


def problem(n, v, g, h=40, kind="gaussian"):
    """hidden, weight, labels, temperature, upstream gradients. The last weight column adds a common offset to a row."""
    hidden, weight = torch.randn(n, h, generator=g), torch.randn(v, h, generator=g) / h**0.5
    labels, temperature = torch.randint(0, v, (n,), generator=g), 0.3 + 1.4 * torch.rand(n, generator=g)
    if kind == "peaked":  # hidden row i points at its label: p(label) is close to 1
        hidden = 12 * weight[labels] / weight[labels].norm(dim=1, keepdim=True) ** 2
    if kind.startswith("offset"):
        weight[:, -1], hidden[:, -1] = 1.0, float(kind.split()[1])
    return hidden, weight, labels, temperature, torch.randn(n, generator=g), torch.randn(n, generator=g)


def run(hidden, weight, labels, temperature, grad_logprob, grad_entropy, backend="triton"):
    """(logprob, entropy, dhidden, dweight); backend None is the reference in fp64."""
    if backend is None:
        hidden, weight, temperature = hidden.double(), weight.double(), temperature.double()
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    if backend is None:
        outputs = linear_logprob_entropy_reference(hidden, weight, labels, temperature)
    else:
        outputs = linear_logprob_entropy(hidden, weight, labels, temperature, backend=backend)
    upstream = grad_logprob.to(outputs[0]), grad_entropy.to(outputs[0])
    return *(x.detach() for x in outputs), *torch.autograd.grad(outputs, (hidden, weight), upstream)


def assert_close(actual, expected, tolerance=1e-5, gradient=None):
    for name, a, b in zip(("logprob", "entropy", "dhidden", "dweight"), actual, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1)
            assert error <= (gradient if gradient and name[0] == "d" else tolerance), f"{name}: error {error:.2e}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "v"), [(0, 5), (1, 1), (3, 127), (33, 128), (32, 129), (5, 1187), (4, 2374)])
def test_matches_fp64(n, v, form, generator, tile):
    tile(forward=form)
    case = problem(n, v, generator)
    assert_close(run(*case), run(*case, backend=None))


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_keep_fp32_logits(dtype, tma, generator, tile):
    tile(tma=tma)
    hidden, weight, *rest = problem(40, 300, generator, h=72)  # the last 8 of H lie outside a tile
    case = (hidden.to(dtype), weight.to(dtype), *rest)
    results, expected = run(*case), run(*case, backend=None)
    assert [x.dtype for x in results] == [torch.float32, torch.float32, dtype, dtype]
    assert_close(results, expected, 2e-6, gradient=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["peaked", "offset 1000", "offset -1000"])
def test_peaked_and_offset_logits(kind, form, generator, tile):
    tile(forward=form)
    case = problem(20, 333, generator, kind=kind)
    # An fp32 logit of 1000 is itself known to 6e-5 only, which 1 / T and the gradient's products enlarge.
    assert_close(run(*case), run(*case, backend=None), 1e-5 if kind == "peaked" else 1e-3)


def test_phantom_columns_count_nothing(tile):
    """One logit +3, all others −15, V no multiple of the tile: a column too many would be e⁰ among e⁻¹⁵s."""
    weight = torch.full((1187, 1), -15.0)
    weight[700] = 3.0
    logprob, entropy = linear_logprob_entropy(torch.ones(1, 1), weight, torch.tensor([700]), backend="triton")
    exact = torch.log_softmax(weight[:, 0].double(), 0)
    torch.testing.assert_close(logprob[0].double(), exact[700], rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy[0].double(), -(exact.exp() * exact).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_certain_label_keeps_its_digits(form, tile):
    """p(label) = 1 − 3e-9: a sum in fp32 would make the log-prob, the entropy and the gradient 0."""
    tile(forward=form)
    weight, hidden = torch.eye(4)[:, :2].clone().requires_grad_(), torch.tensor([[20.0, 0.0]])
    logprob, entropy = linear_logprob_entropy(hidden, weight, torch.tensor([0]), backend="triton")
    logprob.backward()
    exact = torch.log_softmax(torch.tensor([20.0, 0, 0, 0], dtype=torch.float64), 0)
    torch.testing.assert_close(logprob[0].double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy[0].double(), -(exact.exp() * exact).sum(), rtol=1e-5, atol=0)
    torch.testing.assert_close(weight.grad[0, 0].double(), 20 * -exact[0].expm1(), rtol=1e-4, atol=0)


def test_ignored_rows(generator, tile):
    hidden, weight, labels, temperature, g, h = problem(40, 250, generator)
    labels[::3] = -100
    expected = run(hidden, weight, labels, temperature, g, h, backend=None)
    g[::3], h[::3] = torch.nan, torch.inf  # what a masked loss may send back there
    results = run(hidden, weight, labels, temperature, g, h)
    assert_close(results, expected)
    assert not torch.stack(results[:2])[:, ::3].any()
    assert not any(r.any() for r in run(hidden, weight, torch.full((40,), -100), temperature, g, h)), "all ignored"


def test_one_output_or_one_input(generator, tile):
    hidden, weight, labels, temperature, g, _ = problem(9, 130, generator)
    for output, needs in ((0, (True, False)), (1, (False, True))):
        inputs = [t.detach().requires_grad_(n) for t, n in zip((hidden, weight), needs, strict=True)]
        wide = [t.detach().double().requires_grad_(n) for t, n in zip((hidden, weight), needs, strict=True)]
        linear_logprob_entropy(*inputs, labels, temperature, backend="triton")[output].backward(g)
        linear_logprob_entropy_reference(*wide, labels, temperature.double())[output].backward(g.double())
        for need, a, b in zip(needs, inputs, wide, strict=True):
            assert (a.grad is not None) == need
            if need:
                torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-5)


def test_strided_and_misaligned(generator, tile):
    tile(tma=True)  # which these cannot use, and must not try to
    hidden, weight, labels, temperature, g, h = problem(33, 129, generator)
    expected = run(hidden, weight, labels, temperature, g, h)
    wide = torch.randn(33, 90, generator=generator)
    wide[:, 1:41] = hidden
    spread = torch.zeros(66, dtype=torch.int64)
    spread[::2] = labels
    shifted = torch.cat((torch.ones(1), temperature))[1:]
    results = run(wide[:, 1:41], weight.T.contiguous().T, spread[::2], shifted, g, h)
    assert_close(results, expected)


def test_rows_beyond_2_to_the_31(generator, tile):
    """Two rows 2³¹ elements apart (memory that is never touched is never there)."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = torch.empty(2**31 + 16, dtype=torch.bfloat16).as_strided((2, 16), (2**31, 1))
    hidden, weight, labels, temperature, g, h = problem(2, 20, generator, h=16)
    far.copy_(hidden)
    for a, b in zip(
        run(far, weight.bfloat16(), labels, temperature, g, h),
        run(far.clone(memory_format=torch.contiguous_format), weight.bfloat16(), labels, temperature, g, h),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["gaussian", "peaked", "offset 1000"])
def test_invariants(kind, generator, tile):
    case = problem(40, 515, generator, kind=kind)
    logprob, entropy, _, dweight = run(*case)
    assert (logprob <= 0).all() and (entropy >= 0).all()
    assert (entropy <= math.log(515) * (1 + 1e-6)).all()
    # Σ_j dz_j = 0 for each row, so the columns of dweight add up to Σ_i x_i Σ_j dz_ij = 0.
    assert (dweight.sum(0).abs() <= 1e-4 * dweight.abs().sum(0).clamp_min(1)).all()


def test_independent_of_the_splits(generator, tile):
    case = problem(20, 1187, generator)[:4]
    results = []
    for sizes in ({"tiles_per_split": 1}, {"tiles_per_split": 3}, {"tiles_per_split": 99}, {"block_n": 512}):
        tile(**sizes)
        results.append(torch.stack(linear_logprob_entropy(*case, backend="triton")))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


def test_bitwise_equal_across_runs_and_batches(generator, tile):
    hidden, weight, labels, temperature, g, h = problem(70, 300, generator)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    once = run(hidden, weight, labels, temperature, g, h)
    assert all(map(torch.equal, run(hidden, weight, labels, temperature, g, h), once))
    for rows in (slice(0, 1), slice(50, 53), slice(11, 61)):
        part = linear_logprob_entropy(hidden[rows], weight, labels[rows], temperature[rows], backend="triton")
        for a, b in zip(part, once[:2], strict=True):
            assert torch.equal(a, b[rows]), f"rows {rows}"


@pytest.mark.parametrize("form", FORMS)
def test_nan_is_not_lost(form, generator, tile):
    tile(forward=form)
    hidden, weight, labels, *_ = problem(6, 350, generator)
    hidden[2, 3] = torch.nan
    for result in linear_logprob_entropy(hidden, weight, labels, backend="triton"):
        assert result[2].isnan() and result[[0, 1, 3, 4, 5]].isfinite().all()
    for broken in (0, 200, 349):
        bad = weight.clone()
        bad[broken] = torch.nan
        assert all(result.isnan().all() for result in linear_logprob_entropy(hidden, bad, labels, backend="triton"))


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_shards_merge_to_the_whole(shards, generator, tile):
    hidden, weight, labels, temperature, g, h = problem(24, 400, generator)
    labels[5] = -100
    cuts = [0, *sorted((torch.randperm(399, generator=generator)[: shards - 1] + 1).tolist()), 400]
    parts = [weight[a:b].clone().requires_grad_() for a, b in itertools.pairwise(cuts)]
    options = {"backend": "triton"}
    states = torch.stack(
        [linear_logprob_state(hidden, w, labels, temperature, a, **options) for w, a in zip(parts, cuts, strict=False)]
    )
    x, grads = hidden.clone().requires_grad_(), []
    for w, start in zip(parts, cuts, strict=False):
        outputs = merge_shards(states, x, w, labels, temperature, start, **options)
        grads.append(torch.autograd.grad(outputs, (x, w), (g, h)))
    merged = (*outputs, sum(dx for dx, _ in grads), torch.cat([dw for _, dw in grads]))
    assert_close(merged, run(hidden, weight, labels, temperature, g, h, backend=None))
    whole = linear_logprob_entropy(hidden, weight, labels, temperature, **options)
    torch.testing.assert_close(torch.stack(outputs), torch.stack(whole), rtol=1e-6, atol=1e-6)


def test_workspace_at_the_size_that_counts():
    """N 8192, H 4096, V 151,936 in bf16: a chunk of the logits' gradient, and hidden's gradient in fp32."""
    columns = module.chunk_columns(8192 * 2, 256, 151_936)
    assert columns % 256 == 0
    assert columns * 8192 * 2 + 8192 * 4096 * 4 <= 500e6
    assert module.chunk_columns(2**40, 256, 151_936) == 256
    assert module.chunk_columns(2, 256, 1000) == 1000


def test_opcheck_and_one_graph(generator, tile):
    hidden, weight, labels, temperature, *_ = problem(6, 50, generator)
    arguments = (hidden.requires_grad_(), weight.requires_grad_(), labels, temperature, -100)
    torch.library.opcheck(module.fused, arguments)
    torch.library.opcheck(module.state, (hidden.detach(), weight.detach(), labels, temperature, 3))

    def loss(hidden, weight):
        return sum(x.sum() for x in linear_logprob_entropy(hidden, weight, labels, temperature, backend="triton"))

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), expected))


def test_what_it_does_not_serve_is_named():
    with pytest.raises(ValueError, match="does not know this shape or dtype"):
        linear_logprob_entropy(
            torch.ones(2, 4).double(), torch.ones(3, 4).double(), torch.zeros(2).long(), backend="triton"
        )
