"""Products of float32 as PyTorch takes them on this processor (MKL on x86) and by oneDNN: rates, errors, a step.

    python benchmarks/float32_products.py [--rounds 5]

The three products of a loss over a vocabulary of 49,152, and one of a layer; then steps of a distillation of SmolLM2's
size from stored states, a block of 512 tokens each. Both ways in turn; medians, spread and ratios within a round. An
error is the root mean square of a product's, against float64, over that of the product.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kd_loss import spread
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.distillation.fused import States, logit_loss
from minitron.distillation.losses import forward_kl_
from minitron.model.language_model import Head, Headless

WAYS = {"as torch takes them": "ieee", "oneDNN": "bf16"}
VOCAB, HIDDEN, FFN, TOKENS = 49_152, 576, 1_536, 512


def main() -> None:
    """A line a product and way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    processor = torch.cpu.get_capabilities()
    print({name: processor.get(name) for name in ("cpu_name", "avx512_f", "avx512_bf16", "amx_tile")})
    print("torch", torch.__version__, torch.get_num_threads(), "threads")
    for rows, inner, columns in (
        (256, HIDDEN, VOCAB), (256, VOCAB, HIDDEN), (VOCAB, 256, HIDDEN), (TOKENS, HIDDEN, FFN)
    ):  # fmt: skip
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        exact = a.double() @ b.double()
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        errors = {}
        for _ in range(rounds):
            for way in WAYS:
                seconds, found = timed(way, partial(torch.mm, a, b))
                rates[way].append(2e-9 * rows * inner * columns / seconds)
                errors[way] = float((found - exact).norm() / exact.norm())
        report(f"{rows} x {inner} x {columns}, GFLOP/s", rates, errors)
    step = make_step()
    rates = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            rates[way].append(TOKENS / timed(way, step)[0])
    report("a training step, tokens/s", rates, {})


def report(what: str, rates: dict[str, list[float]], errors: dict[str, float]) -> None:
    """Both ways and their ratio."""
    for way, found in rates.items():
        print(f"{what}, {way}: {spread(found)}", f"error {errors[way]:.1e}" if errors else "")
    usual, other = rates.values()
    print(f"{what}, ratio: {spread([y / x for x, y in zip(usual, other, strict=True)])}", flush=True)


def timed(way: str, do: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it; the first time does not count."""
    torch.backends.mkldnn.matmul.fp32_precision = WAYS[way]  # type: ignore[attr-defined]
    do()
    started = time.perf_counter()
    found = do()
    return time.perf_counter() - started, found


def make_step() -> Callable[[], object]:
    """Forward and backward of a student of 30 layers on one block, told the teacher's last hidden states."""
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)  # fmt: skip
    student = Headless(LlamaForCausalLM(config).eval())
    ids = torch.randint(VOCAB, (1, TOKENS))
    said = States(torch.randn(1, TOKENS, HIDDEN), Head(torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5))

    def step() -> None:
        student(ids, lambda hidden, head: logit_loss(hidden, head, said, forward_kl_, TOKENS)).backward()
        student.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
