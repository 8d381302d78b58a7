"""sample in plain torch: it defines every value that decides on a token, which the fast forms reproduce bit for bit."""

import torch


def sample_reference(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    banned: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sample in plain torch, on any device: the same tokens, bit for bit; logprob and entropy within rounding."""
    vocabulary = logits.shape[1]
    if banned is not None and ((banned < 0) | (banned >= vocabulary)).any():
        raise ValueError(f"sample: banned = {banned.tolist()} holds an id outside the vocabulary of {vocabulary}")
    if not (temperature >= 0).all():
        raise ValueError(f"sample: temperature = {temperature.tolist()} must be 0 (greedy) or above")
    greedy = temperature == 0
    z = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    peak = z.amax(1)
    if not (peak.isfinite() & ~z.isnan().any(1)).all():
        raise ValueError("sample: a row of logits holds a NaN or +inf, or only -inf: nothing can be sampled from it")

    left = z.clone()
    if banned is not None:
        left[:, banned] = -torch.inf
    if (left.amax(1) == -torch.inf).any():
        raise ValueError("sample: a row has no token left: every one is banned or has logit -inf")
    noisy = truncate(left, top_k, top_p, min_p)
    noisy = noisy + gumbel_noise(seeds, positions, vocabulary)
    token = _first_argmax(torch.where(greedy[:, None], left, noisy))

    logp = torch.log_softmax(z.double(), dim=-1)
    entropy = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)
    return token, logp.gather(1, token[:, None])[:, 0].float(), entropy.float()


def truncate(
    z: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [B, V] at the sampling temperature, -inf where min-p, top-k and top-p, in this order, remove a token."""
    if min_p is not None:
        if not ((min_p >= 0) & (min_p <= 1)).all():
            raise ValueError(f"sample: min_p = {min_p.tolist()} must lie in [0, 1], where 0 is off")
        z = z.masked_fill(_exp(z - z.amax(1, keepdim=True)) < min_p[:, None], -torch.inf)
    return _keep_top_p(_keep_top_k(z, top_k), top_p)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """[B, V] fp32 standard Gumbel variables for (seed, position, token), all [B] int64.

    Token t takes word t % 4 of Philox4x32-10 with key (seed low, seed high) and counter (t // 4, 0, position low,
    position high). A word w is v = (w + 1/2) / 2³² in fp32, kept below 1, and the noise −log(−log(1 − v)). Steps are
    fine at small v, where the large values come from (up to 22.9); the smallest value is −2.8. The logarithms are
    written out in fp32 operations that are rounded once each, so that no two machines or libraries differ.
    """
    low, high = (lambda x: x & 0xFFFFFFFF), (lambda x: (x >> 32) & 0xFFFFFFFF)
    blocks = torch.arange((vocabulary + 3) // 4, device=seeds.device)[None]
    zero = torch.zeros_like(blocks)
    p, s = positions[:, None], seeds[:, None]
    words = torch.stack(philox4x32((blocks, zero, low(p) + zero, high(p) + zero), (low(s), high(s))), dim=-1)
    words = words.flatten(1)[:, :vocabulary]
    v = ((words >> 16).float() * 65536.0 + (words & 0xFFFF).float() + 0.5) * 2.0**-32
    v = v.clamp(max=1 - 2.0**-24)
    k, m = _split(1.0 - v)
    exponential = -(k * _LN2 + _log_near_one(torch.where(k == 0, -v, m - 1.0)))
    k, m = _split(exponential)
    return -(k * _LN2 + _log_near_one(m - 1.0))


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), words in int64."""
    a, b, c, d = counter
    key0, key1 = key
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57  # int64 wraps, which leaves all 64 bits right
        a = ((y >> 32) & 0xFFFFFFFF) ^ b ^ key0
        c = ((x >> 32) & 0xFFFFFFFF) ^ d ^ key1
        b, d = y & 0xFFFFFFFF, x & 0xFFFFFFFF
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return a, b, c, d


_LN2 = 0.6931471824645996


def _log_near_one(f: torch.Tensor) -> torch.Tensor:
    """log(1 + f) for |f| <= 0.42, as 2 atanh(f / (2 + f))."""
    s = f / (f + 2.0)
    z = s * s
    p = torch.full_like(z, 2 / 9)
    for coefficient in (2 / 7, 2 / 5, 2 / 3, 2.0):
        p = p * z + coefficient
    return s * p


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x = 2^k m with m in [sqrt(1/2), sqrt(2))."""
    bits = x.contiguous().view(torch.int32)
    k = (bits - 0x3F3504F3) >> 23
    return k.float(), (bits - (k << 23)).view(torch.float32)


def _exp(x: torch.Tensor) -> torch.Tensor:
    """e^x for x <= 0: exp8 of csrc/cpu/common.h, operation by operation."""
    c = x.clamp(min=-87.33654)
    shifted = c * 1.4426950408889634 + 12582912.0
    n = shifted - 12582912.0
    r = c - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + coefficient
    p = p * (r * r) + r + 1.0
    e = n.int()
    half = e >> 1
    y = p * ((half + 127) << 23).view(torch.float32) * ((e - half + 127) << 23).view(torch.float32)
    return torch.where(x < -87.33654, 0.0, y)


def _keep_top_k(z: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    active = (top_k > 0) & (top_k < z.shape[1])
    kth = torch.where(active, top_k, z.shape[1]) - 1
    threshold = z.sort(dim=1, descending=True).values.gather(1, kth[:, None])
    return z.masked_fill(z < threshold, -torch.inf)


def _keep_top_p(z: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Masses are integers, in units of 2⁻⁴⁰ of the largest: their sums do not depend on the order of adding."""
    weight = (_exp(z - z.amax(1, keepdim=True)) * 2.0**40).long()
    order = (z + 0.0).sort(dim=1, descending=True, stable=True).indices
    sorted_weight = weight.gather(1, order)
    before = sorted_weight.cumsum(1) - sorted_weight
    need = top_p.double() * weight.sum(1).double()
    drop = (before.double() >= need[:, None]) & (top_p < 1)[:, None]
    drop[:, 0] = False
    return z.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)


def _first_argmax(x: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(x.shape[1], device=x.device)
    return torch.where(x == x.amax(1, keepdim=True), ids, x.shape[1]).amin(1)
