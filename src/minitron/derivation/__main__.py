"""`python -m minitron.derivation FOLDER [MODEL_TYPE ...]`: write the table of every `model_type` that has one.

The folder gets a file for each family that no module of `model/families` writes by hand, and `obstacles.json`, which
states for each other `model_type` what stands in the way.
"""

import argparse
import json
import os
from pathlib import Path

from minitron.derivation import UnderivableError, causal_types, derive
from minitron.model.families import FAMILIES
from minitron.progress import Progress, disable_progress


def main() -> None:
    """Derive the families that are asked for, by default all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("model_types", nargs="*")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    names = options.model_types or [name for name in causal_types() if name not in FAMILIES]
    options.folder.mkdir(parents=True, exist_ok=True)
    obstacles: dict[str, str] = {}
    with Progress("derive", len(names), "families") as progress:
        disable_progress()
        for name in names:
            file = options.folder / f"{name}.yaml"
            try:
                file.write_text(derive(name).in_text(), encoding="utf-8")
            except UnderivableError as error:
                obstacles[name] = str(error)
                file.unlink(missing_ok=True)
            progress.advance(1)
    text = json.dumps(obstacles, indent=1, sort_keys=True) + "\n"
    (options.folder / "obstacles.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
