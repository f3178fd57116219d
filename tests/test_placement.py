"""The GPU that is not there finds mixed devices where torch's own FakeTensorMode does, and leaves values alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from tests.placement import GPU, MixedDevicesError, pretended_gpu

Operation = Callable[[Tensor, Tensor], object]
"""Of two matrices (4, 4), the first of which lies on the GPU."""


def in_place(target: Tensor, value: Tensor) -> Tensor:
    target[0] = value
    return target


def numbers(matrix: Tensor) -> Tensor:
    return matrix.long() * 0


MAY_MIX: dict[str, Operation] = {
    "a number on the CPU": lambda a, b: a * b.sum(),
    "copy": lambda a, b: a.copy_(b),
    "move": lambda a, b: a + b.to(a.device),
    "indices on the CPU": lambda a, b: a[numbers(b)[0]],
    "assigned from the GPU": lambda a, b: in_place(b, a[0].cpu()),
    "made beside": lambda a, _: a + torch.zeros(4, device=a.device) + a.new_ones(4) + torch.ones_like(a),
    "cast": lambda a, b: a.to(torch.float64) + b.to(a).double(),
    "where with a number": lambda a, b: torch.where(a > 0, a, b.sum()),
    "view": lambda a, b: a.T[1:].flatten() + b.to(a.device)[1:].flatten(),
}
MAY_NOT: dict[str, Operation] = {
    "sum": lambda a, b: a + b,
    "sum in place": lambda a, b: a.add_(b),
    "sum with a row": lambda a, b: a + b[0],
    "sum with views": lambda a, b: a.T.flatten() + b.T.flatten(),
    "product": lambda a, b: b @ a,
    "product into a buffer": lambda a, b: torch.mm(a, a, out=b),
    "gather": lambda a, b: a.gather(0, numbers(b)),
    "index_select": lambda a, b: a.index_select(0, numbers(b)[0]),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "cat": lambda a, b: torch.cat([a, b]),
    "mask": lambda a, b: a.masked_fill(b > 0, 0.0),
    "embedding": lambda a, b: functional.embedding(numbers(b), a),
    "cross entropy": lambda a, b: functional.cross_entropy(a, numbers(b)[0]),
    "made elsewhere": lambda a, _: a + torch.zeros(4),
    "parameter": lambda a, _: torch.nn.Linear(4, 4)(a),
    "backward": lambda a, b: (a.requires_grad_() * b.to(a.device)).sum(0).backward(b[0]),
}
UNSEEN: dict[str, Operation] = {
    "indices on the GPU": lambda a, b: b[numbers(a)[0]],
    "numpy": lambda a, _: a.numpy(),
}
"""Errors of CUDA that FakeTensorMode lets pass."""
NOT_FAKED = {"copy", "indices on the CPU", "assigned from the GPU", "view"}
"""Operations that FakeTensorMode cannot run where torch was built without CUDA."""


def matrices() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 4, generator=generator), torch.randn(4, 4, generator=generator)


@pytest.mark.parametrize("name", sorted(MAY_MIX.keys() - NOT_FAKED))
def test_torch_lets_these_mix(name: str) -> None:
    with FakeTensorMode():
        MAY_MIX[name](torch.empty(4, 4, device=GPU), torch.empty(4, 4))


@pytest.mark.parametrize(
    "name", sorted(MAY_NOT.keys() - {"parameter", "backward"})
)  # they draw numbers, and run backwards
def test_torch_lets_none_of_these(name: str) -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"same device|Device Propagation"):
        MAY_NOT[name](torch.empty(4, 4, device=GPU), torch.empty(4, 4))


@pytest.mark.parametrize("name", MAY_MIX)
def test_where_devices_may_mix_values_are_those_of_the_cpu(name: str) -> None:
    operation, (one, other) = MAY_MIX[name], matrices()
    with pretended_gpu():
        found = operation(one.to("cuda"), other)
        assert isinstance(found, Tensor)
        assert found.device == (torch.device("cpu") if name == "assigned from the GPU" else GPU)
    assert torch.equal(found, operation(*matrices()))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*MAY_NOT, *UNSEEN])
def test_elsewhere_they_are_an_error(name: str) -> None:
    operation, (one, other) = (MAY_NOT | UNSEEN)[name], matrices()
    with pretended_gpu(), pytest.raises((MixedDevicesError, TypeError), match="cuda:0"):
        operation(one.to("cuda"), other)


def test_a_module_moves_with_its_gradients() -> None:
    with pretended_gpu():
        model = torch.nn.Linear(4, 4).to("cuda")
        tied = torch.nn.Linear(4, 4)
        tied.weight = model.weight
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model(torch.ones(2, 4, device="cuda")).sum().backward()
        optimizer.step()
        assert {model.weight.device, model.weight.grad.device, tied.weight.device} == {GPU}  # type: ignore[union-attr]
        assert {each.device for each in optimizer.state[model.weight].values()} == {GPU}
        assert tied.bias.device.type == "cpu"
        assert model.to("cpu").weight.device.type == "cpu"
    assert model.weight.device.type == "cpu"
