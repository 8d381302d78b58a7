"""The model's projections."""

from torch import Tensor, nn

from kernels import linear


class Linear(nn.Linear):
    """nn.Linear by `kernels.linear`: without a gradient, on a CPU, a row's bits do not depend on the batch."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
