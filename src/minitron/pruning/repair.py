"""What brings a cut model nearer to its teacher before the first training token; free at inference, stock on disk.

Teacher and student are walked through side by side, layer after layer, over the same calibration blocks:

- **norm rescale**: a norm over fewer channels divides by another root mean square than over all of them. With e²
  the share of the stream's energy that the student's channels carry there, mean over tokens, the norm's weight times
  e·√(d/k) restores the scale.
- **refit**: each tensor that writes the stream is corrected by least squares, one after the other, on the inputs
  that it has in the student as mended so far: W + Δ, Δ = E Xᵀ (X Xᵀ + λI)⁻¹, where X is that input and E what the
  student's stream lacks behind it of the teacher's. So each tensor makes up for what was cut from its own input and
  for what all before it could not; the last one before dropped layers makes up for these. λ is the mean of X Xᵀ's
  diagonal times `ridge` times the number of inputs over that of tokens: where tokens are few Δ stays small, and with
  it what the text at hand alone would ask for.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.anatomy import Norm, Row
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.progress import Progress
from minitron.pruning.cut import Cut
from minitron.pruning.layers import Layers, Stream
from minitron.pruning.writers import ExpertWriters, Tensors, Writer, correction, writers_of
from minitron.recipe import PruneRecipe


@torch.no_grad()
def mended(
    teacher: Checkpoint,
    cut: Cut,
    blocks: Blocks,
    recipe: PruneRecipe,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """The student's tensors by name, with the repairs that the recipe asks for; one layer of each model in memory.

    Raises:
        UserError: there are fewer calibration tokens than a refit has unknowns in a row, or activations are NaN.
    """
    is_narrower = cut.student.axis_size("hidden") < cut.teacher.axis_size("hidden")
    rescale = recipe.rescale_norms and is_narrower
    refit = not is_narrower if recipe.refit is None else recipe.refit
    if not rescale and not refit:
        with Progress("prune", cut.student.num_parameters, "parameters") as progress:
            for name, value in cut:
                yield name, value
                progress.advance(value.numel())
        return
    if refit:
        _require_tokens(cut, blocks)
    recipe = recipe.model_copy(update={"rescale_norms": rescale, "refit": refit})
    walk = _Walk(teacher, cut, blocks, recipe, device, dtype)
    last = cut.teacher.family.norms[-1]
    for row in cut.student.rows:
        if not row.is_per_layer and row.name != f"{last.name}.weight":
            yield row.name, cut(row, None, None)
    with Progress("repair", cut.teacher.axis_size("layer") * blocks.num_tokens, "tokens × layers") as progress:
        for new, number in enumerate(cut.layers):
            progress.note(f"layer {number + 1} of {cut.teacher.axis_size('layer')}")
            for (row, expert), value in walk.layer(number, progress).items():
                yield row.tensor_name(new, expert), value
    for row in cut.student.rows:
        if row.name == f"{last.name}.weight":
            value = cut(row, None, None)
            yield row.name, walk.scaled(value, [walk.share(stream) for stream in walk.teacher]) if rescale else value


class _Walk:
    """The streams of teacher and student behind the layers done so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        cut: Cut,
        blocks: Blocks,
        recipe: PruneRecipe,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.cut, self.blocks, self.recipe, self.device = cut, blocks, recipe, device
        self.make_stream = lambda size: Stream(blocks, size, dtype)
        self.current: Tensors = {}
        self.teacher_layers = Layers.of(checkpoint, device, dtype)
        self.student_layers = Layers(checkpoint, cut.student, self._tensor, device, dtype)
        self.teacher = self.teacher_layers.embedded(blocks)
        if recipe.refit:
            self.current = cut.layer(cut.layers[0])
            self.student = self.student_layers.embedded(blocks)
        self.done = 0

    def _tensor(self, row: Row, layer: int | None, expert: int | None) -> Tensor:
        if layer is None:
            return self.cut(row, None, expert)
        return self.current[row, expert] if (row, expert) in self.current else self.cut(row, layer, expert)

    def layer(self, number: int, progress: Progress) -> Tensors:
        """Move both streams past a layer of the teacher that is kept, and past those dropped behind it."""
        self._pass_dropped(number, progress)
        self.current = self.cut.layer(number)
        teacher = self.teacher_layers.load(number)
        writers = writers_of(self.cut.teacher, number) if self.recipe.refit else []
        within = [writer for writer in writers if not writer.is_last]
        targets = [self.make_stream(self.cut.student.axis_size("hidden")) for _ in within]
        shares: dict[str, list[Tensor]] = {}
        experts = ExpertWriters.of(self.cut, self.current, number) if self.recipe.refit else None
        for i in range(len(self.blocks)):
            with ExitStack() as hooks:
                if self.recipe.rescale_norms:
                    for norm in self._norms():
                        module, seen = teacher.stored_module(norm.name), shares.setdefault(norm.name, [])
                        hooks.callback(
                            module.register_forward_pre_hook(
                                lambda _, inputs, seen=seen: seen.append(self.share(inputs[0]))
                            ).remove
                        )
                if experts:
                    hooks.callback(experts.watch(teacher).remove)
                before = self.teacher[i].to(self.device)
                output, seen_at = teacher.watched(before, [writer.point(teacher) for writer in within])
            self.teacher[i] = output
            for target, value in zip(targets, seen_at, strict=True):
                target[i] = self.cut.project(value)
            progress.advance(self.blocks.context)
        del teacher
        self.done = number + 1
        for row, expert in self.current:
            if found := [seen for name, seen in shares.items() if row.name == f"{name}.weight"]:
                self.current[row, expert] = self.scaled(self.current[row, expert], found[0])
        if experts:
            self.current.update(experts.fitted(self.recipe.ridge))
        if self.recipe.refit:
            following = [n for n in self.cut.layers if n > number]
            self._pass_dropped(following[0] if following else self.cut.teacher.axis_size("layer"), progress)
            self._refit(number, writers, [*targets, self.teacher])
        return self.current

    def _pass_dropped(self, number: int, progress: Progress) -> None:
        """Move the teacher's stream up to a layer."""
        for dropped in range(self.done, number):
            layer = self.teacher_layers.load(dropped)
            for i in range(len(self.blocks)):
                self.teacher[i] = layer(self.teacher[i].to(self.device))
                progress.advance(self.blocks.context)
        self.done = max(self.done, number)

    def _refit(self, number: int, writers: list[Writer], targets: list[Stream]) -> None:
        student = self.student_layers.load(number)
        for writer, target in zip(writers, targets, strict=False):  # the last one's is the teacher's stream itself
            weight = self.current[writer.row, None]
            width, size = weight.shape[writer.dim], self.cut.student.axis_size("hidden")
            moment, cross = (torch.zeros(width, n, device=self.device) for n in (width, size))
            reads = student.stored_module(writer.module), "input"
            for i in range(len(self.blocks)):
                stream, wanted = self.student[i].to(self.device), target[i].to(self.device)
                if writer.is_last:
                    found, [inputs] = student.watched(stream, [reads])
                    wanted = self.cut.project(wanted)
                else:
                    inputs, found = student.within(stream, [reads, writer.point(student)])
                x = inputs.flatten(0, -2).float()
                moment.addmm_(x.T, x)
                cross.addmm_(x.T, (wanted.float() - found.float()).flatten(0, -2))
            change = correction(moment, cross, self.recipe.ridge, self.blocks.num_tokens).movedim(-1, writer.dim)
            self.current[writer.row, None] = mended_weight = (weight.float() + change.cpu()).to(weight.dtype)
            module: Any = student.stored_module(writer.module)
            module.weight.copy_(mended_weight)
        for i in range(len(self.blocks)):
            self.student[i] = student(self.student[i].to(self.device))

    def _norms(self) -> list[Norm]:
        return [norm for norm in self.cut.teacher.family.norms if "{i}" in norm.name]

    def share(self, stream: Tensor) -> Tensor:
        """The share of each token's energy that the student's channels carry, (tokens,)."""
        stream = stream.to(self.device).flatten(0, -2).float()
        if self.cut.teacher.family.is_centred:
            stream = stream - stream.mean(dim=-1, keepdim=True)
        return self.cut.project(stream).square().sum(dim=-1) / stream.square().sum(dim=-1).clamp_min(1e-12)

    def scaled(self, weight: Tensor, shares: list[Tensor]) -> Tensor:
        """A norm's weight times e·√(d/k)."""
        kept = self.cut.student.axis_size("hidden") / self.cut.teacher.axis_size("hidden")
        offset, scale = self.cut.teacher.family.norm_offset, float((torch.cat(shares).mean() / kept).sqrt())
        return ((weight.double() + offset) * scale - offset).to(weight.dtype)


def _require_tokens(cut: Cut, blocks: Blocks) -> None:
    if blocks.num_tokens < (widest := widest_input(cut.teacher, cut.student)):
        raise UserError(
            f"a refit of {widest} inputs needs at least as many calibration tokens; there are {blocks.num_tokens}"
        )


def widest_input(teacher: Arch, student: Arch) -> int:
    """The most inputs of a tensor that a refit corrects, which is the fewest tokens that it can do with."""
    kinds = dict.fromkeys(teacher.layers) if teacher.layers else [None]
    return max(
        (
            writer.row.shape(student.axis_size)[writer.dim]
            for kind in kinds
            for writer in writers_of(teacher, teacher.layer_numbers(kind)[0])
        ),
        default=0,
    )
