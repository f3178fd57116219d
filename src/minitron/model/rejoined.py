"""A multimodal model with a student in the place of its text model; all else stays as it is.

The other parts write into the residual stream of the text model: a projector's outputs stand where embeddings stand. A
student's stream has other channels, which may be mixtures of the teacher's. The map between both streams is that which
turns the teacher's embeddings into the student's, by least squares: exactly the one of the cut before training, and the
best linear one after it. Every matrix and bias that writes the stream is multiplied by that map. Where a projector's
inner width has to be that of the text model (LLaVA, Mistral 3), its neurons with the largest weights stay.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.files import read_json, require_space, write_json
from minitron.model.arch import TIED
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import quiet_transformers
from minitron.model.weights import locate_tensors, naming, open_safetensors
from minitron.model.wrapped import is_wrapped, own_names
from minitron.model.writing import copy_companions, write_tensors
from minitron.progress import Progress

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that state how images become inputs."""
OUTPUT_SIZES = ("out_hidden_size",)
"""Entries of the config of a vision tower that repeat the size of the stream it writes."""
OF_THE_WHOLE = ("model_type", "architectures", "rope_parameters", "dtype", "transformers_version")
"""Entries of a text model's config that stay those of the multimodal model."""
INNER = {
    "multi_modal_projector.linear_1.weight": 0,
    "multi_modal_projector.linear_1.bias": 0,
    "multi_modal_projector.linear_2.weight": 1,
}
"""Tensors of projectors of two layers whose inner width is that of the text model, and the dimension of that width."""
ROWS = 8_192
"""Embeddings that are read at once."""
T = TypeVar("T")


@dataclass(frozen=True)
class Rejoined:
    """What was written."""

    moved: tuple[str, ...]
    """Tensors outside the text model that were multiplied by the map between the streams, or lost inner neurons."""
    copied: int
    """Tensors outside the text model that stayed as they are."""
    residual: float
    """The share of the student's squared embeddings that no linear map of the teacher's gives."""


def rejoin(student: Checkpoint, teacher: Checkpoint, whole: Path, folder: Path) -> Rejoined:
    """Write the multimodal model `whole`, with a student of its text model `teacher` in that one's place, to a folder.

    Raises:
        UserError: `whole` holds no text model, the student has other tokens, or the config of the multimodal model
            cannot state its shape.
    """
    if not is_wrapped(whole):
        raise UserError(f"{whole} is not a multimodal model: the student of a plain model is a whole model by itself")
    sizes = [model.arch.axis_size("vocab") for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise UserError(f"the student has {sizes[1]} tokens, the text model of {whole} {sizes[0]}: they must be equal")
    values = _config_values(student, teacher, whole)
    before, after = _meta_model(read_json(whole / "config.json")), _meta_model(values)
    _require_shapes(student, after)
    changed = dict(_changed_dims(before, after, student.arch.axis_size("hidden")))
    stream, residual = stream_map(teacher, student, (_scale(before), _scale(after)))
    files = locate_tensors(whole)
    names = own_names(whole)
    outside = [stored for stored in files if stored not in names]
    dims = {stored: found for stored in outside if (found := _of_suffix(changed, stored)) is not None}
    if len(dims) != len(changed):
        raise UserError(f"{whole}: of {len(changed)} tensors that depend on the text model, files hold {len(dims)}")

    def read(stored: str) -> Tensor:
        with naming(files[stored]):
            value: Tensor = open_safetensors(files[stored]).get_tensor(stored)
        return value

    inner = {stored: dim for stored in dims if (dim := _of_suffix(INNER, stored)) is not None}
    neurons = _largest_neurons([(read(stored), dim) for stored, dim in inner.items()], student.arch.axis_size("hidden"))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        places = {name: stored for stored, name in names.items()}
        for name in student.tensors:
            value = student.tensor(name)
            yield places.get(name) or _place_of_output(name, places), value
            progress.advance(value.nbytes)
        for stored in outside:
            value = read(stored)
            progress.advance(value.nbytes)
            for dim in dims.get(stored, ()):
                value = value.index_select(dim, neurons) if inner.get(stored) == dim else moved(value, dim, stream)
            yield stored, value

    num_bytes = student.num_bytes + sum(path.stat().st_size for path in {files[stored] for stored in outside})
    require_space(folder, num_bytes)
    with Progress("rejoin", num_bytes, "bytes") as progress:
        write_tensors(folder, tensors())
    copy_companions(whole, folder)
    for name in PROCESSORS:
        if (whole / name).is_file():
            (folder / name).write_bytes((whole / name).read_bytes())
    write_json(folder / "config.json", values)
    return Rejoined(tuple(sorted(dims)), len(outside) - len(dims), residual)


def stream_map(teacher: Checkpoint, student: Checkpoint, scales: tuple[float, float]) -> tuple[Tensor, float]:
    """Return the map (hidden, student's hidden) that turns the teacher's embeddings into the student's, in float64.

    It is the least-squares solution of smallest norm; `scales` are what both models multiply their embeddings by. The
    second result is the share of the student's squared embeddings that the map does not give.
    """
    names = teacher.arch.embedding.name, student.arch.embedding.name
    rows, widths = teacher.arch.axis_size("vocab"), [model.arch.axis_size("hidden") for model in (teacher, student)]
    gram, cross = torch.zeros(widths[0], widths[0]).double(), torch.zeros(widths[0], widths[1]).double()
    total = 0.0
    embeddings = [teacher.tensor(names[0]), student.tensor(names[1])]
    for start in range(0, rows, ROWS):
        one, other = (
            each[start : start + ROWS].double() * scale for each, scale in zip(embeddings, scales, strict=True)
        )
        gram += one.T @ one
        cross += one.T @ other
        total += float(other.square().sum())
    solved = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ cross
    return solved, max(0.0, 1 - float((solved * cross).sum()) / max(total, 1e-300))


def moved(value: Tensor, dim: int, stream: Tensor) -> Tensor:
    """Return a tensor whose dimension `dim` is the teacher's stream, over that of the student."""
    result: Tensor = torch.tensordot(value.double(), stream, dims=([dim], [0]))
    return result.movedim(-1, dim).to(value.dtype)


def _config_values(student: Checkpoint, teacher: Checkpoint, whole: Path) -> dict[str, Any]:
    """Return the config of the multimodal model with the student's sizes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(whole, local_files_only=True, trust_remote_code=False)
    values: dict[str, Any] = config.to_dict()
    own, text = student.config.to_dict(), values["text_config"]
    text.update({name: value for name, value in own.items() if name not in OF_THE_WHOLE})
    values[TIED] = text[TIED] = own[TIED]
    hidden = [model.arch.axis_size("hidden") for model in (teacher, student)]
    for name in OUTPUT_SIZES:
        if values.get("vision_config", {}).get(name) == hidden[0]:
            values["vision_config"][name] = hidden[1]
    values["dtype"] = own.get("dtype") or values.get("dtype")
    return values


def _meta_model(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    values = {
        name: value for name, value in values.items() if name not in ("transformers_version", "quantization_config")
    }
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.for_model(values.pop("model_type"), **values)
            return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"no multimodal model can be made of this config: {' '.join(str(error).split())}") from error


def _scale(model: Any) -> float:
    """Return what the module of the embeddings multiplies them by, as Gemma's does by the root of the width."""
    return float(getattr(model.get_input_embeddings(), "scalar_embed_scale", 1.0))


def _require_shapes(student: Checkpoint, model: Any) -> None:
    """Check that the text model inside a multimodal one has the shapes of a student's tensors."""
    expected = {name: tuple(value.shape) for name, value in model.get_decoder().state_dict().items()}
    prefix = student.arch.family.prefix
    for name in student.tensors:
        shape = expected.get(name.removeprefix(prefix))
        if shape is not None and shape != student.shape(name):
            raise UserError(
                f"the multimodal model cannot hold this student: {name} has shape {list(student.shape(name))}, "
                f"its config makes it {list(shape)}"
            )


def _changed_dims(before: Any, after: Any, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each tensor outside the text model whose shape depends on the width of the stream, and its dimensions."""
    text = {id(value) for value in before.get_decoder().parameters()}
    text |= {id(value) for value in before.get_output_embeddings().parameters()}
    new = dict(after.named_parameters())
    for name, value in before.named_parameters():
        if id(value) in text:
            continue
        differing = tuple(dim for dim, size in enumerate(value.shape) if new[name].shape[dim] != size)
        streams = [dim for dim in differing if _of_suffix(INNER, name) != dim]
        if len(streams) > 1 or any(new[name].shape[dim] != hidden for dim in differing):
            raise UserError(f"{name} depends on the text model's shape in a way that is not known")
        if differing:
            yield name, differing


def _largest_neurons(tensors: list[tuple[Tensor, int]], size: int) -> Tensor:
    """Return the inner neurons of a projector with the largest product of the norms of their weights, ascending."""
    scores = torch.ones(())
    for value, dim in tensors:
        if value.dim() > 1:
            scores = scores * value.float().norm(dim=1 - dim)
    return scores.topk(size).indices.sort().values if tensors else torch.arange(size)


def _of_suffix(found: Mapping[str, T], stored: str) -> T | None:
    """Return the entry of a tensor whose name in a file may lack the first parts of its name in memory."""
    bare = stored.removeprefix("model.")
    return next((value for name, value in found.items() if f".{name}".endswith(f".{bare}") or bare == name), None)


def _place_of_output(name: str, places: dict[str, str]) -> str:
    """Return the name in files of a student's output matrix, where the teacher's was tied to its embeddings."""
    is_inside = any(stored.startswith("language_model.model.") for stored in places.values())
    return f"language_model.{name}" if is_inside else name
