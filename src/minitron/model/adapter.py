"""A LoRA adapter merged into the model that it was trained on, by peft."""

import importlib.util
import warnings
from pathlib import Path

from minitron.errors import UserError
from minitron.files import read_json
from minitron.model.config import COMPANIONS
from minitron.model.weights import INDEX, PICKLES, SINGLE, locate_tensors, naming, open_safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX))


def base_of(folder: Path) -> str:
    """Return the name of the model that an adapter was trained on.

    Raises:
        UserError: the adapter states none, its weights are missing or pickled, or peft is not installed.
    """
    values = read_json(folder / CONFIG)
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    if not base:
        raise UserError(f"{folder / CONFIG} does not state base_model_name_or_path, the model that is adapted")
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for path in folder.glob("adapter_model*") if path.suffix in PICKLES)
        found = f"pickled weights ({pickles[0]}), which can execute code when loaded, and " if pickles else ""
        raise UserError(f"{folder} holds {found}no {WEIGHTS}: save the adapter with a recent peft")
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{folder} holds an adapter, which needs peft to be merged: pip install 'minitron[lora]'")
    return str(base)


def inputs_of(adapter: Path, base: Path) -> list[Path]:
    """Return the files that a merged model follows from."""
    companions = {path for pattern in COMPANIONS for path in adapter.glob(pattern) if path.is_file()}
    own = [adapter / CONFIG, adapter / WEIGHTS, *sorted(companions)]
    return [*own, base / "config.json", *sorted(set(locate_tensors(base).values()))]


def merge(adapter: Path, base: Path, folder: Path) -> None:
    """Write a model with an adapter merged into its matrices, in the model's dtype, and tokenizer files, to a folder.

    The tokenizer files of the adapter, if it has any, take the place of the model's; tokens that it adds get rows.

    Raises:
        UserError: the adapter does not fit the model, or is of a kind that cannot be merged.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from minitron.model.writing import copy_companions

    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True, trust_remote_code=False)
        if (rows := _rows(adapter)) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows)
        with naming(adapter / WEIGHTS):
            stored = load_file(adapter / WEIGHTS)
        with warnings.catch_warnings(action="ignore"):  # whether everything was loaded is checked below
            config = PeftConfig.from_peft_type(**read_json(adapter / CONFIG))
            adapted = get_peft_model(model, config)
            set_peft_model_state_dict(adapted, stored)
        loaded = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if strange := sorted((stored.keys() ^ loaded) - _embeddings(stored.keys() | loaded)):
            raise UserError(f"adapter {adapter} does not fit {base}: {strange[0]} is in one of them alone")
        adapted.merge_and_unload(safe_merge=True).save_pretrained(folder)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"adapter {adapter} cannot be merged into {base}: {reason}") from error
    for source in (base, adapter):
        copy_companions(source, folder)


def _embeddings(names: set[str]) -> set[str]:
    """Return the names of whole embeddings and output matrices, which are stored where tokens were added."""
    return {name for name in names if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))}


def _rows(adapter: Path) -> int:
    """Return the number of tokens of the embeddings that an adapter stores; 0: it stores none."""
    with naming(adapter / WEIGHTS):
        file = open_safetensors(adapter / WEIGHTS)
        sizes = [file.get_slice(name).get_shape()[0] for name in _embeddings(set(file.keys()))]
    return max(sizes, default=0)
