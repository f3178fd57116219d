"""What intermediate losses are worth where depth is cut, and through which norms (arXiv 2407.14679, tables 17 and 18).

    python benchmarks/intermediate.py FOLDER TEACHER --data FILE [--layers 3] [--hidden 48] [--tokens 60k] [--seeds 0]

The teacher is cut to some layers, and to a hidden size where one is given. The same pruned model is then distilled on
the same text with the loss of the logits alone, and with losses of embeddings and layer outputs in addition: through
each model's own norms, as the paper has it, or through the teacher's. Printed are perplexity and KL to the teacher on
text of the same kind that no model was trained on.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import minitron
from minitron.quantities import parse_count
from minitron.recipe import Recipe

WAYS: dict[str, dict[str, Any]] = {
    "logits alone": {"of": []},
    "own norms": {"of": ["embedding", "block_output"], "norms": "own"},
    "teacher's norm": {"of": ["embedding", "block_output"], "norms": "teacher"},
}


def main() -> None:
    """Print a line of JSON per student."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("teacher")
    parser.add_argument("--data", required=True)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--tokens", type=parse_count, default=60_000)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    for seed in options.seeds:
        folder = options.folder / f"seed-{seed}"
        sizes = {"num_hidden_layers": options.layers} | ({"hidden_size": options.hidden} if options.hidden else {})
        minitron.prune(options.teacher, folder / "pruned", recipe=recipe(options, seed, {}), **sizes)
        for way, intermediate in WAYS.items():
            student, given = folder / way.replace(" ", "-"), recipe(options, seed, intermediate)
            minitron.distill(options.teacher, folder / "pruned", student, recipe=given)
            found = minitron.evaluate(student, recipe=recipe(options, seed, {}, student), against=options.teacher,
                                      max_tokens=8_192).figures  # fmt: skip
            figures = {name: round(found[name], 4) for name in ("perplexity", "kl")}
            print(json.dumps({"seed": seed, **sizes, "losses": way, **figures}), flush=True)


def recipe(options: argparse.Namespace, seed: int, intermediate: dict[str, Any], model: Any = None) -> Recipe:
    """Return the settings of one student."""
    return Recipe.model_validate({
        "teacher": str(model or options.teacher), "data": options.data, "context": options.context, "seed": seed,
        "calibration": {"tokens": 16_384}, "evaluation": {"tokens": 8_192}, "search": {"tokens": 2_048},
        "distill": {"tokens": options.tokens, "batch_size": 4, "micro_batch_size": 4, "intermediate": intermediate},
    })  # fmt: skip


if __name__ == "__main__":
    main()
