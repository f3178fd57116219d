"""Whether the student of a run keeps to the budget it was made for, as measured on its saved files.

    python benchmarks/budget_met.py RUN

Bytes: the student is loaded in the budget's dtype and reads the budget's batch × context, a piece at a time; then its
parameters and what its cache holds are added up. Speed: the student and its teacher are timed in turn, on the device
and in the dtype of the search, and the student's seconds are the median of its shares of the teacher's times what the
teacher took in the search, as there. Prints a line of JSON each: limit, prediction, measurement.
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

PIECE = 512
TURNS = 15


def main() -> None:
    """Measure what the run's budget limits."""
    run = Path(sys.argv[1])
    search = read_json(run / "search.json")
    [chosen] = [row for row in read_jsonl(run / "candidates.jsonl") if row["chosen"]]
    device = resolve_device(search["speed_of"]["device"].split(" ")[0])
    if "memory_bytes" in search["limits"]:
        held = bytes_held(run / "student", device, **search["memory_of"])
        show("memory", search["limits"]["memory_bytes"], chosen["memory_bytes"], held)
    for name in {"prefill_seconds", "decode_seconds"} & set(search["limits"]):
        models = {who: load_model(open_checkpoint(run / who), device, getattr(torch, search["speed_of"]["dtype"]))
                  for who in ("teacher", "student")}  # fmt: skip
        turns = alternate(models, search["speed_of"]["batch"], search["speed_of"]["context"], TURNS)
        teacher, student = ([getattr(speed, name) for speed in turns[who]] for who in ("teacher", "student"))
        shares = [s / t for s, t in zip(student, teacher, strict=True)]
        measured = search["teacher_speed"][name] * statistics.median(shares)
        show(name, search["limits"][name], chosen[name], measured, teacher=teacher, student=student,
             faster_than_teacher=[round(1 / share, 3) for share in sorted(shares, reverse=True)])  # fmt: skip


def show(name: str, limit: dict[str, float], predicted: float, measured: float, **more: Any) -> None:
    """A line of JSON."""
    row = {"what": name, "limit": limit["high"], "predicted": predicted, "measured": measured}
    row |= {"measured_over_predicted": round(measured / predicted, 4), "met": measured <= limit["high"], **more}
    print(json.dumps(row), flush=True)


@torch.no_grad()
def bytes_held(folder: Path, device: torch.device, batch: int, context: int, dtype: str) -> int:
    """Bytes of the parameters, each storage once, and of a cache of that many tokens."""
    model = load_model(open_checkpoint(folder), device, getattr(torch, dtype))
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
    ids = torch.randint(model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
    cache: dict[str, Any] = {}
    for piece in ids.to(device).split(PIECE, dim=1):
        output = model(input_ids=piece, use_cache=True, logits_to_keep=1, **cache)
        name = "cache_params" if "cache_params" in output else "past_key_values"
        cache = {name: output[name]}
    [held] = cache.values()
    names = ("keys", "values", "recurrent_states", "conv_states")
    tensors = [value for layer in held.layers for name in names if (value := getattr(layer, name, None)) is not None]
    flat = [tensor for value in tensors for tensor in (value.values() if isinstance(value, dict) else [value])]
    of_cache = sum(tensor.nbytes for tensor in flat if isinstance(tensor, Tensor))
    return int(sum(storage.nbytes() for storage in storages.values()) + of_cache)


if __name__ == "__main__":
    main()
