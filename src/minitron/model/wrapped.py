"""The text model inside a multimodal one, written as a checkpoint of its own."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from minitron.errors import UserError
from minitron.files import read_json, require_space, require_writable, whole_folder, write_json
from minitron.model.arch import TIED
from minitron.model.config import COMPANIONS
from minitron.model.families import family_of
from minitron.model.weights import locate_tensors, naming, open_safetensors

PLACES = ("language_model.", "text_model.")
"""Parts of the names of tensors of a text model that is inside another one; without them the names are its own."""
AS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
"""Text models that are another type where there are no images: their positions in three directions are then one."""
OF_IMAGES = ("mrope_section", "mrope_interleaved", "type")
"""Entries of rotary embeddings that only images need."""


def is_wrapped(folder: Path) -> bool:
    """Return whether the config of a folder states a text model inside another one."""
    path = folder / "config.json"
    return path.is_file() and isinstance(read_json(path).get("text_config"), dict)


def extract_text(source: Path, folder: Path) -> None:
    """Write the text model inside a multimodal one to a folder, with its tokenizer files; done once.

    Raises:
        UserError: the text model is of a type that no causal language model has, a tensor of it matches no row of its
            family, or see `family_of`.
    """
    from minitron.model.writing import copy_companions, write_tensors

    config, names, files = _text_config(source), own_names(source), locate_tensors(source)
    config[TIED] = not any(name == "lm_head.weight" for name in names.values())
    num_bytes = sum(path.stat().st_size for path in set(files.values()))

    def tensors() -> Iterator[tuple[str, Any]]:
        for stored, name in names.items():
            with naming(files[stored]):
                yield name, open_safetensors(files[stored]).get_tensor(stored)

    require_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have written it
            require_space(folder, num_bytes)
            with whole_folder(folder) as staging:
                write_tensors(staging, tensors())
                copy_companions(source, staging)
                write_json(staging / "config.json", config)
    logging.warning("%s: its text model alone is read, from %s; images are not", source, folder)


def own_names(source: Path) -> dict[str, str]:
    """Return the tensors in files that belong to the text model, each with the name it has in that model by itself.

    Raises:
        UserError: a tensor of the text model matches no row of its family, or there is none.
    """
    family, files = family_of(_text_config(source)["model_type"]), locate_tensors(source)
    names = {stored: name for stored in files if (name := _own_name(stored)) and family.match(name)}
    if lost := [name for name in files if name not in names and any(place in name for place in PLACES)]:
        raise UserError(f"{source}: tensor {lost[0]} of the text model has no place in a {family.model_type} model")
    if not names:
        raise UserError(f"{source}: no tensor belongs to a {family.model_type} model")
    return names


def inputs_of(source: Path) -> list[Path]:
    """Return the files that the text model of a folder follows from."""
    companions = {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    return [source / "config.json", *sorted(companions), *sorted(set(locate_tensors(source).values()))]


def _text_config(source: Path) -> dict[str, Any]:
    """Return the entries of the config of the text model, as a checkpoint of its own states them."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    whole = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    values: dict[str, Any] = whole.get_text_config().to_dict()
    stated = values["model_type"]
    values["model_type"] = AS.get(stated, stated)
    if values["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{source}: its text model is of type '{stated}', which no causal language model has by itself")
    if stated in AS and isinstance(values.get("rope_parameters"), dict):
        rope = {name: value for name, value in values["rope_parameters"].items() if name not in OF_IMAGES}
        values["rope_parameters"] = rope
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[values["model_type"]]]
    values["dtype"] = read_json(source / "config.json").get("dtype") or values.get("dtype")
    return values


def _own_name(stored: str) -> str:
    """Return the name that a tensor has in the text model by itself."""
    for place in PLACES:
        stored = stored.replace(place, "", 1)
    return stored
