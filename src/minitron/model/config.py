"""The config of a model folder, without torch: sizes and booleans with the defaults of their `model_type`."""

from pathlib import Path
from typing import Any

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


def config_values(path: Path, family: str | None = None) -> dict[str, Any]:
    """Return the entries of a folder's `config.json`, or of a config file by itself, with all defaults filled in.

    `family` reads it as another `model_type`.

    Raises:
        UserError: see `checkpoint.read_config`.
    """
    from minitron.model.checkpoint import read_config

    values: dict[str, Any] = read_config(path, family).to_dict()
    return values


def has_weights(path: Path) -> bool:
    """Whether a path is a folder with weights of any format, rather than a config by itself."""
    return path.is_dir() and any(file.suffix in {".safetensors", *PICKLES} for file in path.iterdir())
