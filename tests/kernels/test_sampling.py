"""sample against published Philox vectors, exact distributions, a sort-based top-p oracle, and its own reference."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from kernels._library import LOADED
from kernels.linear import linear
from kernels.sampling import (
    gumbel_noise,
    linear_sample,
    linear_sample_reference,
    philox4x32,
    sample,
    sample_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned")
needs_library = pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")
# Chance of a false alarm of each statistical test.
ALARM = 1e-7


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, banned=None, seeds=None, positions=None, f=sample, min_p=None):
    """f with scalars broadcast over the rows; seeds 0, 1, … unless given."""
    b = len(logits)
    return f(
        logits,
        torch.arange(b) if seeds is None else seeds,
        torch.zeros(b, dtype=torch.int64) if positions is None else positions,
        torch.as_tensor(temperature, dtype=torch.float32).expand(b),
        torch.as_tensor(top_k).expand(b),
        torch.as_tensor(top_p, dtype=torch.float32).expand(b),
        banned,
        None if min_p is None else torch.as_tensor(min_p, dtype=torch.float32).expand(b),
    )


def assert_follows(tokens: torch.Tensor, probabilities: torch.Tensor, what: str) -> None:
    """Chi-square of the draws against the distribution; what has no probability must not be drawn."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert not counts[probabilities == 0].any(), f"{what}: drew a token of probability 0"
    expected = probabilities.double() * len(tokens)
    rare = (expected > 0) & (expected < 10)
    observed = torch.cat((counts[expected >= 10], counts[rare].sum()[None]))
    wanted = torch.cat((expected[expected >= 10], expected[rare].sum()[None]))
    keep = wanted > 0
    if keep.sum() == 1:
        return
    p = stats.chisquare(observed[keep], wanted[keep] * observed[keep].sum() / wanted[keep].sum()).pvalue
    assert p > ALARM, f"{what}: chi-square p = {p:.1e}"


def test_philox_known_answers():
    """The vectors published with Random123 for philox4x32-10."""
    f, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, answer in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((f, f, f, f), (f, f), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert tuple(int(w) for w in words) == answer


def test_noise_is_gumbel_of_the_documented_words(generator):
    seeds = torch.tensor([0, 1, -1, 2**62 + 12345])
    positions = torch.tensor([0, 7, 2**32 + 5, 2**40])
    noise = gumbel_noise(seeds, positions, 1001)
    for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        for token in (0, 1, 2, 3, 4, 503, 1000):
            counter = (token // 4, 0, position & 0xFFFFFFFF, position >> 32)
            key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
            word = int(philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))[token % 4])
            exact = -math.log(-math.log1p(-(word + 0.5) / 2**32))
            assert abs(float(noise[row, token]) - exact) < 2e-6 * max(1, abs(exact)), (row, token)
    many = gumbel_noise(torch.randint(0, 2**62, (200,), generator=generator), torch.arange(200), 2000).flatten()
    assert many.isfinite().all()
    assert stats.kstest(many.double().numpy(), "gumbel_r").pvalue > ALARM


@needs_library
def test_tokens_equal_the_reference_bit_for_bit(generator):
    """100,000 rows of every kind: same token, logprob and entropy within rounding."""
    rows = 0
    while rows < 100_000:
        b, v = 2500, (1, 3, 63, 64, 65, 127, 128, 129)[rows // 2500 % 8]
        logits = torch.randn(b, v, generator=generator) * torch.tensor([0.0, 0.1, 2.0, 30.0])[torch.arange(b) % 4, None]
        logits[::5] = (logits[::5] * 2).round() / 2  # many ties
        logits[1::6] += 1000
        logits[2::7, :: max(v - 1, 2)] = -torch.inf
        logits[:, v // 2] = torch.where(logits.isinf().all(1), 0.0, logits[:, v // 2])
        arguments = (
            logits,
            torch.randint(-(2**62), 2**62, (b,), generator=generator),
            torch.randint(0, 2**40, (b,), generator=generator),
            2 * torch.rand(b, generator=generator) * (torch.rand(b, generator=generator) > 0.1),
            torch.randint(0, v + 2, (b,), generator=generator) * torch.randint(0, 2, (b,), generator=generator),
            (torch.rand(b, generator=generator) * 1.5).clamp(max=1),
            torch.tensor([1, 5, 60]) if rows % 5000 and v > 61 else None,
            torch.rand(b, generator=generator).square() * torch.randint(0, 2, (b,), generator=generator)
            if rows % 7500
            else None,
        )
        ours, theirs = sample(*arguments), sample_reference(*arguments)
        assert torch.equal(ours[0], theirs[0]), f"V = {v}: rows {(ours[0] != theirs[0]).nonzero().flatten().tolist()}"
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-5)
        rows += b


@needs_library
def test_large_vocabulary_equals_the_reference(generator):
    logits = torch.randn(2, 151_936, generator=generator) * 3
    for options in (
        {},
        {"min_p": 0.01},
        {"top_k": 50},
        {"top_p": 0.95},
        {"top_k": 1000, "top_p": 0.5},
        {"temperature": 0.0},
    ):
        ours, theirs = draw(logits, **options), draw(logits, **options, f=sample_reference)
        assert torch.equal(ours[0], theirs[0]), options
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("f", [sample, sample_reference])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_distribution(f, temperature, generator):
    logits = torch.randn(41, generator=generator) * 2
    n = 100_000 if f is sample else 20_000
    expected = torch.softmax(logits.double() / temperature, -1)
    seeds = torch.randint(0, 2**62, (n,), generator=generator)
    assert_follows(draw(logits.expand(n, -1), temperature, seeds=seeds, f=f)[0], expected, "seeds")
    same_seed = torch.full((n,), int(seeds[0]))
    tokens = draw(logits.expand(n, -1), temperature, seeds=same_seed, positions=torch.arange(n), f=f)[0]
    assert_follows(tokens, expected, "positions of one seed")


def test_neighbouring_draws_are_independent(generator):
    logits = torch.randn(6, generator=generator).expand(60_000, -1)
    seeds, positions = torch.arange(60_000), torch.full((60_000,), 3)
    here = draw(logits, seeds=seeds, positions=positions)[0]
    for what, other in (
        ("next position", draw(logits, seeds=seeds, positions=positions + 1)[0]),
        ("next seed", draw(logits, seeds=seeds + 1, positions=positions)[0]),
        ("position in the high word", draw(logits, seeds=seeds, positions=positions + 2**32)[0]),
        ("seed in the high word", draw(logits, seeds=seeds + 2**32, positions=positions)[0]),
    ):
        table = np.zeros((6, 6))
        np.add.at(table, (here.numpy(), other.numpy()), 1)
        assert stats.chi2_contingency(table).pvalue > ALARM, what


def oracle_set(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> set[int]:
    """Sort, cut after top_k, renormalise, keep while the mass before a token is below top_p."""
    p = torch.softmax(logits.double() / temperature, -1)
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or None]
    total, before, kept = sum(p[i] for i in order), 0.0, set()
    for i in order:
        if kept and before >= top_p * total:
            break
        kept.add(i)
        before += p[i]
    return kept


@pytest.mark.parametrize("f", [sample, sample_reference])
def test_top_k_and_top_p_match_a_sort(f, generator):
    """Every allowed token is drawn in the end, with its renormalised probability, and no other."""
    for top_k, top_p in (
        (1, 1.0),
        (5, 1.0),
        (0, 0.3),
        (0, 0.7),
        (0, 0.999),
        (6, 0.6),
        (3, 1e-9),
        (100, 0.5),
        (12, 0.99),
    ):
        logits, temperature = torch.randn(12, generator=generator), 0.5 + float(torch.rand((), generator=generator))
        kept = oracle_set(logits, temperature, top_k, top_p)
        p = torch.softmax(logits.double() / temperature, -1)
        p = torch.where(torch.tensor([i in kept for i in range(12)]), p, 0)
        seeds = torch.randint(0, 2**62, (20_000,), generator=generator)
        tokens, logprob, _ = draw(logits.expand(20_000, -1), temperature, top_k, top_p, seeds=seeds, f=f)
        assert_follows(tokens, p / p.sum(), f"top_k {top_k}, top_p {top_p}")
        assert set(tokens[p[tokens] / p.sum() > 0.01].tolist()) == {i for i in kept if p[i] / p.sum() > 0.01}
        full = torch.log_softmax(logits.double() / temperature, -1)
        torch.testing.assert_close(logprob.double(), full[tokens], rtol=1e-5, atol=1e-5)  # untruncated


@pytest.mark.parametrize("f", [sample, sample_reference])
def test_min_p_leaves_before_top_k_and_top_p(f, generator):
    """0.4, 0.3, 0.2, 0.1 with min-p 0.3 leaves the first three, of which the first two hold 0.7 / 0.9 > 0.75."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20_000, -1)
    seeds = torch.randint(0, 2**62, (20_000,), generator=generator)
    for options, kept in (
        ({"min_p": 0.3}, [0.4, 0.3, 0.2, 0]),
        ({"min_p": 0.3, "top_p": 0.75}, [0.4, 0.3, 0, 0]),
        ({"min_p": 0.0, "top_p": 0.75}, [0.4, 0.3, 0.2, 0]),
        ({"min_p": 0.3, "top_k": 2}, [0.4, 0.3, 0, 0]),
        ({"min_p": 1.0}, [0.4, 0, 0, 0]),
        ({"min_p": 0.7, "banned": torch.tensor([0])}, [0, 0.3, 0, 0]),  # of the most probable one left
    ):
        p = torch.tensor(kept)
        token, logprob, _ = draw(logits, **options, seeds=seeds, f=f)
        assert_follows(token, p / p.sum(), str(options))
        torch.testing.assert_close(logprob, logits[0][token], rtol=1e-5, atol=1e-5)  # untruncated
    with pytest.raises(ValueError, match="min_p"):
        draw(logits[:2], min_p=1.5, f=f)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 300])
def test_linear_sample_is_sample_of_the_logits(rows, dtype, generator):
    # Small integers: every product and sum is exact, so all see the same logits.
    hidden = torch.randint(-2, 3, (rows, 24), generator=generator).to(dtype)
    weight = torch.randint(-1, 2, (5000, 24), generator=generator).to(dtype)
    seeds, positions = torch.randint(0, 2**62, (rows,), generator=generator), torch.arange(rows)
    temperature = 2 * torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) > 0.2)
    banned = torch.tensor([0, 4999])
    off = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
    expected = sample(hidden.float() @ weight.float().T, seeds, positions, temperature, *off, banned)
    for f in (linear_sample, linear_sample_reference):
        results = f(hidden, weight, seeds, positions, temperature, banned)
        assert torch.equal(results[0], expected[0])
        torch.testing.assert_close(results[1:], expected[1:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="seeds"):
        linear_sample(hidden, weight, seeds[:, None], positions, temperature)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_sample_has_the_bits_of_sample_on_linear_logits(dtype, generator, with_threads):
    """Any vocabulary, any rows, any threads: so a row does not depend on what others in its batch ask for."""
    for rows, vocabulary in ((1, 7), (5, 1024), (140, 2500), (17, 1025)):
        hidden = torch.randn(rows, 40, generator=generator).to(dtype)
        weight = torch.randn(vocabulary, 40, generator=generator).to(dtype)
        seeds, positions = torch.randint(0, 2**62, (rows,), generator=generator), torch.arange(rows)
        temperature = 2 * torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) > 0.3)
        off, banned = (torch.zeros(rows, dtype=torch.int64), torch.ones(rows)), torch.tensor([3, vocabulary - 1])
        logits = linear(hidden, weight, wide=True)
        expected = sample(logits, seeds, positions, temperature, *off, banned)
        arguments = hidden, weight, seeds, positions, temperature
        for threads in (1, 2, 3):
            ours = with_threads(threads, lambda a=arguments, b=banned: linear_sample(*a, b, backend="cpp"))
            assert all(map(torch.equal, ours, expected)), (rows, vocabulary, threads)
        half = [x[rows // 2 :] if len(x) == rows and x is not weight else x for x in arguments]
        assert all(torch.equal(a, b[rows // 2 :]) for a, b in zip(linear_sample(*half, banned), expected, strict=True))


@needs_library
def test_linear_sample_names_what_cannot_be_sampled(generator):
    hidden, weight = torch.randn(3, 8, generator=generator), torch.randn(1500, 8, generator=generator)
    rows = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="row 1 of logits holds a NaN"):
        broken = hidden.clone()
        broken[1, 0] = torch.nan
        linear_sample(broken, weight, *rows, torch.ones(3))
    with pytest.raises(ValueError, match="row 0 has no token left"):
        linear_sample(hidden, weight, *rows, torch.ones(3), torch.arange(1500))
    with pytest.raises(ValueError, match=r"banned\[0\] = 1500 is outside the vocabulary of 1500"):
        linear_sample(hidden, weight, *rows, torch.ones(3), torch.tensor([1500]))
    with pytest.raises(ValueError, match=r"temperature\[0\] = -1 must be 0"):
        linear_sample(hidden, weight, *rows, -torch.ones(3))
    rest = *rows, torch.ones(3), torch.tensor([1, 2])
    torch.library.opcheck(torch.ops.axpo.linear_sample_cpu.default, (hidden, weight, *rest))


@pytest.mark.parametrize("f", [sample, sample_reference])
def test_ties(f):
    flat = torch.zeros(4000, 8)
    assert set(draw(flat, top_k=3, f=f)[0].tolist()) == set(range(8))  # all tie with the third
    assert set(draw(flat, top_p=0.5, f=f)[0].tolist()) == {0, 1, 2, 3}
    assert set(draw(flat, top_p=0.51, f=f)[0].tolist()) == {0, 1, 2, 3, 4}
    assert not draw(flat, temperature=0.0, f=f)[0].any()
    signed = torch.tensor([[-0.0, 0.0, -1.0]]).expand(4000, -1)  # -0 and +0 are one value
    assert set(draw(signed, top_p=0.2, f=f)[0].tolist()) == {0}


@pytest.mark.parametrize("f", [sample, sample_reference])
def test_greedy_and_banned(f, generator):
    logits = torch.randn(500, 37, generator=generator)
    best, banned = logits.argmax(1), torch.tensor([3, 20, 36])
    assert torch.equal(draw(logits, 0.0, top_k=1, top_p=0.1, f=f)[0], best)
    left = logits.index_fill(1, banned, -torch.inf)
    free = draw(logits, 0.8, f=f)
    for options in ({"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 5, "top_p": 0.6}):
        token, logprob, entropy = draw(logits, **options, banned=banned, f=f)
        assert not torch.isin(token, banned).any(), options
        # Truncation sees what the ban leaves; logprob and entropy do not see the ban.
        assert torch.equal(token, draw(left, **options, f=f)[0]), options
        full = torch.log_softmax(logits / (options["temperature"] or 1), -1)
        torch.testing.assert_close(logprob, full.gather(1, token[:, None])[:, 0], rtol=1e-5, atol=1e-5)
        if options["temperature"]:
            assert torch.equal(entropy, free[2])
    unaffected = ~torch.isin(free[0], banned)  # who had not drawn a banned token draws the same one again
    assert torch.equal(draw(logits, 0.8, banned=banned, f=f)[0][unaffected], free[0][unaffected])


@pytest.mark.parametrize("f", [sample, sample_reference])
@pytest.mark.parametrize("v", [1, 2, 127, 128, 129, 1187])
def test_logprob_and_entropy_match_fp64(f, v, generator):
    base = torch.randn(64, v, generator=generator)
    rows = {
        "gaussian": base * 3,
        "flat": torch.zeros(64, v),
        "peaked": base + 25 * torch.nn.functional.one_hot(torch.arange(64) % v, v),
        "offset 1000": (base * 8).round() / 8 + 1000,  # exact in fp32
        "offset -1000": (base * 8).round() / 8 - 1000,
        "with -inf": torch.where(torch.arange(v) % 3 == 1, -torch.inf, base),
    }
    for name, logits in rows.items():
        token, logprob, entropy = draw(logits, f=f)
        exact = torch.log_softmax(logits.double(), -1)
        expected = -(exact.exp() * exact.clamp(min=-1e30)).sum(-1)
        at_token = exact.gather(1, token[:, None])[:, 0]
        torch.testing.assert_close(logprob.double(), at_token, rtol=2e-6, atol=1e-12 if v == 1 else 1e-6, msg=name)
        torch.testing.assert_close(entropy.double(), expected, rtol=2e-6, atol=2e-6, msg=name)
        assert (logprob <= 0).all(), name
        assert (entropy >= 0).all(), name
        assert (entropy <= math.log(v) * (1 + 1e-6) + 1e-6).all(), name


def test_certain_tokens_keep_their_digits():
    """p = 1 − 6e-9 and its entropy, which sums in fp32 would round to 1 and 0."""
    logits = torch.tensor([[20.0, 0.0, 0.0, 0.0]])
    _, logprob, entropy = draw(logits, 0.0)
    exact = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(logprob.double(), exact[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(1), rtol=1e-5, atol=0)


def test_rows_depend_on_themselves_only(generator, with_threads):
    b, v = 300, 517
    logits = torch.randn(b, v, generator=generator) * 2
    seeds, positions = torch.randint(0, 2**62, (b,), generator=generator), torch.arange(b)
    temperature, top_k = 2 * torch.rand(b, generator=generator), torch.arange(b) % 9
    top_p = torch.rand(b, generator=generator)

    def run(rows=slice(None), source=logits):
        return sample(source[rows], seeds[rows], positions[rows], temperature[rows], top_k[rows], top_p[rows])

    once = run()
    for threads in (1, 2, 3):
        assert all(map(torch.equal, with_threads(threads, run), once)), f"{threads} threads"
    for rows in (slice(0, 1), slice(77, 190), torch.randperm(b, generator=generator)):
        assert all(torch.equal(x, y[rows]) for x, y in zip(run(rows), once, strict=True))
    wide = torch.zeros(b, v + 2)
    wide[:, 1:-1] = logits
    assert all(map(torch.equal, run(source=wide[:, 1:-1]), once)), "strided and misaligned"
    assert all(map(torch.equal, run(source=logits.T.contiguous().T), once)), "transposed"


@pytest.mark.parametrize("f", [sample, sample_reference])
def test_empty_batch(f):
    assert [x.shape for x in draw(torch.zeros(0, 5), f=f)] == [(0,)] * 3


@pytest.mark.parametrize("f", [sample, sample_reference])
def test_rows_without_a_distribution_are_errors(f):
    for value in (torch.nan, torch.inf):
        for column in (0, 8, 16):
            logits = torch.zeros(3, 17)
            logits[1, column] = value
            with pytest.raises(ValueError, match="NaN"):
                draw(logits, f=f)
    with pytest.raises(ValueError, match="only -inf"):
        draw(torch.full((1, 9), -torch.inf), f=f)
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="no token left"):
            draw(torch.zeros(2, 3), temperature, banned=torch.arange(3), f=f)
    with pytest.raises(ValueError, match="banned"):
        draw(torch.zeros(2, 3), banned=torch.tensor([3]), f=f)
    with pytest.raises(ValueError, match="temperature"):
        draw(torch.zeros(2, 3), -1.0, f=f)


@needs_library
def test_opcheck(generator):
    arguments = (torch.randn(4, 30, generator=generator), torch.arange(4), torch.arange(4), torch.ones(4))
    truncation = (torch.full((4,), 7), torch.full((4,), 0.9), torch.tensor([1, 2]))
    torch.library.opcheck(torch.ops.axpo.sample.default, (*arguments, *truncation))
