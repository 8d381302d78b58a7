"""Computes products of bf16 in a process of its own, as AXPO_AMX is read once. python matrix_worker.py OUT TRAP SEED

Writes the results to OUT (torch.save). TRAP: the library of amx_trap.c, for AMX instructions on a processor without
them; "" for none.
"""

import ctypes
import sys

import torch

from kernels import linear, paged_attention, paged_plan

KINDS = ("ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps")
# Query heads, KV heads, D, block size, sequences, own keys behind the shared prefix.
ATTENTION = {
    "one tile": (4, 2, 64, 16, 1, 1),
    "octets apart": (2, 1, 64, 8, 3, 21),
    "128": (16, 2, 128, 16, 5, 40),
    "many rows": (8, 1, 32, 16, 13, 70),
    "more heads than a tile": (50, 1, 96, 8, 2, 9),
}
LINEAR = ((1, 16, 32), (3, 33, 65), (16, 32, 64), (17, 70, 100), (40, 50, 31), (300, 9, 40))  # rows, N, K
QUERIES = 20  # the last ones of a prompt


def cached(q_heads, kv_heads, dim, block_size, sequences, tail, prefix=300):
    """Forks of a prefix, each with keys of its own: q of one query each, caches, tables, starts, lengths."""
    shared, own = prefix // block_size, -(-tail // block_size) + 1
    tables = torch.empty(sequences, shared + own, dtype=torch.int32)
    order = torch.randperm(shared + sequences * own).int()
    tables[:, :shared] = order[:shared]
    tables[:, shared:] = order[shared:].view(sequences, own)
    k, v = (torch.randn(len(order), kv_heads, block_size, dim).bfloat16() for _ in range(2))
    lengths = (shared * block_size + torch.arange(sequences) % tail + 1).int()
    for s, length in enumerate(lengths.tolist()):  # what lies behind a sequence must not matter
        block, offset = tables[s, (length - 1) // block_size], (length - 1) % block_size + 1
        k[block, :, offset:], v[block, :, offset:] = torch.nan, torch.nan
    return torch.randn(sequences, q_heads, dim).bfloat16(), k, v, tables, torch.arange(sequences + 1).int(), lengths


def attention_cases(name, shape):
    q, k, v, tables, starts, lengths = cached(*shape)
    scale = shape[2] ** -0.5
    plans = {share: paged_plan(tables, starts, lengths, shape[0], k, share=share) for share in (True, False)}
    yield f"{name}/shared", paged_attention(q, k, v, tables, starts, lengths, scale, plans[True])
    yield f"{name}/unshared", paged_attention(q, k, v, tables, starts, lengths, scale, plans[False])
    alone = [
        paged_attention(q[s : s + 1], k, v, tables[s : s + 1], starts[:2], lengths[s : s + 1], scale)
        for s in range(len(q))
    ]
    yield f"{name}/alone", torch.cat(alone)
    tokens = int(lengths[0])
    prompt = torch.randn(QUERIES, shape[0], shape[2]).bfloat16()

    def queries(begin, stop):
        ends = [0, stop - begin], [tokens - QUERIES + stop]
        starts_here, length = (torch.tensor(x, dtype=torch.int32) for x in ends)
        return paged_attention(prompt[begin:stop], k, v, tables[:1], starts_here, length, scale)

    yield f"{name}/whole", queries(0, QUERIES)
    yield f"{name}/chunks", torch.cat([queries(0, 1), queries(1, 8), queries(8, QUERIES)])
    exact = (x.nan_to_num().double() for x in (q, k, v))
    yield f"{name}/exact", paged_attention(*exact, tables, starts, lengths, scale, backend="reference")


def linear_cases(rows, n, k):
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((rows, k), (n, k), (n,)))
    x[0, 0], weight[0, 0] = 2.0**-130, 2.0**100  # a denormal counts as zero
    small = torch.full((rows, k), 2.0**-70).bfloat16()
    name = f"linear {rows} {n} {k}"
    yield f"{name}/together", linear(x, weight, bias, wide=True)
    some = range(0, rows, 1 + rows // 8)
    yield f"{name}/some", linear(x, weight, bias, wide=True)[:: some.step]
    yield f"{name}/alone", torch.cat([linear(x[r : r + 1], weight, bias, wide=True) for r in some])
    yield f"{name}/narrow", linear(x, weight, bias)
    yield f"{name}/flushed", linear(small, small[:1].expand(n, k).contiguous(), wide=True)
    x[0, 0] = 0
    yield f"{name}/exact", x.double() @ weight.double().T + bias.double()
    yield f"{name}/size", x.double().abs() @ weight.double().abs().T + bias.double().abs()


def main(out: str, trap: str | None = None) -> None:
    library = ctypes.CDLL(trap) if trap else None
    if library:
        library.amx_trap()
    torch.set_num_threads(1)
    torch.manual_seed(int(sys.argv[3]))
    found = {}
    for name, shape in ATTENTION.items():
        found |= dict(attention_cases(name, shape))
    for shape in LINEAR:
        found |= dict(linear_cases(*shape))
    library_counts = {kind: library.amx_trapped(i) for i, kind in enumerate(KINDS)} if library else {}
    torch.save({"found": found, "trapped": library_counts, "why_not": torch.ops.axpo.why_not_amx()}, out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] or None)
