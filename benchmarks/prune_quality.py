"""How far from the teacher a cut model starts: perplexity before any training, plain and with each repair.

    python benchmarks/prune_quality.py [TEACHER] [--tokens 16k]

Cuts the teacher (by default the built-in smollm2) to each shape of `SHAPES`, with importance, energies and second
moments from the same calibration tokens, and prints a line a shape and repair: parameters, perplexity, seconds to work it out.
"""

import argparse
import json
import time

from torch import Tensor

from minitron.inputs import Inputs
from minitron.measure.perplexity import measure_perplexity
from minitron.model.causal import build_model
from minitron.model.checkpoint import student_config
from minitron.prune.importance import select
from minitron.prune.repair import Repairs, measure_repairs
from minitron.prune.trim import trimmed
from minitron.recipe import PruneRecipe, Recipe, parse_count

SHAPES = [
    {"intermediate_size": 768},
    {"hidden_size": 448, "intermediate_size": 1152},
    {"num_attention_heads": 6, "intermediate_size": 1024},
    {"intermediate_size": 960, "num_hidden_layers": 26},
]
REPAIRS = {
    "plain": PruneRecipe(),
    "rescale_norms": PruneRecipe(rescale_norms=True),
    "refit": PruneRecipe(refit=True),
    "both": PruneRecipe(rescale_norms=True, refit=True),
}


def main() -> None:
    """A line a shape and repair."""
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", nargs="?", default="smollm2")
    parser.add_argument("--tokens", type=parse_count, default=16_384)
    options = parser.parse_args()
    inputs = Inputs(Recipe.model_validate({
        "teacher": options.teacher, "context": 512, "search": {"tokens": 512}, "evaluation": {"tokens": 8192},
        "calibration": {"tokens": options.tokens}, "distill": {"tokens": options.tokens},
    }))  # fmt: skip
    teacher, blocks = inputs.teacher, inputs.calibration_blocks
    for sizes in SHAPES:
        arch = teacher.arch.resized(**sizes)
        kept = select(inputs.importance, teacher.arch, arch)
        config = student_config(teacher, arch, kept["layer"].tolist())
        for name, recipe in REPAIRS.items():
            started = time.monotonic()
            repairs = measure_repairs(inputs.model, teacher, arch, kept, blocks, recipe)
            seconds = time.monotonic() - started

            def mended(tensor: str, repairs: Repairs = repairs) -> Tensor:
                return repairs.mend(tensor, teacher.tensor(tensor))

            student = build_model(config, trimmed(teacher.arch, arch, kept, mended), inputs.device)
            found = measure_perplexity(student, inputs.splits.evaluation)
            print(json.dumps({
                **sizes, "num_parameters": arch.num_parameters, "repairs": name,
                "perplexity": round(found.perplexity, 2), "num_tokens": found.num_tokens, "seconds": round(seconds, 1),
            }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
