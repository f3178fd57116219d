"""Forward and backward of the distillation loss: peak extra memory and time, fused against naive.

    python benchmarks/fused_kl.py [--vocab 49152 --tokens 2048 --hidden 576 --repeats 5]

Each figure is of a process of its own, the two in turn, so that a drift of the machine's speed hits both alike.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from minitron.distill.losses import forward_kl


def naive_kl(
    student: torch.Tensor, head: torch.Tensor, teacher: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    """All logits at once, by torch."""
    log_q = torch.log_softmax(student @ head.T, dim=-1)
    log_p = torch.log_softmax(teacher @ teacher_head.T, dim=-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def memory_mb(field: str) -> float:
    """This process's resident memory now (VmRSS) or at its highest (VmHWM), as Linux counts it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status[field].split()[0]) / 1024


def measure(kind: str, vocab: int, tokens: int, hidden: int) -> dict[str, float]:
    """One forward and backward in this process: extra peak memory in MB and seconds, and the loss."""
    torch.manual_seed(0)
    student, teacher = torch.randn(tokens, hidden), torch.randn(tokens, hidden)
    head, teacher_head = (torch.randn(vocab, hidden).mul_(0.05) for _ in range(2))
    student.requires_grad_()
    head.requires_grad_()
    warm = forward_kl(student[:8], head[:64], teacher[:8], teacher_head[:64], 8)  # loads the libraries
    warm.backward()
    student.grad = head.grad = None
    before = memory_mb("VmRSS")
    started = time.perf_counter()
    if kind == "naive":
        loss = naive_kl(student, head, teacher, teacher_head)
    else:
        loss = forward_kl(student, head, teacher, teacher_head, tokens)
    loss.backward()
    seconds = time.perf_counter() - started
    return {"extra_mb": memory_mb("VmHWM") - before, "seconds": seconds, "loss": float(loss.detach())}


def main() -> None:
    """Run both in turn and print medians, spread and ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["naive", "fused"])
    given = parser.parse_args()
    if given.only:
        print(json.dumps(measure(given.only, given.vocab, given.tokens, given.hidden)))
        return
    sizes = ["--vocab", str(given.vocab), "--tokens", str(given.tokens), "--hidden", str(given.hidden)]
    found: dict[str, list[dict[str, float]]] = {"naive": [], "fused": []}
    for _ in range(given.repeats):
        for kind, rows in found.items():
            shown = subprocess.run(
                [sys.executable, __file__, *sizes, "--only", kind], capture_output=True, text=True, check=True
            )
            rows.append(json.loads(shown.stdout))
    where = f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}, {given.repeats} runs each"
    print(f"vocab {given.vocab}, tokens {given.tokens}, hidden {given.hidden}, {where}")
    for key in ("extra_mb", "seconds"):
        for kind, rows in found.items():
            values = [row[key] for row in rows]
            print(f"{key:>9} {kind}: median {statistics.median(values):.4g}, {min(values):.4g} to {max(values):.4g}")
        ratios = [a[key] / b[key] for a, b in zip(found["naive"], found["fused"], strict=True)]
        print(f"{key:>9} naive/fused: median {statistics.median(ratios):.3g}, {min(ratios):.3g} to {max(ratios):.3g}")
    print(f"     loss naive {found['naive'][0]['loss']:.6f}, fused {found['fused'][0]['loss']:.6f}")


if __name__ == "__main__":
    main()
