"""Exports a model as fp8, w8a8 and w4a16, and measures each folder in transformers beside the model itself.

    python benchmarks/compressed_weights.py MODEL --out FOLDER [--formats fp8,w8a8,w4a16] [--data wiki] [--context 512]
        [--tokens 16384] [--calibration 16384] [--peers NAME=FOLDER …] [--input-scales 0.25,0.5,2]

Rows: the model as it is, its weights in bfloat16, and every export, all computed in the dtype of the runtime, which is
float32 on a CPU. A peer is a folder in the layout of compressed-tensors that another program has made of that model.
With --input-scales, the FP8 folder is measured again with its input scales multiplied by these numbers. Each row is
printed as soon as it is known. Needs `pip install 'minitron[compressed]'`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from minitron.evaluation import measure
from minitron.evaluation.agreement import Comparison, TeacherStates
from minitron.formats import Request
from minitron.formats.compressed.check import load_quantised
from minitron.formats.compressed.export import export
from minitron.recipe import recipe_from
from minitron.run import versions
from minitron.session import Session


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", default="fp8,w8a8,w4a16")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--calibration", type=int, default=16_384)
    parser.add_argument("--peers", nargs="*", default=[])
    parser.add_argument("--input-scales", default="")
    return parser.parse_args()


def row(name: str, session: Session, model: Any, observer: Any, **further: Any) -> dict[str, Any]:
    """Measure a model, and print its row."""
    figures = measure(model, session.teacher, session.splits.evaluation, stage=name, observer=observer)
    kept: dict[str, Any] = {key: figures[key] for key in ("perplexity", "kl", "top1") if key in figures}
    values: dict[str, Any] = {"name": name, **kept, "num_tokens": figures["num_tokens"], **further}
    print(json.dumps(values), flush=True)
    return values


def megabytes(folder: Path) -> float:
    """Return the size of the weight files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def with_scaled_inputs(model: Any, factor: float) -> Any:
    """Multiply the input scales of a model's linear modules."""
    for module in model.modules():
        if hasattr(module, "input_scale"):
            module.input_scale.data.mul_(factor)
    return model


def main() -> None:
    """Export, measure, and print."""
    given = arguments()
    tokens: dict[str, Any] = {"evaluation": {"tokens": given.tokens}, "calibration": {"tokens": given.calibration}}
    recipe = recipe_from(None, teacher=given.model, data=given.data, context=given.context, **tokens)
    session = Session(recipe)
    session.validate()
    blocks = session.splits.evaluation
    print(json.dumps({**vars(given), "out": str(given.out), "dtype": session.runtime.dtype_name, **versions()}))
    states = TeacherStates(blocks)
    with session.teacher_model() as model:
        row("as it is", session, model, states, megabytes=megabytes(session.teacher.folder))
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
        count = session.teacher.arch.num_parameters
        row("bf16", session, model, Comparison(states), megabytes=2 * count / 1e6)
    del model
    for format in filter(None, given.formats.split(",")):
        folder = given.out / format
        if not folder.exists():
            folder.mkdir(parents=True)
            started = time.perf_counter()
            export(session, folder, Request(format, folder.name))
            print(json.dumps({"export": format, "seconds": time.perf_counter() - started}), flush=True)
        row(format, session, load_quantised(folder, session, blocks), Comparison(states), megabytes=megabytes(folder))
    for peer in given.peers:
        name, _, path = peer.partition("=")
        model = load_quantised(Path(path), session, blocks)
        row(name, session, model, Comparison(states), megabytes=megabytes(Path(path)))
    for factor in map(float, filter(None, given.input_scales.split(","))):
        model = with_scaled_inputs(load_quantised(given.out / "fp8", session, blocks), factor)
        row(f"fp8, input scales × {factor:g}", session, model, Comparison(states))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
