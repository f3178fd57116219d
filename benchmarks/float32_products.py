"""Products of float32 on this processor, exact and with oneDNN: rates, errors, and whole steps in several ways.

    python benchmarks/float32_products.py [--rounds 5] [--context 512] [--products-only | --steps-only]

The three products of a loss over a vocabulary of 49,152, and one of a layer, as torch takes them by default (MKL on
x86) and where oneDNN may round operands to bfloat16, which it does with tile registers (AMX). Then steps of a
distillation of SmolLM2's size with an MLP of 768 from stored states, one block each, the ways in turn. Medians, spread
and ratios within a round; those of steps are of the processor's time for this process, which other processes disturb
less (with one thread). An error is the root mean square of a product's, against float64, over that of the product.
"""

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kd_loss import spread
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.distillation.fused import States, logit_loss
from minitron.distillation.losses import forward_kl_
from minitron.evaluation.peak_memory import CLEAR_PEAK, resident
from minitron.model.language_model import Head, Headless
from minitron.runtime import Runtime, release_memory

PRODUCTS = {"as torch takes them": "ieee", "oneDNN": "bf16"}
WAYS: dict[str, set[str]] = {
    "exact": set(),
    "exact, attention written out": {"eager"},
    "exact, freed memory kept": {"kept"},
    "rounded": {"rounds"},
    "rounded, freed memory kept": {"rounds", "kept"},
    "rounded, freed memory kept, attention written out": {"rounds", "kept", "eager"},
}
VOCAB, HIDDEN, FFN, TOKENS = 49_152, 576, 768, 512


def main() -> None:
    """A line a product and way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=TOKENS)
    parser.add_argument("--products-only", action="store_true")
    parser.add_argument("--steps-only", action="store_true")
    given = parser.parse_args()
    processor = torch.cpu.get_capabilities()
    print({name: processor.get(name) for name in ("cpu_name", "avx512_f", "avx512_bf16", "amx_tile")})
    print("torch", torch.__version__, torch.get_num_threads(), "threads, load", os.getloadavg()[0])
    if not given.steps_only:
        measure_products(given.rounds)
    if given.products_only:
        return
    measure_steps(given.rounds, given.context)


def measure_products(rounds: int) -> None:
    """Both ways in turn."""
    torch.manual_seed(0)
    for rows, inner, columns in (
        (256, HIDDEN, VOCAB), (256, VOCAB, HIDDEN), (VOCAB, 256, HIDDEN), (TOKENS, HIDDEN, 1_536)
    ):  # fmt: skip
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        exact = a.double() @ b.double()
        rates: dict[str, list[float]] = {way: [] for way in PRODUCTS}
        errors = {}
        for _ in range(rounds):
            for way in PRODUCTS:
                seconds, found = timed(way, partial(torch.mm, a, b))
                rates[way].append(2e-9 * rows * inner * columns / seconds)
                errors[way] = float((found - exact).norm() / exact.norm())
        report(f"{rows} x {inner} x {columns}, GFLOP/s", rates, errors)


def report(what: str, rates: dict[str, list[float]], errors: dict[str, float]) -> None:
    """Both ways and their ratio."""
    for way, found in rates.items():
        print(f"{what}, {way}: {spread(found)}", f"error {errors[way]:.1e}")
    usual, other = rates.values()
    print(f"{what}, ratio: {spread([y / x for x, y in zip(usual, other, strict=True)])}", flush=True)


def timed(way: str, do: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it; the first time does not count."""
    torch.backends.mkldnn.matmul.fp32_precision = PRODUCTS[way]  # type: ignore[attr-defined]
    do()
    started = time.perf_counter()
    found = do()
    return time.perf_counter() - started, found


def measure_steps(rounds: int, context: int) -> None:
    """All ways in turn, two steps each, of which the second counts. Peaks are the process's."""
    steps = {attention: make_step(attention, context) for attention in ("sdpa", "eager")}
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}

    def take(settings: set[str]) -> None:
        with Runtime(torch.device("cpu"), torch.float32, rounds="rounds" in settings).training():
            steps["eager" if "eager" in settings else "sdpa"]()

    for number in range(rounds):
        for way, settings in WAYS.items():
            keep_freed_memory("kept" in settings)
            release_memory()
            CLEAR_PEAK.write_text("5")
            take(settings)  # not timed: the first step after memory was returned fetches it again
            started, worked = time.perf_counter(), time.process_time()
            take(settings)
            figures = time.perf_counter() - started, time.process_time() - worked, resident("VmHWM") / 1e6
            print(
                f"round {number}, {way}: {figures[0]:.2f} s, {figures[1]:.2f} s computed, {figures[2]:.0f} MB",
                flush=True,
            )
            found[way].append(figures)
    print(
        "by way: tokens/s; tokens per second that the cores computed for this process, and as a multiple of exact; peak"
    )
    for way, each in found.items():
        rates = [context / wall for wall, _, _ in each]
        computed = [context / used for _, used, _ in each]
        peaks = [peak for _, _, peak in each]
        ratios = [base[1] / used for base, (_, used, _) in zip(found["exact"], each, strict=True)]
        print(f"{way}: {spread(rates)}; {spread(computed)}, {spread(ratios)}; {spread(peaks)} MB", flush=True)


def keep_freed_memory(kept: bool) -> None:
    """Let malloc keep freed memory, or behave as it does by itself once it has adapted to large tensors."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((-4, 0), (-1, -1)) if kept else ((-4, 65_536), (-3, 2**25), (-1, 2**26)):
        assert libc.mallopt(parameter, value)


def make_step(attention: str, context: int) -> Callable[[], object]:
    """Forward and backward of a student of 30 layers on one block, from the teacher's last hidden states."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)  # fmt: skip
    student = Headless(LlamaForCausalLM._from_config(config, attn_implementation=attention).eval())
    ids = torch.randint(VOCAB, (1, context))
    states = States(torch.randn(1, context, HIDDEN), Head(torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5))

    def step() -> None:
        student(ids, lambda hidden, head: logit_loss(hidden, head, states, forward_kl_, context)).backward()
        student.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
