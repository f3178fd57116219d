"""Property 8, one process: the fused loss and its gradients equal the naive ones in float64, however it is split."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from minitron.distill.losses import forward_kl


def problem(num_tokens: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, 12), (53, 12), (num_tokens, 20), (53, 20)]
    states = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return states[0].requires_grad_(), states[1].requires_grad_(), states[2], states[3]


def naive(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, temperature: float) -> Tensor:
    """KL of all tokens at once, by torch, averaged over tokens, times the squared temperature."""
    log_q = functional.log_softmax(student @ head.T / temperature, dim=-1)
    log_p = functional.log_softmax(teacher @ teacher_head.T / temperature, dim=-1)
    return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 256])
def test_fused_equals_naive(temperature: float, chunk_tokens: int) -> None:
    student, head, teacher, teacher_head = problem()
    expected = naive(student, head, teacher, teacher_head, temperature)
    expected_grads = torch.autograd.grad(expected, (student, head))
    loss = forward_kl(student, head, teacher, teacher_head, len(student), temperature, chunk_tokens)
    grads = torch.autograd.grad(loss * 3, (student, head))
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad / 3, expected_grad, atol=1e-12, rtol=1e-10)


def test_soft_capped_logits() -> None:
    student, head, teacher, teacher_head = problem()
    log_q = functional.log_softmax(2.0 * torch.tanh(student @ head.T / 2.0) / 1.5, dim=-1)
    log_p = functional.log_softmax(5.0 * torch.tanh(teacher @ teacher_head.T / 5.0) / 1.5, dim=-1)
    expected = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * 1.5**2
    expected_grads = torch.autograd.grad(expected, (student, head))
    loss = forward_kl(student, head, teacher, teacher_head, 37, 1.5, 8, student_softcap=2.0, teacher_softcap=5.0)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for grad, expected_grad in zip(torch.autograd.grad(loss, (student, head)), expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-12, rtol=1e-10)
    uncapped = forward_kl(student, head, teacher, teacher_head, 37, 1.5)
    assert abs(float(uncapped.detach() - expected.detach())) > 1e-2


def test_parts_of_a_batch_add_up() -> None:
    student, head, teacher, teacher_head = problem()
    whole = torch.autograd.grad(forward_kl(student, head, teacher, teacher_head, 37), (student, head))
    total = [torch.zeros_like(grad) for grad in whole]
    for part in (slice(0, 5), slice(5, 30), slice(30, 37)):
        loss = forward_kl(student[part], head, teacher[part], teacher_head, 37)
        for i, grad in enumerate(torch.autograd.grad(loss, (student, head))):
            total[i] += grad
    for grad, expected in zip(total, whole, strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-12, rtol=1e-10)


def test_averages_of_unequal_parts_do_not() -> None:
    student, head, teacher, teacher_head = (tensor.detach() for tensor in problem())
    whole = float(forward_kl(student, head, teacher, teacher_head, 37))
    parts = [slice(0, 5), slice(5, 30), slice(30, 37)]
    averaged = sum(float(forward_kl(student[p], head, teacher[p], teacher_head, len(student[p]))) for p in parts) / len(
        parts
    )
    assert abs(averaged - whole) > 1e-3


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient() -> None:
    student, head, _, _ = problem()
    loss = forward_kl(student, head, student.detach(), head.detach(), 37)
    assert abs(float(loss.detach())) < 1e-12
    assert all(float(grad.abs().max()) < 1e-12 for grad in torch.autograd.grad(loss, (student, head)))


def test_direction_is_forward() -> None:
    student, head, teacher, teacher_head = (tensor.detach() for tensor in problem())
    reverse = forward_kl(teacher, teacher_head, student, head, 37)
    assert abs(float(reverse) - float(forward_kl(student, head, teacher, teacher_head, 37))) > 1e-2


def test_bfloat16_states_give_float32_logits() -> None:
    student, head, teacher, teacher_head = (tensor.detach().float() for tensor in problem())
    low = [tensor.bfloat16() for tensor in (student, head, teacher, teacher_head)]
    loss = forward_kl(low[0], low[1], low[2], low[3], 37)
    exact = naive(low[0].double(), low[1].double(), low[2].double(), low[3].double(), temperature=1.0)
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(exact)) < 1e-5


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    student, head, teacher, teacher_head = problem()
    loss = forward_kl(student, head, teacher, teacher_head, 37)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_unequal_vocabularies_are_refused() -> None:
    student, head, teacher, teacher_head = problem()
    with pytest.raises(ValueError, match="vocabularies differ: 53 and 52"):
        forward_kl(student, head, teacher, teacher_head[:52], 37)
