"""Products over packed weights, against fp64."""

import pytest
import torch

from kernels._library import LOADED, MODE
from kernels.packed import pack_panels, packed_linear

pytestmark = pytest.mark.skipif(not LOADED or MODE == "reference", reason="the C++ kernels are not built")


@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(1, 32, 16), (7, 33, 5), (8, 48, 128), (61, 300, 96), (0, 40, 8)]
)
def test_a_product_is_right_and_a_row_is_its_own(rows: int, columns: int, inner: int) -> None:
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    panels = pack_panels(weight)
    out = packed_linear(x, panels, columns)
    torch.testing.assert_close(out, (x.double() @ weight.double().T).float(), atol=1e-5 * inner**0.5, rtol=1e-5)
    for row in range(rows):
        assert torch.equal(packed_linear(x[row : row + 1], panels, columns)[0], out[row])


def test_a_product_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="packed_linear"):
        packed_linear(torch.randn(2, 16), pack_panels(torch.randn(32, 17)), 32)
