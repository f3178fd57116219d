"""However products of float32 are made on this machine's processor, they have the errors of float32."""

import pytest
import torch

from minitron.runtime import resolve_device


@pytest.mark.parametrize("shape", [(64, 96, 80), (512, 576, 1536)])
def test_products_of_float32_round_no_operands(shape: tuple[int, int, int]) -> None:
    """The control rounds them to bfloat16, as PyTorch allows oneDNN to do where we ask for it."""
    resolve_device("cpu")
    generator = torch.Generator().manual_seed(0)
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    exact = a.double() @ b.double()
    assert ((a @ b) - exact).norm() < 1e-6 * exact.norm()
    assert (torch.nn.functional.linear(a, b.T) - exact).norm() < 1e-6 * exact.norm()
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert (rounded - exact).norm() > 1e-4 * exact.norm()
