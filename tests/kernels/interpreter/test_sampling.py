"""The Triton sampler, interpreted: the reference's tokens bit for bit, and the distribution of linear_sample's."""

import pytest
import torch
from scipy import stats

pytest.importorskip("triton")
from kernels import linear_logprob_entropy, linear_sample, sample
from kernels.linear_logprob_entropy import triton as head
from kernels.sampling import sample_reference
from kernels.sampling import triton as module

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def tile(monkeypatch):
    """tile(name=value, …): other sizes than tiles.toml's."""

    def use(**sizes):
        base = {"block": 128, "cut_block": 128, "cut_warps": 4, "num_warps": 4}
        matrix = {
            "forward": "tiles",
            "block_m": 32,
            "block_n": 128,
            "block_k": 64,
            "tiles_per_split": 2,
            "group": 2,
            "tma": False,
        }
        for where in (module, head):
            monkeypatch.setattr(where, "tiles", lambda op, device: base | matrix | {"num_stages": 2} | sizes)

    use()
    return use


def rows_of_every_kind(b, v, g, min_p):
    """Flat to peaked, ties, offsets, −inf; greedy rows; top-k, top-p and min-p each on for some."""
    logits = torch.randn(b, v, generator=g) * torch.tensor([0.0, 0.1, 2.0, 30.0])[torch.arange(b) % 4, None]
    logits[::5] = (logits[::5] * 2).round() / 2
    logits[1::6] += 1000
    logits[2::7, :: max(v - 1, 2)] = -torch.inf
    logits[:, v // 2] = torch.where(logits.isinf().all(1), 0.0, logits[:, v // 2])
    some = lambda: torch.randint(0, 2, (b,), generator=g)  # noqa: E731
    return (
        logits,
        torch.randint(-(2**62), 2**62, (b,), generator=g),
        torch.randint(0, 2**40, (b,), generator=g),
        2 * torch.rand(b, generator=g) * (torch.rand(b, generator=g) > 0.1),
        torch.randint(0, v + 2, (b,), generator=g) * some(),
        (torch.rand(b, generator=g) * 1.5).clamp(max=1),
        torch.tensor([1, 5, 60]) if v > 61 else None,
        torch.rand(b, generator=g).square() * some() if min_p else None,
    )


@pytest.mark.parametrize(("v", "min_p"), [(1, False), (3, True), (128, False), (129, True)])
def test_tokens_equal_the_reference_bit_for_bit(v, min_p, generator, tile):
    arguments = rows_of_every_kind(12, v, generator, min_p)
    ours, theirs = sample(*arguments, backend="triton"), sample_reference(*arguments)
    assert torch.equal(ours[0], theirs[0]), f"rows {(ours[0] != theirs[0]).nonzero().flatten().tolist()}"
    # Not against the reference, which has rounded 1000 / T to fp32: ours measures from the largest, then divides.
    logits, temperature = arguments[0].double(), torch.where(arguments[3] == 0, 1.0, arguments[3]).double()
    exact = torch.log_softmax(logits / temperature[:, None], -1)
    entropy = -(exact.exp() * exact.clamp(min=-1e30)).sum(-1)
    torch.testing.assert_close(ours[1].double(), exact.gather(1, ours[0][:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[2].double(), entropy, rtol=1e-5, atol=1e-5)


def test_ties(tile):
    tile(block=8, cut_block=8)
    flat, signed = [0.0] * 8, [-0.0, 0.0, -1.0, 0.0, -torch.inf, -1.0, -1.0, -1.0]
    cases = [(flat, 0, 1e-9, 0), (flat, 3, 1, 0), (flat, 0, 0.5, 0), (flat, 0, 0.51, 1), (flat, 7, 0.9999999, 0.9)]
    cases += [
        (signed, 3, 0.3, 0),
        (signed, 0, 0.7, 0),
        (signed, 4, 0.9, 0.3),
        (signed, 7, 1, 0.9),
        (signed, 5, 0.99, 0),
    ]
    rows = torch.arange(len(cases))
    logits, top_k, top_p, min_p = (torch.tensor(x) for x in zip(*cases, strict=True))
    for step in range(2):
        arguments = (logits, rows + 100 * step, rows, torch.ones(len(cases)), top_k, top_p, None, min_p)
        assert torch.equal(sample(*arguments, backend="triton")[0], sample_reference(*arguments)[0])


def test_large_vocabulary(generator, tile):
    tile(block=262_144, cut_block=262_144)
    logits = torch.randn(3, 151_936, generator=generator) * 3
    arguments = (logits, torch.arange(3), torch.arange(3), torch.ones(3), torch.tensor([0, 50, 0]))
    arguments = (*arguments, torch.tensor([0.95, 0.9, 1.0]), torch.tensor([7, 151_935]))
    ours, theirs = sample(*arguments, backend="triton"), sample_reference(*arguments)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-5, atol=1e-5)


def test_rows_without_a_distribution_or_a_token_say_so(tile):
    logits = torch.zeros(6, 100)
    logits[1, 70], logits[2, 3], logits[3] = torch.nan, torch.inf, -torch.inf
    logits = torch.cat((logits, torch.zeros(6, 60)), 1)
    logits[3] = -torch.inf
    logits[4, :128] = -torch.inf  # a whole block that holds nothing is no reason
    logits[5, 2:] = -torch.inf
    rows = torch.arange(6)
    rest = (rows, rows, torch.ones(6), torch.zeros(6).long(), torch.ones(6), torch.tensor([0, 1]))
    token, logprob, entropy = sample(logits, *rest, backend="triton")
    assert (token == -1).tolist() == [False, True, True, True, False, True]
    assert logprob.isnan().tolist() == [False, True, True, True, False, True]
    assert entropy.isnan().tolist() == [False, True, True, True, False, False]
    assert token[4] >= 128


def test_rows_depend_on_themselves_only(generator, tile):
    arguments = rows_of_every_kind(5, 150, generator, True)
    once = sample(*arguments, backend="triton")
    pick = lambda x, rows: x[rows] if len(x) == 5 else x  # noqa: E731
    for rows in (slice(0, 1), slice(2, 4)):
        part = sample(*(pick(x, rows) for x in arguments), backend="triton")
        assert all(torch.equal(x, y[rows]) for x, y in zip(part, once, strict=True))
    wide = torch.zeros(5, 152)
    wide[:, 1:-1] = arguments[0]
    assert all(map(torch.equal, sample(wide[:, 1:-1], *arguments[1:], backend="triton"), once)), "misaligned"
    assert [x.shape for x in sample(*(pick(x, slice(0)) for x in arguments), backend="triton")] == [(0,)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "v", "tma"), [(1, 3, False), (40, 300, True), (5, 1187, False)])
def test_linear_sample_equals_sample_on_its_logits(n, v, tma, dtype, generator, tile):
    tile(tma=tma)
    # Small integers: every product and sum is exact, so both see the same logits.
    hidden = torch.randint(-2, 3, (n, 40), generator=generator).to(dtype)
    weight = torch.randint(-1, 2, (v, 40), generator=generator).to(dtype)
    temperature = (0.5 + 2 * torch.rand(n, generator=generator)) * (torch.rand(n, generator=generator) > 0.2)
    rows = (torch.randint(-(2**62), 2**62, (n,), generator=generator), torch.arange(n), temperature)
    banned = None if v < 300 else torch.tensor([0, 17, v - 1])
    ours = linear_sample(hidden, weight, *rows, banned, backend="triton")
    off = torch.zeros(n, dtype=torch.int64), torch.ones(n)
    theirs = sample_reference(hidden.float() @ weight.float().T, *rows, *off, banned)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-5, atol=1e-5)
    trained = linear_logprob_entropy(
        hidden, weight, ours[0], torch.where(temperature == 0, 1.0, temperature), backend="triton"
    )
    torch.testing.assert_close(ours[1:], trained, rtol=1e-6, atol=1e-6)  # what the trainer will recompute


def test_linear_sample_follows_the_distribution(generator, tile, monkeypatch):
    tile(block_m=4096, block_n=64)
    monkeypatch.setattr(head, "MERGE_ROWS", 4096)
    n = 40_960
    weight = torch.randn(41, 16, generator=generator)
    hidden = torch.randn(1, 16, generator=generator).expand(n, -1).contiguous() / 2
    seeds = torch.randint(0, 2**62, (n,), generator=generator)
    token, *_ = linear_sample(hidden, weight, seeds, torch.zeros(n).long(), torch.full((n,), 0.8), backend="triton")
    expected = n * torch.softmax(hidden[0].double() @ weight.double().T / 0.8, 0)
    counts = torch.bincount(token, minlength=41).double()
    common = expected >= 10
    observed = torch.cat((counts[common], counts[~common].sum()[None]))
    wanted = torch.cat((expected[common], expected[~common].sum()[None]))
    keep = wanted > 0
    assert stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-7


def test_opcheck(generator, tile):
    rows = torch.arange(2)
    rest = (rows, rows, torch.ones(2))
    filters = (torch.full((2,), 7), torch.full((2,), 0.9), torch.tensor([1, 2]), torch.full((2,), 0.01))
    torch.library.opcheck(module.sample, (torch.randn(2, 30, generator=generator), *rest, *filters))
    hidden, weight = torch.randn(2, 8, generator=generator), torch.randn(30, 8, generator=generator)
    torch.library.opcheck(module.linear_sample, (hidden, weight, *rest, torch.tensor([1, 2])))
