"""Runs a model's GGUF files in llama.cpp: tokens, logits and perplexity against transformers, a chat, and speed.

    python benchmarks/gguf_in_llama_cpp.py STUDENT [TEACHER] --out FOLDER [--types f32,f16,q8_0] [--data wiki]

The text is the first evaluation blocks of the data. Speeds are those of teacher and student in turn, in one type, on
the threads that are asked for; the chat goes through llama.cpp's OpenAI-compatible server. Each prediction is read with
the whole vocabulary, which takes about a second for 49,152 tokens. Needs `pip install 'minitron[llama-cpp]'`, and for
types such as q4_k_m llama-cpp-python too.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from minitron import Session, export, open_teacher
from minitron.evaluation.speed import figures_of
from minitron.formats.gguf import llama_cpp
from minitron.formats.gguf.check import divergence
from minitron.model.language_model import load_model
from minitron.recipe import recipe_from

QUESTION = "What is the capital of France?"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("teacher", nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default="f32,f16,bf16,q8_0")
    parser.add_argument("--speed-type", default="q8_0")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def against_transformers(path: Path, model: Any, blocks: list[list[int]]) -> dict[str, float]:
    """Return perplexities of the next tokens of the blocks, KL from transformers in nats, and top-1 agreement."""
    kl, agreed, losses, counted = 0.0, 0, np.zeros(2), 0
    for block in blocks:  # one at a time: the probabilities of a block take 100 MB
        with torch.no_grad():
            p = model(torch.tensor([block])).logits[0].log_softmax(-1)
        [prediction] = llama_cpp.read(path, [], [block], likeliest=p.shape[1]).predictions
        tokens = torch.from_numpy(prediction.tokens)
        q = torch.empty_like(p).scatter_(1, tokens, torch.from_numpy(prediction.log_probabilities).float())
        kl += float(divergence(p, prediction)[:-1].sum())
        agreed += int((p.argmax(-1) == tokens[:, 0])[:-1].sum())
        targets = torch.tensor(block[1:]).unsqueeze(1)
        losses += [-float(each[:-1].gather(1, targets).sum()) for each in (p, q)]
        counted += len(block) - 1
    transformers_ppl, engine_ppl = np.exp(losses / counted)
    return {
        "kl": kl / counted,
        "agreement": agreed / counted,
        "perplexity": float(engine_ppl),
        "perplexity_in_transformers": float(transformers_ppl),
        "num_tokens": counted,
    }


def chat(path: Path) -> dict[str, Any]:
    """Ask llama.cpp's server one question over HTTP, greedily, and return its answer."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.verbosity = str(path), 1024, -1
    server = xllamacpp.Server(options)
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 48, "temperature": 0}
    answer = httpx.post(f"{server.listening_address}/v1/chat/completions", json=body, timeout=300)
    choice = answer.raise_for_status().json()["choices"][0]
    return {"answer": choice["message"]["content"], "finish_reason": choice["finish_reason"]}


def main() -> None:
    """Write the files into OUT and print the figures as JSON."""
    given = arguments()
    checkpoint = open_teacher(given.student)
    recipe = recipe_from(None, teacher=given.student, data=given.data, context=given.context)
    blocks = Session(recipe).splits.evaluation.ids[: given.blocks].tolist()
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    figures: dict[str, Any] = {
        "student": Path(given.student).name,
        "num_parameters": checkpoint.arch.num_parameters,
        "data": f"{given.data}, the first {len(blocks)} evaluation blocks of {given.context} tokens, seed 0",
        "versions": {name: version(name) for name in ("xllamacpp", "gguf", "transformers", "torch")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {given.threads} threads",
        "types": {},
    }
    for kind in given.types.split(","):
        done = export(
            given.student,
            given.out / f"student-{kind}",
            format="gguf",
            quantize=kind,
            check=["llama.cpp"] if kind == "f32" else [],
            overwrite=True,
        )
        compared = against_transformers(done.file, model, blocks)
        figures["types"][kind] = {"num_bytes": done.record["num_bytes"], "tensors": done.record["tensors"], **compared}
        if kind == "f32":
            figures["texts"] = done.record["checked"]
    del model
    answered = given.out / f"student-{given.speed_type}"
    paths = {"student": next(answered.glob("*.gguf"))}
    figures["chat"] = {"question": QUESTION, **chat(paths["student"])}
    if given.teacher:
        paths["teacher"] = export(
            given.teacher, given.out / "teacher", format="gguf", quantize=given.speed_type, overwrite=True
        ).file
        figures["chat_of_teacher"] = {"question": QUESTION, **chat(paths["teacher"])}
        figures["teacher_parameters"] = open_teacher(given.teacher).arch.num_parameters
    timing = llama_cpp.alternate(paths, given.context, threads=given.threads, repeats=given.repeats)
    sizes = {name: {"num_bytes": path.stat().st_size} for name, path in paths.items()}
    conditions = {"type": given.speed_type, "context": given.context, "decoded_tokens": llama_cpp.DECODED_TOKENS}
    figures["speed"] = {**conditions, "repeats": given.repeats, **figures_of(timing.speeds, sizes)}
    print(json.dumps(figures, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
