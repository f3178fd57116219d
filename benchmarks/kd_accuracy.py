"""How exact the distillation loss and its gradients are on a grown model's states and weights in bfloat16.

    python benchmarks/kd_accuracy.py STUDENT [--teacher smollm2] [--tokens 512]

Both models run over text in bfloat16. From their last hidden states on, forward KL and its gradients by the student's
states and output matrix are computed in float64 (the reference), by our loss, and from logits that a bfloat16 matrix
product made, as a model's own forward pass gives them. Printed are relative errors, of gradients in the Euclidean norm.
"""

import argparse
import json

import torch
from torch import Tensor

from minitron.distillation.fused import LossOptions, States, logit_loss
from minitron.distillation.losses import forward_kl_
from minitron.model.language_model import Headless, load_model
from minitron.model.source import open_teacher
from minitron.recipe import Recipe
from minitron.runtime import Runtime, rounds_products
from minitron.session import Session

CONTEXT = 512


def main() -> None:
    """Print one line of JSON per way of computing the loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("student")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--tokens", type=int, default=CONTEXT)
    options = parser.parse_args()
    session = Session(Recipe.model_validate({
        "teacher": options.teacher, "context": CONTEXT, "dtype": "bfloat16", "calibration": {"tokens": options.tokens},
        "search": {"tokens": CONTEXT}, "evaluation": {"tokens": CONTEXT}, "distill": {"tokens": options.tokens},
    }))  # fmt: skip
    ids, device = session.splits.train.ids, session.runtime.device
    student = load_model(open_teacher(options.student), device, torch.bfloat16)
    with torch.no_grad(), session.teacher_model() as teacher:
        said, own = (Headless(model)(ids.to(device), States) for model in (teacher, student))
    for way, found in errors(own, said).items():
        print(json.dumps({"way": way, **found}))
    print(json.dumps({"loss": float(exact(own, said)[0]), "tokens": ids.numel(), "torch": torch.__version__}))


def errors(own: States, said: States) -> dict[str, dict[str, float]]:
    """The relative errors of each way of computing the loss, of a student's and a teacher's states in bfloat16."""
    wanted, device = exact(own, said), own.hidden.device
    with Runtime(device, torch.float32, rounds=rounds_products("auto", device)).training():
        as_trained = ours(own, said)
    ways = {
        "minitron": ours(own, said), "minitron, as on CUDA": ours(own, said, torch.bfloat16),
        "minitron, as this processor trains": as_trained,
        "logits in bfloat16": rounded(own, said),
    }  # fmt: skip
    names = ("loss", "gradient by states", "gradient by output matrix")
    return {
        way: {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(names, found, wanted, strict=True)}
        for way, found in ways.items()
    }


def gradients(loss: Tensor, states: Tensor, head: Tensor) -> tuple[Tensor, ...]:
    """The loss and these."""
    return loss.detach(), *torch.autograd.grad(loss, (states, head))


def ours(own: States, said: States, operands: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """From states in bfloat16; their gradient is asked for in float32, so that its own rounding does not count."""
    states, head = own.hidden.float().requires_grad_(), own.head.weight.float().requires_grad_()
    num_tokens, precision = states.shape[:-1].numel(), LossOptions(operands=operands)
    loss = logit_loss(states, type(own.head)(head), said, forward_kl_, num_tokens, precision)
    return gradients(loss, states, head)


def exact(own: States, said: States) -> tuple[Tensor, ...]:
    """In float64."""
    states, head = own.hidden.double().requires_grad_(), own.head.weight.double().requires_grad_()
    return gradients(naive(states @ head.T, said.hidden.double() @ said.head.weight.double().T), states, head)


def rounded(own: States, said: States) -> tuple[Tensor, ...]:
    """From logits in bfloat16, turned to float32 for the loss."""
    states, head = own.hidden.clone().requires_grad_(), own.head.weight.clone().requires_grad_()
    logits, of_teacher = states @ head.T, said.hidden @ said.head.weight.T
    return gradients(naive(logits.float(), of_teacher.float()), states, head)


def naive(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL, averaged over tokens."""
    log_q, log_p = (logits.flatten(0, -2).log_softmax(dim=-1) for logits in (student, teacher))
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


if __name__ == "__main__":
    main()
