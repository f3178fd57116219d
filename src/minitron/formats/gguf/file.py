"""Writes a GGUF file tensor by tensor, so that a model larger than memory can be exported."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from minitron import __version__
from minitron.files import require_space, whole_file
from minitron.formats.gguf.architectures import Architecture, metadata_of
from minitron.formats.gguf.source import Source
from minitron.formats.gguf.tensors import encoded, extra_tensors, num_bytes, plan_tensors
from minitron.formats.gguf.vocabulary import Vocabulary
from minitron.model.checkpoint import Checkpoint
from minitron.progress import Progress

FILE_TYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
"""The types of matrices that the gguf package writes."""


def write_file(
    path: Path, checkpoint: Checkpoint, architecture: Architecture, *, vocabulary: Vocabulary, type: str
) -> dict[str, int]:
    """Write a checkpoint as a GGUF file, completely or not at all; return the number of tensors of each type.

    Raises:
        UserError: the disk is full, a tensor has no place in the file, or its numbers cannot be stored.
    """
    source = Source.of(checkpoint)
    matrix_type, file_type = FILE_TYPES[type]
    planned, extra = plan_tensors(source, architecture, matrix_type), extra_tensors(source)
    total = sum(map(num_bytes, planned))
    require_space(path, total)
    logging.getLogger("gguf").setLevel(logging.ERROR)
    with whole_file(path) as staging:
        writer = gguf.GGUFWriter(staging, architecture.name)
        try:
            _add_metadata(writer, metadata_of(source, architecture), file_type)
            _add_vocabulary(writer, vocabulary)
            writer.add_name(path.stem)
            for name, value in extra.items():
                writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes)
            for tensor in planned:
                size = num_bytes(tensor)
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=tensor.type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for value in extra.values():
                writer.write_tensor_data(value)
            with Progress(f"write {path.name}", total, "bytes") as progress:
                for tensor in planned:
                    writer.write_tensor_data(encoded(tensor.value(checkpoint, source), tensor))
                    progress.advance(num_bytes(tensor))
        finally:
            writer.close()
    return dict(Counter(tensor.type.name.lower() for tensor in planned))


def _add_metadata(writer: Any, metadata: dict[str, Any], file_type: gguf.LlamaFileType) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("minitron.version", __version__)
    for name, value in metadata.items():
        getattr(writer, f"add_{name}")(value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_merges(vocabulary.merges)
    for role, number in vocabulary.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    for role, adds in vocabulary.adds.items():
        getattr(writer, f"add_add_{role}_token")(adds)
    if vocabulary.adds_space is not None:
        writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
