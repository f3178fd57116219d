"""Property 8, one process: fused losses and their gradients equal the naive ones in float64, however they are split."""

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from minitron.distillation.fused import Labels, LossOptions, States, TopTokens, logit_loss
from minitron.distillation.losses import (
    COMPARISONS,
    UNSCALED,
    Comparison,
    classes_of_,
    comparison_of,
    differentiable,
    forward_kl_,
)
from minitron.model.language_model import Head

VOCAB, NUM_TOKENS = 53, 37
OF_PROBABILITIES = [kind for kind in COMPARISONS if kind not in {"mse", "cosine"}]
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(vocab: int = VOCAB, teacher_vocab: int = VOCAB) -> Problem:
    """Last hidden states and head of a student, which want gradients, and of a teacher."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(NUM_TOKENS, 12), (vocab, 12), (NUM_TOKENS, 20), (teacher_vocab, 20)]
    states = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return states[0].requires_grad_(), states[1].requires_grad_(), states[2], states[3]


def fused(given: Problem, kind: str = "forward_kl", temperature: float = 1.0, top_k: int | None = None,
          beta: float = 0.3, softcaps: tuple[float | None, float | None] = (None, None),
          num_tokens: int = NUM_TOKENS, **more: object) -> Tensor:  # fmt: skip
    student, head, teacher, teacher_head = given
    of_teacher, comparison = States(teacher, Head(teacher_head, softcaps[1])), comparison_of(kind, beta, top_k)
    options = options_of(kind, temperature, **more)
    return logit_loss(student, Head(head, softcaps[0]), of_teacher, comparison, num_tokens, options)


def options_of(kind: str, temperature: float, **more: object) -> LossOptions:
    return LossOptions(temperature, scales=kind not in UNSCALED, **more)  # type: ignore[arg-type]


def divergence(kind: str, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    kl = partial(functional.kl_div, reduction="batchmean", log_target=True)
    if kind == "jsd":
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        return beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)
    return kl(log_q, log_p) if kind == "forward_kl" else kl(log_p, log_q)


def naive(given: Problem, kind: str, temperature: float, top_k: int | None, beta: float = 0.3) -> Tensor:
    """All tokens at once, by torch and autograd, averaged over tokens; KL and MSE of logits times τ²."""
    student, head, teacher, teacher_head = given
    s, t = student @ head.T / temperature, teacher @ teacher_head.T / temperature
    if kind == "mse":
        return (s - t).square().sum(dim=-1).mean() * temperature**2
    if kind == "cosine":
        return (1 - functional.cosine_similarity(s, t, dim=-1)).mean()
    p, q = t.softmax(dim=-1), s.softmax(dim=-1)
    if top_k is not None:
        indices = p.topk(top_k, dim=-1).indices
        p, q = (torch.cat([of, 1 - of.sum(dim=-1, keepdim=True)], dim=-1)
                for of in (p.gather(-1, indices), q.gather(-1, indices)))  # fmt: skip
    if kind == "probability_mse":
        return (p - q).square().sum(dim=-1).mean()
    if kind == "probability_cosine":
        return (1 - functional.cosine_similarity(p, q, dim=-1)).mean()
    return divergence(kind, p.log(), q.log(), beta) * temperature**2


def gradients(loss: Tensor, given: Problem) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, given[:2])


def assert_equal(found: Callable[[Problem], Tensor], expected: Callable[[Problem], Tensor], given: Problem) -> None:
    loss, wanted = found(given), expected(given)
    torch.testing.assert_close(loss, wanted, atol=1e-12, rtol=1e-12)
    for grad, wanted_grad in zip(gradients(loss, given), gradients(wanted, given), strict=True):
        torch.testing.assert_close(grad, wanted_grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("chunk_tokens", [1, 8, 256])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize(
    ("kind", "top_k"),
    [
        *((kind, None) for kind in COMPARISONS),
        *product(OF_PROBABILITIES, [1, 5]),
    ],
)
def test_fused_equals_naive(kind: str, top_k: int | None, temperature: float, chunk_tokens: int) -> None:
    assert_equal(
        lambda given: fused(given, kind, temperature, top_k, chunk_tokens=chunk_tokens),
        lambda given: naive(given, kind, temperature, top_k),
        problem(),
    )


@pytest.mark.parametrize("kind", COMPARISONS)
def test_float32_is_as_exact_as_float32_can_be(kind: str) -> None:
    # Logits of about one: an error of 6e-8 of a logit of 20 would by itself be one of 1e-6 of a probability.
    student, head, teacher, teacher_head = (tensor.detach().float() for tensor in problem())
    given = student.requires_grad_(), head.mul_(0.25).requires_grad_(), teacher, teacher_head.mul_(0.2)
    trained = [tensor.detach().double().requires_grad_() for tensor in given[:2]]
    exact = trained[0], trained[1], teacher.double(), teacher_head.double()
    loss, wanted = fused(given, kind), naive(exact, kind, 1.0, None)
    assert loss.dtype == torch.float32
    assert abs(float(loss.detach() / wanted.detach()) - 1) < 1e-6
    for grad, exact_grad in zip(gradients(loss, given), gradients(wanted, exact), strict=True):
        assert float((grad - exact_grad).norm() / exact_grad.norm()) < 1e-6


def of_one_token(kind: str, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """The paper's Loss(p(x_t, τ), p(x_s, τ)) with p(x_i, τ) = exp(x_i / τ) / Σ_j exp(x_j / τ), sum after sum."""
    p, q = ([(x / temperature).exp() / sum((y / temperature).exp() for y in logits) for x in logits]
            for logits in (teacher, student))  # fmt: skip
    if kind == "probability_mse":
        return sum(((b - a) ** 2 for a, b in zip(p, q, strict=True)), torch.zeros((), dtype=torch.float64))
    products = [sum((a * b for a, b in zip(*pair, strict=True)), torch.zeros((), dtype=torch.float64))
                for pair in ((p, q), (p, p), (q, q))]  # fmt: skip
    return 1 - products[0] / (products[1] * products[2]).sqrt()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("kind", ["probability_mse", "probability_cosine"])
def test_losses_of_probabilities_are_the_papers(kind: str, temperature: float) -> None:
    def by_the_paper(given: Problem) -> Tensor:
        s, t = given[0] @ given[1].T, given[2] @ given[3].T
        return sum(of_one_token(kind, t[k], s[k], temperature) for k in range(NUM_TOKENS)) / NUM_TOKENS  # type: ignore[return-value]

    given = problem()
    assert_equal(
        lambda given: logit_loss(given[0], Head(given[1]), States(given[2], Head(given[3])), COMPARISONS[kind],
                                 NUM_TOKENS, options_of(kind, temperature)), by_the_paper, given,
    )  # fmt: skip
    # The control: the logits' own, and another temperature.
    expected = float(by_the_paper(given).detach())
    others = [fused(given, kind.removeprefix("probability_"), temperature), fused(given, kind, 1.1 * temperature)]
    assert all(abs(float(other.detach()) - expected) > 1e-4 for other in others)


@pytest.mark.parametrize("kind", ["cosine", "probability_cosine", "probability_mse"])
def test_only_some_losses_keep_the_size_of_their_gradients(kind: str) -> None:
    """A cosine lies between 0 and 2 at any temperature; the factor τ² = 9 of the others would exceed that."""
    given = problem()
    assert 0 < float(fused(given, kind, 3.0).detach()) < 2
    wrong = naive(given, kind, 3.0, None).detach() * 9
    assert abs(float(fused(given, kind, 3.0).detach() - wrong)) > 1e-3


def test_kinds_differ() -> None:
    given = tuple(tensor.detach() for tensor in problem())
    values = [float(fused(given, kind, top_k=k)) for kind in ("forward_kl", "reverse_kl", "jsd") for k in (None, 5)]  # type: ignore[arg-type]
    assert all(abs(a - b) > 1e-3 for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize("top_k", [None, 4])
def test_soft_capped_logits(top_k: int | None) -> None:
    def capped(given: Problem) -> Tensor:
        s, t = (2.0 * torch.tanh(given[0] @ given[1].T / 2.0), 5.0 * torch.tanh(given[2] @ given[3].T / 5.0))
        identity = torch.eye(VOCAB, dtype=torch.float64)
        return naive((s, identity, t, identity), "forward_kl", 1.5, top_k)

    assert_equal(lambda given: fused(given, temperature=1.5, top_k=top_k, softcaps=(2.0, 5.0)), capped, problem())
    assert abs(float(fused(problem(), temperature=1.5).detach() - capped(problem()).detach())) > 1e-2


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_classes_that_were_kept_are_as_good_as_logits(kind: str) -> None:
    given = problem()
    logits = given[2] @ given[3].T / 3.0
    kept = TopTokens(*classes_of_(logits, 5), VOCAB)

    def of_kept(given: Problem) -> Tensor:
        comparison = comparison_of(kind, 0.3, of_classes=True)
        options = LossOptions(temperature=3.0, chunk_tokens=8)
        return logit_loss(given[0], Head(given[1]), kept, comparison, NUM_TOKENS, options)

    assert_equal(of_kept, lambda given: fused(given, kind, 3.0, 5), given)


def test_labels_add_their_cross_entropy() -> None:
    labels = torch.randint(0, VOCAB, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    labels[::5] = -100
    num_labels = int((labels >= 0).sum())

    def both(given: Problem) -> Tensor:
        entropy = functional.cross_entropy(given[0] @ given[1].T, labels, ignore_index=-100)
        return naive(given, "forward_kl", 2.0, None) + 0.7 * entropy

    found = partial(fused, temperature=2.0, labels=Labels(labels, 0.7, num_labels), chunk_tokens=8)
    assert_equal(found, both, problem())


def test_padded_vocabularies_are_compared_where_both_have_entries() -> None:
    for vocab, teacher_vocab in ((VOCAB, 60), (60, VOCAB)):
        given = problem(vocab, teacher_vocab)

        def common(given: Problem) -> Tensor:
            return naive((given[0], given[1][:VOCAB], given[2], given[3][:VOCAB]), "forward_kl", 1.0, None)

        assert_equal(fused, common, given)


def test_parts_of_a_batch_add_up() -> None:
    student, head, teacher, teacher_head = problem()
    whole = gradients(fused((student, head, teacher, teacher_head)), (student, head, teacher, teacher_head))
    total = [torch.zeros_like(grad) for grad in whole]
    for part in (slice(0, 5), slice(5, 30), slice(30, 37)):
        loss = fused((student[part], head, teacher[part], teacher_head))
        for i, grad in enumerate(torch.autograd.grad(loss, (student, head))):
            total[i] += grad
    for grad, expected in zip(total, whole, strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-12, rtol=1e-10)


def test_no_tokens_have_no_loss() -> None:
    student, head, teacher, teacher_head = problem()
    loss = fused((student[:0], head, teacher[:0], teacher_head), num_tokens=1)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert head.grad is not None
    assert not head.grad.any()


def test_averages_of_unequal_parts_do_not() -> None:
    student, head, teacher, teacher_head = (tensor.detach() for tensor in problem())
    whole = float(fused((student, head, teacher, teacher_head)))
    parts = [slice(0, 5), slice(5, 30), slice(30, 37)]
    losses = [
        float(fused((student[p], head, teacher[p], teacher_head), num_tokens=len(student[p]))) for p in parts
    ]  # fmt: skip
    assert abs(sum(losses) / len(parts) - whole) > 1e-3


@pytest.mark.parametrize("kind", COMPARISONS)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(kind: str) -> None:
    student, head, _, _ = problem()
    given = student, head, student.detach(), head.detach()
    loss = fused(given, kind)
    assert abs(float(loss.detach())) < 1e-12
    assert all(float(grad.abs().max()) < 1e-12 for grad in gradients(loss, given))


def test_bfloat16_states_give_float32_logits() -> None:
    low = [tensor.detach().bfloat16() for tensor in problem()]
    loss = fused((low[0], low[1], low[2], low[3]))
    exact = naive((low[0].double(), low[1].double(), low[2].double(), low[3].double()), "forward_kl", 1.0, None)
    assert loss.dtype == torch.float32
    assert abs(float(loss) - float(exact)) < 1e-5


def rounded(tensor: Tensor) -> Tensor:
    """To bfloat16, without an effect on gradients."""
    return tensor + (tensor.bfloat16().to(tensor.dtype) - tensor).detach()


def test_operands_are_rounded_and_logits_are_not() -> None:
    given = problem()
    single: Problem = tuple(x.detach().float().requires_grad_(x.requires_grad) for x in given)  # type: ignore[assignment]
    found = fused(single, operands=torch.bfloat16, chunk_tokens=10)
    at_once: Problem = tuple(map(rounded, given))  # type: ignore[assignment]
    expected = naive(at_once, "forward_kl", 1.0, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for one, other, exact in zip(gradients(found, single), gradients(expected, given),
                                 gradients(fused(given), given), strict=True):  # fmt: skip
        error, of_rounding = ((one.double() - x).norm() / x.norm() for x in (other, exact))
        assert error < 5e-3  # the gradient by logits is rounded too
        assert of_rounding > 1e-4
    logits, of_teacher = (a.detach().bfloat16() @ b.detach().bfloat16().T for a, b in (single[:2], single[2:]))
    poor = divergence("forward_kl", of_teacher.double().log_softmax(-1), logits.double().log_softmax(-1), 0.5)
    assert abs(poor - expected.detach()) > 10 * abs(found.detach() - expected.detach())


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    loss = fused(problem())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def test_the_teacher_makes_no_tail_of_nothing() -> None:
    logits = torch.zeros(2, 5, dtype=torch.float64)
    gradient = logits.clone()
    loss = comparison_of("forward_kl", top_k=4)(logits.clone(), gradient)
    assert float(loss.abs().max()) < 1e-12
    assert torch.isfinite(gradient).all()
    assert forward_kl_(logits.clone(), logits.clone()).abs().max() < 1e-12


@pytest.mark.parametrize("softcaps", [(None, None), (3.0, 5.0)])
def test_a_plain_function_becomes_a_comparison(softcaps: tuple[float | None, float | None]) -> None:
    def plain_kl(teacher: Tensor, student: Tensor) -> Tensor:
        log_p, log_q = teacher.log_softmax(dim=-1), student.log_softmax(dim=-1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)

    def by(comparison: Comparison, given: Problem) -> Tensor:
        outputs, options = States(given[2], Head(given[3], softcaps[1])), LossOptions(temperature=2.0, chunk_tokens=8)
        return logit_loss(given[0], Head(given[1], softcaps[0]), outputs, comparison, NUM_TOKENS, options)

    assert_equal(partial(by, differentiable(plain_kl)), partial(by, forward_kl_), problem())
    with pytest.raises(AssertionError):  # the control: the other direction is another loss
        assert_equal(partial(by, differentiable(lambda a, b: plain_kl(b, a))), partial(by, forward_kl_), problem())


@pytest.mark.parametrize("function", [lambda _, student: student.mean(), lambda teacher, student: student - teacher])
def test_a_plain_function_returns_one_loss_per_token(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"a loss of 3 tokens has shape \((3, 5)?\): not one per token"):
        differentiable(function)(torch.zeros(3, 5), torch.ones(3, 5))
