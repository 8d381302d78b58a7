"""One decoder-like block of the element-wise kernels under torch.compile: one graph, the same results and gradients."""

import pytest
import torch
from torch import nn

from kernels import add_rmsnorm, rmsnorm, rotary, swiglu
from kernels._library import LOADED, TRITON


class Block(nn.Module):
    def __init__(self, backend: str, g: torch.Generator):
        super().__init__()
        self.backend = backend
        self.weight = nn.Parameter(torch.randn(32, generator=g))
        self.head_weight = nn.Parameter(torch.randn(8, generator=g))
        self.project = nn.Parameter(torch.randn(64, 32, generator=g) / 6)

    def forward(self, x, residual, cos, sin):
        x, residual = add_rmsnorm(x, residual, self.weight, 1e-6, backend=self.backend)
        gate, up = (x @ self.project.T).chunk(2, -1)
        x = swiglu(gate, up, backend=self.backend)
        heads = rmsnorm(x.view(-1, 4, 8)[:, :3], self.head_weight, 1e-6, backend=self.backend)
        q, k = rotary(heads[:, :2], heads[:, 2:], cos, sin, backend=self.backend)
        return q.sum(1) * k[:, 0], residual


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("cpp", marks=pytest.mark.skipif(not LOADED, reason="the C++ kernels are not built")),
        pytest.param("triton", marks=pytest.mark.skipif(not TRITON, reason="triton is not installed")),
    ],
)
def test_one_graph(backend, generator):
    block = Block(backend, generator)
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x, residual = (torch.randn(tokens, 32, generator=generator).requires_grad_() for _ in range(2))
        angle = torch.rand(tokens, 4, generator=generator)
        leaves = [x, residual, *block.parameters()]
        results = []
        for f in (block, compiled):
            y, total = f(x, residual, angle.cos(), angle.sin())
            results.append((y, total, *torch.autograd.grad(y.square().sum() + total.sum(), leaves)))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-5)
