"""Finds the file of every tensor of a model folder, as transformers finds it, and names what makes a folder unusable.

Nothing here imports torch, and no weight is read: names, shapes and dtypes come from the headers of files.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minitron.errors import UserError
from minitron.files import read_json

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
"""Suffixes of weight files that can execute code when loaded."""
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs"
"""The beginning of the small file that Git leaves in the place of a large one that was not downloaded."""

FLOATS = {"F64", "F32", "F16", "BF16"}
"""The dtypes of weights that can be pruned, as headers of safetensors files name them."""

QUANTISED_BY = {
    "hf_quant_config.json": "NVIDIA Model Optimizer",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
}
"""Files beside the config that state how weights are quantised, where `config.json` does not."""
QUANTISED_ENTRIES = {
    "quantization_config": "quant_method",
    "compression_config": "quant_method",
    "quantization": "bits",
}
"""Config entries that state how weights are quantised, each with the entry inside that names the method or width."""
DEQUANTISED = ("fp8", "compressed-tensors", "modelopt", "mxfp4", "awq", "gptq", "bitsandbytes")
"""The methods of a `quantization_config` whose weights `open_teacher` dequantises (see `model.quantised`)."""

WRAPPERS = {
    "_orig_mod.": "a model that torch.compile wraps: save the model inside it (`model._orig_mod`)",
    "module.": "a model that DataParallel wraps: save the model inside it (`model.module`)",
    "_forward_module.": "a model that a trainer wraps: save the model inside it",
    "_fsdp_wrapped_module.": "a model that FSDP wraps: save its full state dict",
    "language_model.": "a multimodal model: --text-only reads its text model, if its config states one",
    "model.language_model.": "a multimodal model: --text-only reads its text model, if its config states one",
    "base_model.model.": "a PEFT model: merge its adapter (`merge_and_unload`), then save the merged model",
}
"""Beginnings of names that transformers does not load, and what was saved there."""

FOREIGN = {
    "*.safetensors": "weights under names that transformers does not load: it loads model.safetensors, or the shards "
    "that model.safetensors.index.json names",
    "*.gguf": "a GGUF file: pass the path of the file itself",
    "*.distcp": "a distributed checkpoint: convert it with torch.distributed.checkpoint.format_utils first",
    "*.nemo": "a NeMo archive: convert it to a Hugging Face checkpoint first",
    "*.onnx": "an ONNX export, which cannot be pruned: take the model that it was made of",
    "tf_model.h5": "TensorFlow weights: convert them with an older transformers (from_tf) first",
    "flax_model.msgpack": "Flax weights: convert them with an older transformers (from_flax) first",
}
"""Files of other formats, by pattern, and what to do with them."""


def locate_tensors(folder: Path, explicit: str | None = None) -> dict[str, Path]:
    """Return the file of every tensor, by the tensor's name in files, decided as transformers decides it.

    The file that the config names (`explicit`, its entry `transformers_weights`) comes first, then a single
    `model.safetensors`, then the shards that an index names. All tensors of a shard count, whether the index lists them
    or not, and of equal names the one in the last shard.

    Raises:
        UserError: there are no such files, or one is missing, truncated, corrupt or not downloaded.
    """
    first = folder / (explicit or SINGLE)
    index = folder / INDEX
    if explicit and explicit.endswith(".index.json"):
        first, index = folder / SINGLE, folder / explicit
    elif first.is_file():
        return dict.fromkeys(open_safetensors(first).keys(), first)
    if index.is_file():
        shards = [folder / name for name in sorted(set(_weight_map(index).values()))]
        return {name: shard for shard in shards for name in open_safetensors(shard).keys()}  # noqa: SIM118
    raise _without_weights(folder)


def is_ambiguous(folder: Path) -> bool:
    """Return whether a folder holds a single weight file as well as an index of other files."""
    if not ((folder / SINGLE).is_file() and (folder / INDEX).is_file()):
        return False
    return set(_weight_map(folder / INDEX).values()) != {SINGLE}


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file, its tensors as those of torch.

    Raises:
        UserError: the file is missing, truncated, corrupt or not downloaded.
    """
    with naming(path):
        return safe_open(path, framework="pt")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn the exceptions of reading a safetensors file into a `UserError` that names the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if is_pointer(path):
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull there") from error
        raise UserError(f"{path} is missing, truncated or corrupt: {error}") from error


def is_pointer(path: Path) -> bool:
    """Return whether a file is the pointer that Git LFS leaves where the file was not downloaded."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(POINTER)) == POINTER


def require_plain_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Check that a folder holds a whole model that is not quantised, as far as its config and its files state it.

    Raises:
        UserError: its weights are quantised, or it holds a LoRA adapter.
    """
    convert = (
        "convert them to bfloat16 first, or take an unquantised checkpoint; a teacher is dequantised on reading if its "
        f"quant_method is one of {', '.join(DEQUANTISED)}"
    )
    for entry, method in QUANTISED_ENTRIES.items():
        if stated := config.get(entry):
            values = stated if isinstance(stated, dict) else {}
            how = (
                f"{values[method]} bits" if type(values.get(method)) is int else values.get(method, "of unknown method")
            )
            raise UserError(f"{folder} holds quantised weights ({how}); {convert}")
    for name, method in QUANTISED_BY.items():
        if (folder / name).is_file():
            raise UserError(f"{folder} holds weights quantised by {method} ({name}); {convert}")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds {_adapter(folder)}")


def require_unwrapped(folder: Path, names: Iterable[str]) -> None:
    """Check that names of tensors do not begin as those of a model that a training tool has wrapped.

    Raises:
        UserError: they do; the message states what was saved.
    """
    for name in names:
        for beginning, what in WRAPPERS.items():
            if name.startswith(beginning):
                raise UserError(f"{folder}: tensor names begin with '{beginning}', so this is {what}")


def _adapter(folder: Path) -> str:
    values = read_json(folder / "adapter_config.json")
    base = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    return (
        f"a LoRA adapter (adapter_config.json){f' of {base}' if base else ''}: merge it into its base model with peft "
        "(merge_and_unload), save that, and take the merged model"
    )


def explain_missing_config(folder: Path) -> str:
    """Return why a folder has no `config.json`, as far as what it holds shows it; '' where nothing does."""
    if (folder / "adapter_config.json").is_file():
        return f": it holds {_adapter(folder)}"
    snapshots = sorted(folder.glob("snapshots/*/config.json"))
    if snapshots:
        return f": did you mean {snapshots[-1].parent}?"
    nested = sorted(folder.glob("*/config.json")) if folder.is_dir() else []
    if len(nested) == 1:
        return f": did you mean {nested[0].parent}?"
    if (folder / "params.json").is_file():
        return ": params.json is the format of the model's own authors; take its Hugging Face release"
    for pattern, what in FOREIGN.items():
        if pattern != "*.safetensors" and (found := sorted(folder.glob(pattern))):
            return f": {found[0].name} is {what}"
    return ""


def _weight_map(index: Path) -> dict[str, str]:
    values = read_json(index)
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index} has no weight_map of tensor names to files")
    return weight_map


def _without_weights(folder: Path) -> UserError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        # transformers reads such files with weights_only=True, which builds tensors and runs nothing else.
        convert = "from transformers import AutoModelForCausalLM as M; M.from_pretrained(f).save_pretrained(f)"
        return UserError(
            f"{folder} holds pickled weights ({pickles[0]}), which can execute code when loaded; this command reads "
            f"tensors alone, and writes model.safetensors beside them: python -c \"f='{folder}'; {convert}\""
        )
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        return UserError(f"{folder} holds {shards[0].name} and no {INDEX}, without which transformers loads no shards")
    for pattern, what in FOREIGN.items():
        if found := sorted(folder.glob(pattern)):
            return UserError(f"{folder}: {found[0].name} is {what}")
    return UserError(f"{folder} holds no {SINGLE} and no {INDEX}")
