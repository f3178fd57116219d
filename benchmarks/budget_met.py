"""Measures whether the saved student of a run keeps to the budget of the run.

    python benchmarks/budget_met.py RUN

Memory: the student is loaded in the budget's dtype and reads the budget's batch × context tokens, a piece at a time;
then the bytes of its parameters and of its cache are added up. Speed: student and teacher are timed in turn on the
device and in the dtype of the search. The student's seconds are the teacher's seconds in the search times the median
ratio of student to teacher, as in the search itself. Prints one line of JSON per limit: limit, prediction, measurement.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.evaluation.speed import alternate
from minitron.files import read_json, read_jsonl
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.runtime import resolve_device

PIECE_TOKENS = 512
NUM_TURNS = 15


def main() -> None:
    """Measure every figure that the run's budget limits."""
    run = Path(sys.argv[1])
    search = read_json(run / "search.json")
    [chosen] = [row for row in read_jsonl(run / "candidates.jsonl") if row["chosen"]]
    device = resolve_device(search["speed_of"]["device"].split(" ")[0])
    if "memory_bytes" in search["limits"]:
        held = bytes_held(run / "student", device, **search["memory_of"])
        show("memory", search["limits"]["memory_bytes"], chosen["memory_bytes"], held)
    for name in {"prefill_seconds", "decode_seconds"} & set(search["limits"]):
        conditions = search["speed_of"]
        dtype = getattr(torch, conditions["dtype"])
        models = {key: load_model(open_checkpoint(run / key), device, dtype) for key in ("teacher", "student")}
        speeds = alternate(models, conditions["batch"], conditions["context"], NUM_TURNS)
        teacher, student = ([getattr(speed, name) for speed in speeds[key]] for key in ("teacher", "student"))
        ratios = [s / t for s, t in zip(student, teacher, strict=True)]
        measured = search["teacher_speed"][name] * statistics.median(ratios)
        faster = [round(1 / ratio, 3) for ratio in sorted(ratios, reverse=True)]
        more = {"teacher": teacher, "student": student, "faster_than_teacher": faster}
        show(name, search["limits"][name], chosen[name], measured, **more)


def show(name: str, limit: dict[str, float], predicted: float, measured: float, **more: Any) -> None:
    """Print one line of JSON."""
    row = {"what": name, "limit": limit["high"], "predicted": predicted, "measured": measured}
    row |= {"measured_over_predicted": round(measured / predicted, 4), "met": measured <= limit["high"], **more}
    print(json.dumps(row), flush=True)


@torch.no_grad()
def bytes_held(folder: Path, device: torch.device, batch: int, context: int, dtype: str) -> int:
    """Return the bytes of the parameters, each storage counted once, and of a cache of batch × context tokens."""
    model = load_model(open_checkpoint(folder), device, getattr(torch, dtype))
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
    ids = torch.randint(model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
    cache: dict[str, Any] = {}
    for piece in ids.to(device).split(PIECE_TOKENS, dim=1):
        output = model(input_ids=piece, use_cache=True, logits_to_keep=1, **cache)
        name = "cache_params" if "cache_params" in output else "past_key_values"
        cache = {name: output[name]}
    [filled] = cache.values()
    names = ("keys", "values", "recurrent_states", "conv_states")
    tensors = [value for layer in filled.layers for name in names if (value := getattr(layer, name, None)) is not None]
    flat = [tensor for value in tensors for tensor in (value.values() if isinstance(value, dict) else [value])]
    cache_bytes = sum(tensor.nbytes for tensor in flat if isinstance(tensor, Tensor))
    return int(sum(storage.nbytes() for storage in storages.values()) + cache_bytes)


if __name__ == "__main__":
    main()
