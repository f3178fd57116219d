"""Exports a model as GGUF, with the Modelfile of Ollama."""

from pathlib import Path
from typing import Any

import torch

from minitron.data.tokens import load_tokenizer
from minitron.errors import UserError, nearest
from minitron.formats import Request
from minitron.formats.answers import ends_of
from minitron.formats.gguf import check, llama_cpp
from minitron.formats.gguf.file import FILE_TYPES, write_file
from minitron.formats.gguf.limits import require_architecture
from minitron.formats.gguf.ollama import modelfile
from minitron.formats.gguf.source import Source
from minitron.formats.gguf.vocabulary import read_vocabulary
from minitron.session import Session

EXACT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def export(session: Session, folder: Path, request: Request) -> dict[str, Any]:
    """Write NAME-TYPE.gguf and a Modelfile into an existing folder; return what was written and checked.

    Raises:
        UserError: llama.cpp does not run the model as transformers does, or what is asked for needs llama.cpp.
    """
    checkpoint, name, checks = session.teacher, request.name, request.checks
    exact = EXACT[checkpoint.dtype]
    type = request.quantize or exact
    if type not in FILE_TYPES and type not in llama_cpp.QUANTISED:
        raise UserError(f"--quantize {type}: {nearest(type, [*FILE_TYPES, *llama_cpp.QUANTISED])}")
    source = Source.of(checkpoint)
    architecture = require_architecture(source)
    if type in llama_cpp.QUANTISED:
        llama_cpp.require_installed(f"--quantize {type}", llama_cpp.QUANTISER)
    if checks:
        llama_cpp.require_installed("--check llama.cpp")
    tokenizer = load_tokenizer(checkpoint.folder)
    ends = ends_of(checkpoint, tokenizer)
    vocabulary = read_vocabulary(tokenizer, source.arch.axis_size("vocab"), ends)
    path = folder / f"{name}-{type}.gguf"
    first = path if type in FILE_TYPES else folder / f".{name}-{exact}.gguf"
    types = write_file(first, checkpoint, architecture, vocabulary=vocabulary, type=type if first == path else exact)
    if first != path:
        llama_cpp.quantise(first, path, type)
        first.unlink()
        types = _types(path)
    (folder / "Modelfile").write_text(modelfile(path.name, tokenizer, ends, source.context), encoding="utf-8")
    figures = check.compare(path, checkpoint, tokenizer, is_quantised=type not in EXACT.values()) if checks else None
    return {
        "file": path.name,
        "type": type,
        "architecture": architecture.name,
        "num_bytes": path.stat().st_size,
        "context": source.context,
        "tensors": types,
        "checked": figures,
    }


def _types(path: Path) -> dict[str, int]:
    from collections import Counter

    import gguf

    return dict(Counter(tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(path).tensors))
