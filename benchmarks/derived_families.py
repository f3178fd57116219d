"""Compresses a tiny random model of families whose tables were derived, and loads the students in a process of its own.

    python benchmarks/derived_families.py WORK MODEL_TYPE ... --data FILE

Each model is made by transformers from the sizes of a specimen, with a tokenizer of bytes, and compressed to 0.8 of its
parameters with all stages: importance, search, cut, repair and distillation. The result is a line of JSON per family:
parameters, the perplexity of teacher, pruned model and student, seconds, and how many parameters the student has when
transformers alone loads it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import minitron
from minitron.derivation.specimens import specimen
from minitron.derivation.tables import design_of

RESULTS = Path(__file__).parent / "results" / "derived_families.jsonl"
FRESH = """
import sys
from transformers import AutoModelForCausalLM
print(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False).num_parameters())
"""


def main() -> None:
    """Compress the families that are asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("model_types", nargs="+")
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    minitron.configure_backends()
    for name in options.model_types:
        row = {"model_type": name, **compressed(name, options.work, options.data)}
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def compressed(model_type: str, work: Path, data: str) -> dict[str, object]:
    """Make a tiny model of a family, compress it, and return what became of it."""
    teacher, out, started = work / f"{model_type}-teacher", work / f"{model_type}-run", time.monotonic()
    minitron.families(model_type)  # derives the table if it is not part of the package
    make_model(model_type, teacher)
    settings: dict[str, Any] = {
        "distill.tokens": 8_192, "distill.batch_size": 8, "calibration.tokens": 2_048, "evaluation.tokens": 2_048,
    }  # fmt: skip
    minitron.compress(str(teacher), out, target_params=0.8, data=data, context=64, overwrite=True, **settings)
    figures = json.loads((out / "eval.json").read_text())
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH, str(out / "student")], capture_output=True, text=True, check=True
    ).stdout
    return {
        "parameters": [figures[each]["num_parameters"] for each in ("teacher", "student")],
        "perplexity": [round(figures[each]["perplexity"], 3) for each in ("teacher", "pruned", "student")],
        "loads_with_parameters": int(fresh),
        "seconds": round(time.monotonic() - started, 1),
    }


def make_model(model_type: str, folder: Path) -> None:
    """Save a tiny random model with a tokenizer of bytes."""
    specimen(model_type, design_of(model_type)).save(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main()
