"""What brings a cut model nearer to its teacher before the first training token; free at inference, stock on disk.

Two repairs, both from one more pass of the teacher over calibration blocks, now that it is known what is kept:

- **norm rescale**: a norm over the channels kept divides by another root mean square than over all of them. With e²
  the share of the stream's energy that they carry there, its weight times e·√(d/k) restores the scale.
- **refit**: a tensor that reads a cut axis, W x, is replaced by the least-squares best reader of what is left,
  W C[:, k] (C[k, k] + λI)⁻¹ x_k, C the second moment of x; λ is `ridge` times the mean of C[k, k]'s diagonal.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.anatomy import Row
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.progress import Progress
from minitron.prune.importance import Kept
from minitron.prune.maps import kept_positions
from minitron.recipe import PruneRecipe

MOMENT_BYTES = 2 * 1024**3
"""Second moments of as many layers as this holds are taken in one pass over the blocks."""


@dataclass(frozen=True)
class Refit:
    """A reader's new values along its dimension `dim`, at the `positions` that are kept."""

    dim: int
    positions: Tensor  # (kept,)
    fitted: Tensor  # (…, kept)

    def __call__(self, value: Tensor) -> Tensor:
        """The whole tensor with what is kept put right."""
        mended = value.movedim(self.dim, -1).clone()
        mended[..., self.positions] = self.fitted
        return mended.movedim(-1, self.dim)


@dataclass(frozen=True)
class Repairs:
    """By the names of the teacher's tensors: what norm weights are multiplied by, and the refitted readers."""

    norm_offset: float = 0.0
    norm_scales: dict[str, float] = field(default_factory=dict)
    refits: dict[str, Refit] = field(default_factory=dict)

    def mend(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the teacher as it should be before it is cut."""
        if name in self.norm_scales:
            scaled = (value.double() + self.norm_offset) * self.norm_scales[name] - self.norm_offset
            return scaled.to(value.dtype)
        return self.refits[name](value) if name in self.refits else value


NO_REPAIRS = Repairs()


@torch.no_grad()
def measure_repairs(
    model: nn.Module, checkpoint: Checkpoint, student: Arch, kept: Kept, blocks: Blocks, recipe: PruneRecipe
) -> Repairs:
    """Run the blocks through the teacher `model` of `checkpoint` and work out the repairs that the recipe asks for.

    Raises:
        UserError: there are fewer calibration tokens than a refit has unknowns in a row.
    """
    teacher = checkpoint.arch
    repairs, base = Repairs(teacher.family.norm_offset), cast(nn.Module, model.base_model)
    watched: list[_Watch] = []
    if recipe.rescale_norms and student.axis_size("hidden") < teacher.axis_size("hidden"):
        watched += _norms(teacher, kept, repairs, base)
    if recipe.refit:
        watched += _readers(checkpoint, kept, repairs, base, recipe.ridge)
    if not watched:
        return repairs
    widest = max((watch.width for watch in watched if watch.is_matrix), default=0)
    if blocks.num_tokens < widest:
        raise UserError(
            f"a refit of {widest} inputs needs at least as many calibration tokens; there are {blocks.num_tokens}"
        )
    passes = list(_passes(watched))
    with Progress("repair", len(passes) * blocks.num_tokens) as progress:
        for part in passes:
            _run(base, part, blocks, progress)
    return repairs


@dataclass
class _Watch:
    """One module whose input is summed up, and what becomes of the sum."""

    module: nn.Module
    width: int
    is_matrix: bool
    finish: Callable[[Tensor], None]
    is_centred: bool = False
    total: Tensor | None = None

    def add(self, activation: Tensor) -> None:
        """Σ x xᵀ, or of a norm's input Σ x², over tokens, in float32."""
        x = activation.flatten(0, -2).float()
        if self.is_centred:
            x = x - x.mean(dim=-1, keepdim=True)
        value = x.T @ x if self.is_matrix else x.square().sum(dim=0)
        self.total = value if self.total is None else self.total.add_(value)


def _module(base: nn.Module, name: str) -> nn.Module:
    """The module of this name in files, where names may begin otherwise than in memory."""
    return base.get_submodule(name.split(".", 1)[1])


def _norms(teacher: Arch, kept: Kept, repairs: Repairs, base: nn.Module) -> Iterator[_Watch]:
    share_of_size = len(kept["hidden"]) / teacher.axis_size("hidden")
    for norm in teacher.family.norms:
        for layer in teacher.layer_numbers() if "{i}" in norm.name else [None]:
            name = norm.name.replace("{i}", str(layer))
            if teacher.match(f"{name}.weight") is None:
                continue

            def finish(energy: Tensor, name: str = name) -> None:
                share = float(energy[kept["hidden"].to(energy.device)].sum() / energy.sum())
                repairs.norm_scales[f"{name}.weight"] = (share / share_of_size) ** 0.5

            yield _Watch(
                _module(base, name), teacher.axis_size("hidden"), False, finish, is_centred=teacher.family.is_centred
            )


def _readers(checkpoint: Checkpoint, kept: Kept, repairs: Repairs, base: nn.Module, ridge: float) -> Iterator[_Watch]:
    teacher = checkpoint.arch
    within_layers = [axis for axis in kept if axis in teacher.family.per_layer_axes]
    modules = {tap.module: tap.kind for tap in teacher.family.taps if tap.side == "input" and tap.axes != ("hidden",)}
    for module, kind in modules.items():
        for layer in teacher.layer_numbers(kind):
            row = _read_by(teacher, module)
            name = row.tensor_name(layer)
            dim = next(i for i, dimension in enumerate(row.dimensions) if dimension != (("hidden",),))
            maps = {axis: kept[axis][layer] for axis in within_layers}
            positions = kept_positions(row.dimensions[dim], maps, teacher.axis_size)
            width = row.shape(teacher.axis_size)[dim]
            if len(positions) == width:
                continue

            def finish(moment: Tensor, name: str = name, dim: int = dim, positions: Tensor = positions) -> None:
                weight = checkpoint.tensor(name)
                fitted = best_reader(weight.movedim(dim, -1).double(), moment.double().cpu(), positions, ridge)
                repairs.refits[name] = Refit(dim, positions, fitted.to(weight.dtype))

            yield _Watch(_module(base, name.removesuffix(".weight")), width, True, finish)


def best_reader(weight: Tensor, moment: Tensor, positions: Tensor, ridge: float) -> Tensor:
    """W C[:, k] (C[k, k] + λI)⁻¹, (…, kept), for W (…, width) and C (width, width): the least-squares best reader."""
    inner = moment[positions][:, positions]
    damping = max(ridge * float(inner.diagonal().mean()), torch.finfo(inner.dtype).tiny)
    damped = inner + damping * torch.eye(len(inner), dtype=inner.dtype)
    fitted: Tensor = torch.linalg.solve(damped, moment[positions] @ weight.T).T
    return fitted


def _read_by(arch: Arch, module: str) -> Row:
    """The row of the tensor that multiplies the input of a module, named as in memory."""
    wanted = f"{module.split('.', 1)[1]}.weight"
    return next(row for row in arch.rows if row.name.split(".", 1)[-1] == wanted)


def _passes(watched: list[_Watch]) -> Iterator[list[_Watch]]:
    part: list[_Watch] = []
    size = 0
    for watch in watched:
        num_bytes = 4 * (watch.width**2 if watch.is_matrix else watch.width)
        if part and size + num_bytes > MOMENT_BYTES:
            yield part
            part, size = [], 0
        part.append(watch)
        size += num_bytes
    if part:
        yield part


def _run(base: nn.Module, part: list[_Watch], blocks: Blocks, progress: Progress) -> None:
    device = next(base.parameters()).device
    with ExitStack() as hooks:
        for watch in part:
            handle = watch.module.register_forward_pre_hook(lambda _, inputs, watch=watch: watch.add(inputs[0]))
            hooks.callback(handle.remove)
        for ids in blocks.ids.split(1):
            base(input_ids=ids.to(device), use_cache=False)
            progress.advance(ids.numel())
    for watch in part:
        if watch.total is None or not torch.isfinite(watch.total).all():
            raise UserError("the teacher's activations hold NaN or infinity: its weights are broken")
        watch.finish(watch.total)
        watch.total = None
