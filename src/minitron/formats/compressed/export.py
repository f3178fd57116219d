"""Exports a model in the layout of compressed-tensors: FP8, or integers of eight or four bits."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from minitron.errors import UserError
from minitron.formats import Request
from minitron.formats.compressed.check import compare
from minitron.formats.compressed.inputs import Largest, largest_inputs
from minitron.history import record_step
from minitron.model import schemes
from minitron.model.anatomy import in_backbone
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.schemes import SCALE_DTYPE, Scheme, scheme_for
from minitron.model.writing import write_checkpoint
from minitron.progress import Progress
from minitron.run import versions
from minitron.session import Session

SCHEME_OF = {"fp8": "fp8", "w8a8": "int8", "w4a16": "int4"}
"""The scheme of each format."""
STORED_AS = {"fp8": "float-quantized", "int8": "int-quantized", "int4": "pack-quantized"}
"""The library's name for how the values of each scheme are stored."""
STEP = "quantise"


def export(session: Session, folder: Path, request: Request) -> dict[str, Any]:
    """Write a model folder with quantised weights into an existing folder; return what was written and checked.

    Matrices are read, rounded and written one by one. FP8 runs the calibration text through the model first, for the
    scales of the inputs.

    Raises:
        UserError: a type of matrices is asked for, the layout cannot represent the model, or transformers reads other
            weights than were written.
    """
    if request.quantize:
        raise UserError(
            f"--quantize {request.quantize} is for --format gguf: {request.format} has one type of matrices"
        )
    checkpoint = session.teacher
    scheme = scheme_for(SCHEME_OF[request.format], checkpoint.arch)
    if reason := _unreadable(checkpoint.arch, scheme):
        raise UserError(f"--format {request.format}: {reason}; take fp8")
    if request.checks:
        _ = session.splits  # text that cannot be read ends the export before any work
    inputs = largest_inputs(session) if scheme.activations == "tensor" else {}
    step = _step(session, scheme, library_version=version("compressed-tensors"))
    config = deepcopy(checkpoint.config)
    config.dtype = SCALE_DTYPE
    config.quantization_config = quantisation_config(checkpoint.arch, scheme)
    with Progress(f"write {request.format}", checkpoint.num_bytes, "bytes") as progress:
        tensors = _tensors(checkpoint, scheme, inputs, progress.advance)
        write_checkpoint(folder, config, tensors, companions_from=checkpoint.folder)
    record_step(folder, checkpoint.folder, step)
    files = sorted(folder.glob("*.safetensors"))
    return {
        "file": files[0].name if len(files) == 1 else "model.safetensors.index.json",
        "type": scheme.name,
        "group": scheme.group,
        "activations": scheme.activations,
        "architecture": config.architectures[0],
        "num_bytes": sum(file.stat().st_size for file in files),
        "num_bytes_before": checkpoint.num_bytes,
        "library": step["library"],
        "calibration": step["calibration"],
        "checked": compare(session, folder, scheme) if request.checks else None,
    }


def _unreadable(arch: Arch, scheme: Scheme) -> str | None:
    """Return why transformers (5.23) loads no such folder, or None."""
    if scheme.name == "int8" and any(row.is_per_expert for row in schemes.quantised_rows(arch)):
        return "transformers loads no experts of eight-bit integers"  # integrations/compressed_tensors.py
    if scheme.name == "int4" and arch.model_type == "mamba2":
        return "transformers loads no packed matrices in mamba2 models"  # modeling_mamba2.py: _init_weights
    return None


def quantisation_config(arch: Arch, scheme: Scheme) -> dict[str, Any]:
    """Return the `quantization_config` of a model whose matrices are quantised by a scheme, for its `config.json`."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    kind = {"num_bits": scheme.bits, "type": "float" if scheme.dtype.is_floating_point else "int"}
    groups = {"strategy": "group", "group_size": scheme.group} if scheme.group else {"strategy": "channel"}
    rounded = {"strategy": scheme.activations, "dynamic": scheme.activations == "token", "observer": None}
    stored = STORED_AS[scheme.name]
    group = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**kind, **groups, symmetric=True, observer=None),
        input_activations=QuantizationArgs(**kind, **rounded, symmetric=True) if scheme.activations else None,
        format=stored,
    )
    config = QuantizationConfig(
        config_groups={"group_0": group},
        format=stored,
        quantization_status="compressed",
        ignore=_left_alone(arch),
    )
    values: dict[str, Any] = config.model_dump(mode="json")
    return values


def _left_alone(arch: Arch) -> list[str]:
    """Return the linear modules that are not quantised, as the library names them: the output matrix, and routers.

    transformers names the output matrix `lm_head` in every family, vLLM as in files. Names in memory may have another
    first part than names in files, which the patterns leave open.
    """
    output = next(row for row in reversed(arch.family.rows) if row.axes == {"vocab", "hidden"})
    routers = [row for row in arch.rows if row.dimensions == schemes.ROUTER and not row.is_per_expert]
    patterns = [in_backbone(row.owner).replace(".", r"\.").replace(r"{i}", r"\d+") for row in routers]
    return [*dict.fromkeys(["lm_head", output.owner]), *(f"re:.*{pattern}$" for pattern in patterns)]


def _tensors(
    checkpoint: Checkpoint, scheme: Scheme, inputs: Largest, advance: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the new folder; what is not quantised becomes bfloat16 where it had the model's dtype."""
    quantised = set(schemes.quantised_rows(checkpoint.arch))
    for name in checkpoint.tensors:
        value, place = checkpoint.checked_tensor(name), checkpoint.arch.match(name)
        advance(value.nbytes)
        if place is None or place.row not in quantised:
            yield name, value.to(SCALE_DTYPE) if value.dtype == checkpoint.dtype else value
            continue
        assert place.layer is not None
        yield from stored_tensors(name, value, scheme)
        if inputs:
            yield _named(name, "input_scale"), schemes.input_scale(inputs[place.row, place.layer], scheme)


def stored_tensors(name: str, weight: Tensor, scheme: Scheme) -> Iterator[tuple[str, Tensor]]:
    """Yield what is stored of a matrix: its values, packed if they have four bits, and its scales."""
    scales = schemes.scales(weight, scheme)
    values = schemes.quantised(weight, scales, scheme)
    if scheme.bits < 8:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        yield _named(name, "weight_packed"), pack_to_int32(values, scheme.bits)
        yield _named(name, "weight_shape"), tensor(weight.shape)
    else:
        yield name, values
    yield _named(name, "weight_scale"), scales


def _named(weight: str, part: str) -> str:
    return f"{weight.removesuffix('weight')}{part}"


def _step(session: Session, scheme: Scheme, library_version: str) -> dict[str, Any]:
    """Return the step of the history: the scheme, the library, and the text that input scales were measured on."""
    recipe, calibration = session.recipe, None
    if scheme.activations == "tensor":
        blocks = session.calibration_blocks
        calibration = {"data": recipe.data, "tokens": blocks.num_tokens, "context": blocks.context}
    return {
        "step": STEP,
        "of": recipe.teacher,
        "scheme": scheme.name,
        "group": scheme.group,
        "activations": scheme.activations,
        "calibration": calibration,
        "library": {"compressed-tensors": library_version},
        "seed": session.runtime.seed,
        "versions": versions(),
    }
