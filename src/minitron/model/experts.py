"""What a module that holds all experts of a layer does for one of them."""

from typing import Any

from torch import Tensor, nn


def run_expert(experts: nn.Module, number: int, states: Tensor) -> tuple[Tensor, Tensor]:
    """The input (T, ffn) and the output (T, hidden) of an expert's second matrix, for states (T, hidden).

    transformers stacks the weights of a layer's experts and says beside them how they lie: whether gate and up
    are one tensor, whether inputs come first, whether there are biases. The activation is the module's own.
    """
    module: Any = experts
    name = "gate_up_proj" if module.has_gate else "up_proj"
    projected = _multiply(module, name, number, states)
    inner = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
    return inner, _multiply(module, "down_proj", number, inner)


def _multiply(module: Any, name: str, number: int, states: Tensor) -> Tensor:
    weight = getattr(module, name)[number]
    product: Tensor = states @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        product = product + getattr(module, f"{name}_bias")[number]
    return product
