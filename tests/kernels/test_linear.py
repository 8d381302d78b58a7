"""linear against fp64, and against itself under other threads, batches, strides and places in the batch."""

import pytest
import torch

from kernels._library import LOADED
from kernels.linear import linear, linear_reference

pytestmark = pytest.mark.usefixtures("poisoned")
needs_library = pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")
DTYPES = (torch.float32, torch.bfloat16)
# Rows, N, K: tails of every size of a tile, of a vector and of the depth that is packed at once.
SHAPES = [
    (1, 1, 1), (1, 40, 129), (2, 31, 127), (3, 64, 33), (6, 33, 256), (7, 7, 300), (9, 100, 64), (13, 96, 31),
    (16, 257, 128), (33, 65, 144), (257, 34, 17), (520, 40, 130),
]  # fmt: skip


def error(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """The largest difference from fp64, in units of Σ |x w|."""
    exact = linear_reference(x.double(), weight.double(), None if bias is None else bias.double())
    size = linear_reference(x.double().abs(), weight.double().abs()).clamp(min=1e-30)
    return ((actual.double() - exact).abs() / (size + (0 if bias is None else bias.double().abs()))).max().item()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_fp64(shape, dtype, generator):
    rows, n, k = shape
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((rows, k), (n, k), (n,)))
    rounding = 0.0 if dtype == torch.float32 else 2.0**-8
    assert error(linear(x, weight, backend="cpp"), x, weight) < rounding + 1e-6
    assert error(linear(x, weight, bias, backend="cpp"), x, weight, bias) < rounding + 1e-6
    logits = linear(x, weight, bias, wide=True, backend="cpp")
    assert logits.dtype == torch.float32 and error(logits, x, weight, bias) < 1e-6


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_leading_dimensions(dtype, generator):
    """Views give the bits of their copies: rows of a wider weight, a transposed weight, strided and misaligned x."""
    x = torch.randn(4, 5, 2, 77, generator=generator).to(dtype)[:, :, 1, 1:]
    for weight in (
        torch.randn(70, 101, generator=generator).to(dtype)[3:, 5:81],
        torch.randn(76, 67, generator=generator).to(dtype).T,
    ):
        expected = linear(x.contiguous().view(20, 76), weight.contiguous())
        assert torch.equal(linear(x, weight).view(20, 67), expected)
        assert error(expected, x.reshape(20, 76), weight) < 2.0**-7
    assert linear(x[:0], x[0, :, :]).shape == (0, 5, 5)
    assert linear(x[0], x[0, :0]).shape == (5, 0)
    assert torch.equal(linear(x[0, :, :0], x[1, :, :0]), torch.zeros(5, 5, dtype=dtype))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(dtype, generator, with_threads):
    """Bitwise: any number of rows, any place among them, any number of threads, any part of the weight."""
    x, weight, bias = (torch.randn(*s, generator=generator).to(dtype) for s in ((300, 200), (150, 200), (150,)))
    for wide in (False, True):
        once = linear(x, weight, bias, wide=wide)
        for threads in (1, 2, 3):
            run = with_threads(threads, lambda wide=wide: linear(x, weight, bias, wide=wide))
            assert torch.equal(run, once), f"{threads} threads"
        for start, stop in ((0, 1), (7, 8), (5, 11), (100, 117), (3, 260), (255, 300)):
            assert torch.equal(linear(x[start:stop], weight, bias, wide=wide), once[start:stop]), (start, stop)
        order = torch.randperm(300, generator=generator)
        assert torch.equal(linear(x[order], weight, bias, wide=wide), once[order])
        assert torch.equal(linear(x, weight[40:103], bias[40:103], wide=wide), once[:, 40:103])


@needs_library
def test_a_result_is_one_chain_over_k(generator):
    """What makes bits equal on any processor with fused multiply-add: the chain, written out in exact arithmetic."""
    x, weight = torch.randn(2, 40, generator=generator), torch.randn(3, 40, generator=generator)
    chain = torch.zeros(2, 3)
    for k in range(40):  # fp64 holds a product of two fp32 exactly, and the sum before it is rounded nearly always
        chain = (x[:, k, None].double() * weight[:, k].double() + chain.double()).float()
    assert (linear(x, weight) == chain).float().mean() == 1


@needs_library
def test_special_values():
    x = torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0], [3.0e38, 3.0e38]])
    weight = torch.tensor([[1.0, 1.0]])
    assert linear(x, weight)[:, 0].tolist()[0] == torch.inf and linear(x, weight)[1].isnan().all()
    assert linear(x, weight)[2].isinf().all()
    narrow = linear(x.bfloat16(), weight.bfloat16())
    assert narrow[0] == torch.inf and narrow[1].isnan() and narrow[2].isinf()
    ties = torch.tensor([[1.0, 2.0**-8], [1.0, 3 * 2.0**-8]]).bfloat16()  # to even: down, and up
    assert linear(ties, torch.ones(1, 2).bfloat16())[:, 0].tolist() == [1.0, 1.0 + 2.0**-6]


def test_gradients_go_through_torch(generator):
    x, weight = (torch.randn(5, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(linear, (x.requires_grad_(), weight.requires_grad_()))
    narrow = weight.detach().float().requires_grad_()
    y = linear(x.detach().float(), narrow)
    y.sum().backward()
    assert narrow.grad is not None
    if LOADED:
        with pytest.raises(ValueError, match="linear: backend='cpp' cannot serve this call"):
            linear(x.detach().float(), narrow, backend="cpp")
        with torch.no_grad():
            torch.testing.assert_close(linear(x.float(), narrow, backend="cpp"), y.detach())


def test_the_reference_serves_every_dtype(generator):
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((3, 8), (5, 8), (5,)))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        a, b, c = x.to(dtype), weight.to(dtype), bias.to(dtype)
        assert linear(a, b, c, backend="reference").dtype == dtype
        wide = linear(a, b, c, wide=True, backend="reference")
        assert wide.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(wide.double(), linear(a.double(), b.double(), c.double()), rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"x \[2, 5\] and weight \[3, 4\] must be \[..., K\] and \[N, K\]"):
        linear(torch.ones(2, 5), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"bias \[2\] needs one entry for each of the 3 rows"):
        linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(2))
    with pytest.raises(ValueError, match="linear: backend='triton' cannot serve this call"):
        linear(torch.ones(2, 4), torch.ones(3, 4), backend="triton")


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, generator):
    x, weight = (torch.randn(3, 24, generator=generator).to(dtype) for _ in range(2))
    torch.library.opcheck(torch.ops.axpo.linear.default, (x, weight, None, False))
    torch.library.opcheck(torch.ops.axpo.linear.default, (x, weight, weight[0, :3].contiguous(), True))
