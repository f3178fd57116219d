"""Runs models' ONNX graphs in ONNX Runtime: tiny models of every family, or a student and its teacher.

    python -m benchmarks.onnx_in_onnxruntime families [NAME …]
    python -m benchmarks.onnx_in_onnxruntime models STUDENT [TEACHER] --out FOLDER [--types f32,int8] [--data wiki]

For families, the logits of transformers are compared with those of a prompt, of tokens decoded one by one, and of a
batch whose first sequence is padded on its left. For models, perplexity and KL are of the first evaluation blocks of
the data, and speeds are those of teacher and student in turn, on the threads that are asked for.
Needs `pip install 'minitron[onnx]'`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir
import torch

from minitron import Session, export, open_teacher
from minitron.evaluation.speed import Speed, figures_of
from minitron.files import read_json
from minitron.formats import RECORD
from minitron.formats.onnx import export as onnx_export
from minitron.formats.onnx.decoder import Decoder, engine
from minitron.formats.onnx.export import ROUNDED
from minitron.model.language_model import load_model
from minitron.progress import disable_progress
from minitron.recipe import recipe_from
from minitron.verbs.export import Exported
from tests.exports import EXPORTED, make_exported

VERSIONS = ("onnx", "onnxscript", "onnxruntime", "transformers", "torch")
DECODED_TOKENS = 64


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    families = kinds.add_parser("families")
    families.add_argument("names", nargs="*")
    models = kinds.add_parser("models")
    models.add_argument("student")
    models.add_argument("teacher", nargs="?")
    models.add_argument("--out", type=Path, required=True)
    models.add_argument("--types", default="f32,f16,int8")
    models.add_argument("--speed-types", default="f32,int8")
    models.add_argument("--data", default="wiki")
    models.add_argument("--context", type=int, default=512)
    models.add_argument("--blocks", type=int, default=4)
    models.add_argument("--threads", type=int, default=2)
    models.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def family(name: str, tokens: int = 96, padding: int = 7) -> dict[str, Any]:
    """Export a tiny model and return the largest differences of its logits, and their size."""
    with tempfile.TemporaryDirectory() as work:
        folder = make_exported(Path(work) / "model", name)
        started = time.process_time()
        try:
            done = export(folder, Path(work) / "out", format="onnx", check="onnxruntime")
        except Exception as error:  # refused, or a family that the exporter cannot trace
            return {"model": name, "error": f"{error.__class__.__name__}: {' '.join(str(error).split())[:300]}"}
        seconds = time.process_time() - started
        decoder = Decoder(done.file, 1)
        model = load_model(open_teacher(str(folder)), torch.device("cpu"), torch.float32)
        ids = torch.randint(5, 300, (2, tokens), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = model(ids).logits
            padded = model(ids, attention_mask=mask, position_ids=positions).logits
        at_once, _ = decoder(ids.numpy())
        one_by_one = np.stack([decoder.logits(row) for row in ids.tolist()])
        batch, _ = decoder(ids.numpy(), mask=mask.numpy())
        seen = mask.bool().numpy()
        return {
            "model": name,
            "prompt": float(np.abs(at_once - expected.numpy()).max()),
            "decoding": float(np.abs(one_by_one - expected.numpy()).max()),
            "padded": float(np.abs(batch - padded.numpy())[seen].max()),
            "largest_logit": float(expected.abs().max()),
            "kl_of_texts": done.record["checked"]["kl"],
            "seconds": round(seconds, 1),
        }


def against_transformers(path: Path, model: Any, blocks: list[list[int]], threads: int) -> dict[str, float]:
    """Return perplexities of the next tokens of the blocks, KL from transformers in nats, and top-1 agreement."""
    decoder = Decoder(path, threads)
    kl, agreed, losses, counted = 0.0, 0, np.zeros(2), 0
    for block in blocks:  # one at a time: the logits of a block take 100 MB
        logits, _ = decoder(np.array([block]))
        with torch.no_grad():
            p = model(torch.tensor([block])).logits[0].log_softmax(-1)
        q = torch.from_numpy(logits[0]).float().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum(-1)[:-1].sum())
        agreed += int((p.argmax(-1) == q.argmax(-1))[:-1].sum())
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


def timed(decoder: Decoder, context: int) -> Speed:
    """Time a prefill of random tokens, and the median of the tokens decoded after it; logits are of all positions."""
    ids = np.random.default_rng(0).integers(0, 40_000, (1, context + DECODED_TOKENS))
    started = time.perf_counter()
    _, cache = decoder(ids[:, :context])
    prefill, steps = time.perf_counter() - started, []
    for i in range(context, context + DECODED_TOKENS):
        started = time.perf_counter()
        _, cache = decoder(ids[:, i : i + 1], cache)
        steps.append(time.perf_counter() - started)
    return Speed(prefill, statistics.median(steps), 1, context)


def speeds(paths: dict[str, Path], given: argparse.Namespace) -> dict[str, Any]:
    """Time graphs in turn, once each to warm up and then as often as asked for."""
    decoders = {name: Decoder(path, given.threads) for name, path in paths.items()}
    turns: dict[str, list[Speed]] = {name: [] for name in paths}
    for repeat in range(given.repeats + 1):
        for name, decoder in decoders.items():
            speed = timed(decoder, given.context)
            if repeat:
                turns[name].append(speed)
    sizes = {name: {"num_bytes": path.with_name(f"{path.name}_data").stat().st_size} for name, path in paths.items()}
    return figures_of(turns, sizes)


def exported(given: argparse.Namespace, who: str, type: str) -> Exported:
    """Export the student or the teacher in a type, unless an earlier call has.

    Graphs are traced in floating point only, which takes a minute or more: rounding starts from that in float32.
    """
    out: Path = given.out / f"{who}-{type}"
    if (out / RECORD).is_file():
        return Exported(out, read_json(out / RECORD))
    again: Any = nullcontext()
    if type == ROUNDED:
        whole = exported(given, who, "f32").file
        again = patch.object(onnx_export, "trace", lambda _: onnx_ir.load(whole))
    with again:
        done: Exported = export(getattr(given, who), out, format="onnx", quantize=type, check="onnxruntime")
    return done


def models(given: argparse.Namespace) -> dict[str, Any]:
    """Export a student in every type, compare it with transformers, and time it in turn with its teacher."""
    checkpoint = open_teacher(given.student)
    recipe = recipe_from(None, teacher=given.student, data=given.data, context=given.context)
    blocks = Session(recipe).splits.evaluation.ids[: given.blocks].tolist()
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    figures: dict[str, Any] = {
        "student": Path(given.student).name,
        "num_parameters": checkpoint.arch.num_parameters,
        "data": f"{given.data}, the first {len(blocks)} evaluation blocks of {given.context} tokens, seed 0",
        "types": {},
    }
    files: dict[str, dict[str, Path]] = {}
    for type in given.types.split(","):
        done = exported(given, "student", type)
        compared = against_transformers(done.file, model, blocks, given.threads)
        figures["types"][type] = {
            "num_bytes": done.record["num_bytes"],
            "texts": done.record["checked"],
            "blocks": compared,
        }
        files[type] = {"student": done.file}
    del model
    if given.teacher:
        figures["teacher_parameters"] = open_teacher(given.teacher).arch.num_parameters
        figures["speed"] = {"context": given.context, "decoded_tokens": DECODED_TOKENS, "repeats": given.repeats}
        for type in given.speed_types.split(","):
            paths = {**files[type], "teacher": exported(given, "teacher", type).file}
            figures["speed"][type] = speeds(paths, given)
            figures["speed"][f"{type}_load"] = os.getloadavg()
    return figures


def main() -> None:
    """Print the figures as JSON: a line per family, or one object for models."""
    given = arguments()
    machine = {
        "versions": {name: version(name) for name in VERSIONS},
        "engine": engine(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if given.kind == "models":
        print(json.dumps({**machine, "threads": given.threads, **models(given)}, indent=1))
        return
    disable_progress()
    print(json.dumps(machine))
    EXPORTED["opt"] = ("opt", {})
    for name in given.names or EXPORTED:
        print(json.dumps(family(name)), flush=True)


if __name__ == "__main__":
    main()
