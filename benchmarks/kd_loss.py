"""Forward and backward of the distillation loss: peak extra memory and time of ours, of a naive one, and of peers'.

    python benchmarks/kd_loss.py [--vocab 49152 --tokens 2048 --hidden 576 --repeats 5] [--ways naive minitron ...]

Each figure is of a process of its own, the ways in turn, so that a drift of the machine's speed hits all alike. Peers
are measured where they are installed: `pip install trl liger-kernel nvidia-modelopt`. All compute forward KL at
temperature 1, averaged over tokens, in float32, from last hidden states to the gradients of the student's states and
output matrix. Threads that wait for each other sleep, as under the command line, unless OMP_WAIT_POLICY is set.
`benchmarks/on_gpu.sh` measures the ways on a GPU, there from states and matrices in bfloat16.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minitron.distillation.fused import LossOptions, States, logit_loss
from minitron.distillation.losses import forward_kl_
from minitron.model.language_model import Head

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of the student's states (N, hidden) and output matrix (vocab, hidden), and of the teacher's."""


def minitron() -> Loss:
    """Ours, with the operands that a training has: those of bfloat16 are multiplied as they are on a GPU."""

    def loss(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        options = LossOptions(operands=torch.bfloat16 if student.dtype == torch.bfloat16 else None)
        outputs = States(teacher, Head(teacher_head))
        return logit_loss(student, Head(head), outputs, forward_kl_, len(student), options)

    return loss


def naive() -> Loss:
    """All logits at once, by torch."""

    def loss(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        log_q = torch.log_softmax(student @ head.T, dim=-1)
        log_p = torch.log_softmax(teacher @ teacher_head.T, dim=-1)
        return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    return loss


def trl() -> Loss:
    """The loss of TRL's trainer for generalised knowledge distillation, at β = 0."""
    from trl.experimental.gkd import GKDTrainer

    def loss(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        labels = torch.zeros(1, len(student), dtype=torch.int64, device=student.device)
        logits = (student @ head.T)[None], (teacher @ teacher_head.T)[None]
        return GKDTrainer.generalized_jsd_loss(*logits, labels=labels, beta=0.0)  # type: ignore[no-any-return]

    return loss


def liger(chunk: int, compiled: bool = False) -> Loss:
    """The chunked loss of liger-kernel, at β = 0, without its cross-entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    found = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled, chunk_size=chunk
    )

    def loss(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
        return found(student, head, teacher, teacher_head, labels)  # type: ignore[no-any-return]

    return loss


def modelopt() -> Loss:
    """The loss of NVIDIA's Model Optimizer."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    found = LogitsDistillationLoss(temperature=1.0, reduction="batchmean")
    return lambda student, head, teacher, teacher_head: found(student @ head.T, teacher @ teacher_head.T)


WAYS: dict[str, Callable[[], Loss]] = {
    "naive": naive,
    "minitron": minitron,
    "trl": trl,
    "liger-1024": lambda: liger(1024),
    "liger-256": lambda: liger(256),
    "liger-compiled": lambda: liger(1024, compiled=True),
    "modelopt": modelopt,
}


def main() -> None:
    """Run all in turn and print medians, spread, and ratios to ours of the same round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.vocab, given.tokens, given.hidden)))
        return
    sizes = ["--vocab", str(given.vocab), "--tokens", str(given.tokens), "--hidden", str(given.hidden)]
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(given.repeats):
        rounds.append({way: alone(way, sizes) for way in given.ways})
    where = f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}, {given.repeats} rounds"
    print(f"vocab {given.vocab}, tokens {given.tokens}, hidden {given.hidden}, {where}")
    for way in given.ways:
        if "error" in rounds[0][way]:
            print(f"{way:>10}: not measured: {rounds[0][way]['error']}")
            continue
        for key in ("extra_mb", "seconds"):
            values = [found[way][key] for found in rounds]
            ratios = [found[way][key] / found["minitron"][key] for found in rounds if "minitron" in found]
            print(f"{way:>10} {key:>8}: {spread(values)}" + (f", {spread(ratios)} of ours" if ratios else ""))
        print(f"{way:>10}     loss: {rounds[0][way]['loss']:.6f}", flush=True)


def alone(way: str, sizes: list[str]) -> dict[str, float]:
    """One measurement in a process of its own; a peer that is missing or fails says so."""
    command, environment = (
        [sys.executable, __file__, *sizes, "--only", way],
        {"OMP_WAIT_POLICY": "passive"} | os.environ,
    )
    shown = subprocess.run(command, capture_output=True, text=True, env=environment)
    if shown.returncode:
        return {"error": shown.stderr.strip().splitlines()[-1]}  # type: ignore[dict-item]
    return dict(json.loads(shown.stdout.splitlines()[-1]))


def spread(values: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def measure(way: str, vocab: int, tokens: int, hidden: int) -> dict[str, float]:
    """One forward and backward in this process: extra peak memory in MB, seconds, and the loss."""
    loss_of, inputs = WAYS[way](), random_inputs(vocab, tokens, hidden, torch.device("cpu"), torch.float32)
    student, head, teacher, teacher_head = inputs
    loss_of(student[:8], head[:64], teacher[:8], teacher_head[:64]).backward()  # loads the libraries
    student.grad = head.grad = None
    before = memory_mb("VmRSS")
    started = time.perf_counter()
    loss = loss_of(*inputs)
    loss.backward()
    seconds = time.perf_counter() - started
    return {"extra_mb": memory_mb("VmHWM") - before, "seconds": seconds, "loss": float(loss.detach())}


def random_inputs(
    vocab: int, tokens: int, hidden: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A student's states (tokens, hidden) and output matrix (vocab, hidden), which want gradients, and a teacher's."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(tokens, hidden), (vocab, hidden)] * 2
    states = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
    for head in states[1::2]:
        head.mul_(0.05)
    student, matrix, teacher, teacher_matrix = (each.to(dtype) for each in states)
    return student.requires_grad_(), matrix.requires_grad_(), teacher, teacher_matrix


def memory_mb(field: str) -> float:
    """This process's resident memory now (VmRSS) or at its highest (VmHWM), as Linux counts it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status[field].split()[0]) / 1024


if __name__ == "__main__":
    main()
