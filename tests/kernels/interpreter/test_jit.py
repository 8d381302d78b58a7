"""kernels._triton: one function compiled and interpreted in one process, and the frozen tile sizes."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from kernels import _triton  # noqa: E402
from kernels._library import choose  # noqa: E402
from kernels._triton import jit, tiles  # noqa: E402
from kernels.aot import AotCase, compile_case  # noqa: E402


@jit
def _mean(x, n):
    return tl.sum(x, 0) / n


@jit
def _centre(x, y, n, BLOCK: tl.constexpr):
    """y = (x − mean) · max, with helpers of this file, of triton's own library, and a method."""
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    peak = tl.max(tl.where(i < n, v, -float("inf")), 0)
    tl.store(y + i, (v - _mean(v, n) + 0 * v.sum(0)) * peak, mask=i < n)


@jit(fp_fusion=False)
def _multiply_add(a, b, c, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(a + i) * tl.load(b + i) + tl.load(c + i))


@jit
def _round_and_multiply(a, b, rounded, product, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    x = tl.load(a + at).to(tl.bfloat16)
    tl.store(rounded + at, x)
    tl.store(product + at, tl.dot(x, tl.load(b + at)))


def test_bf16_rounds_and_multiplies_as_on_a_gpu(generator):
    a = torch.randn(16, 16, generator=generator) * 10.0 ** torch.randint(-38, 38, (16, 16), generator=generator)
    a[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 3.4e38, 1e-45])
    b = torch.randn(16, 16, generator=generator).bfloat16()
    rounded, product = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    _round_and_multiply[(1,)](a, b, rounded, product, BLOCK=16)
    torch.testing.assert_close(rounded, a.bfloat16(), rtol=0, atol=0, equal_nan=True)
    _round_and_multiply[(1,)](b.float(), b, rounded, product, BLOCK=16)
    torch.testing.assert_close(product, b.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_and_compiled_in_one_process(dtype, generator):
    case = AotCase("centre", _centre, {"x": "*bf16", "y": "*fp32", "n": "i32", "BLOCK": 256})
    for _ in range(2):  # neither way may leave something behind for the other
        x = torch.randn(200, generator=generator).to(dtype)
        y = torch.full((200,), torch.nan)
        _centre[(1,)](x, y, 200, BLOCK=256, num_warps=4)
        wide = x.double()
        torch.testing.assert_close(y.double(), (wide - wide.mean()) * wide.max(), rtol=1e-5, atol=1e-5)
        assert compile_case(case).instructions > 10
        with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
            _mean(1.0, 2)


def test_an_error_in_a_kernel_leaves_the_language_compiled(generator):
    x = torch.randn(8, generator=generator)
    with pytest.raises(Exception, match=r"missing|required|BLOCK"):
        _centre[(1,)](x, x, 8)
    with pytest.raises(ValueError, match="Did you forget"):
        tl.arange(0, 4)


def test_fusion_is_off_where_asked():
    signature = dict.fromkeys("abcy", "*fp32") | {"BLOCK": 128}
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def fused(fp_fusion: bool) -> bool:
        types = {k: "constexpr" if k == "BLOCK" else v for k, v in signature.items()}
        source = ASTSource(fn=_multiply_add, signature=types, constexprs={"BLOCK": 128})
        options = {"enable_fp_fusion": fp_fusion}
        return "fma" in triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

    assert fused(True) and not fused(_multiply_add.fp_fusion)


def test_explicit_triton_serves_cpu_tensors_and_nothing_else_unknown():
    assert choose("op", "triton", torch.ones(1)) == "triton"
    with pytest.raises(ValueError, match="CUDA tensors"):
        choose("op", "triton", torch.ones(1, device="meta"))
    with pytest.raises(ValueError, match="does not know"):
        choose("op", "triton", torch.ones(1), triton=False)


def test_tiles_of_an_architecture_override_the_default(tmp_path, monkeypatch):
    file = tmp_path / "tiles.toml"
    file.write_text("[default.op]\nrows = 1\nwarps = 4\n[sm_90.op]\nwarps = 8\n")
    monkeypatch.setattr(_triton, "TILES", file)
    _triton._tiles.cache_clear()
    try:
        assert dict(tiles("op", "sm_90")) == {"rows": 1, "warps": 8}
        assert dict(tiles("op", torch.device("cpu"))) == dict(tiles("op", "sm_80")) == {"rows": 1, "warps": 4}
        with pytest.raises(KeyError, match=r"default\.other"):
            tiles("other", "sm_90")
    finally:
        _triton._tiles.cache_clear()
