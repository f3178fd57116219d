"""The experts of a layer in memory, in the terms of a family's table."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Experts:
    """A transformers module that holds all experts of a layer, read by the number of an expert.

    transformers stacks the experts' weights, `gate_up_proj` or `up_proj` and `down_proj`, and states in attributes of
    the module whether gate and up are one tensor, whether inputs are the first dimension, and whether there are biases.
    """

    module: Any

    def inner_states(self, expert: int, states: Tensor) -> Tensor:
        """Return the input (T, ffn) of an expert's second matrix, for states (T, hidden)."""
        if self.module.has_gate:
            inner: Tensor = self.module._apply_gate(self._multiply("gate_up_proj", expert, states))
            return inner
        return self.module.act_fn(self._multiply("up_proj", expert, states))  # type: ignore[no-any-return]

    def first_outputs(self, expert: int, states: Tensor) -> Tensor:
        """Return the output (T, ffn) of an expert's first matrix, for states (T, hidden); of its gate if it has one."""
        if not self.module.has_gate:
            return self._multiply("up_proj", expert, states)
        both = self._multiply("gate_up_proj", expert, states)
        return both.chunk(2, dim=-1)[0] if self.module.is_concatenated else both[..., ::2]

    def outputs(self, expert: int, inner: Tensor) -> Tensor:
        """Return the output (T, hidden) of an expert, for the input (T, ffn) of its second matrix."""
        return self._multiply("down_proj", expert, inner)

    def second_matrix(self, expert: int, inputs: Tensor) -> Tensor:
        """Return the part (n, hidden) of an expert's second matrix for some of its inputs, numbers or a mask."""
        weight = self.module.down_proj[expert]
        part: Tensor = weight[inputs] if self.module.is_transposed else weight[:, inputs].T
        return part

    def _matrix(self, name: str, expert: int) -> Tensor:
        weight: Tensor = getattr(self.module, name)[expert]
        return weight if self.module.is_transposed else weight.T

    def _multiply(self, name: str, expert: int, states: Tensor) -> Tensor:
        product = states @ self._matrix(name, expert)
        if self.module.has_bias:
            product = product + getattr(self.module, f"{name}_bias")[expert]
        return product
