"""Property 5: turning the residual stream leaves the logits unchanged."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.arch import TIED, Arch
from minitron.model.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from minitron.model.config import student_config
from minitron.model.language_model import build_model, load_model
from minitron.pruning.cut import cut_to
from minitron.pruning.repair import repaired
from minitron.pruning.rotate import Rotated, obstacle, principal_basis, untied
from minitron.pruning.selection import score_shape
from minitron.pruning.statistics import STREAM_MOMENT
from minitron.recipe import CUT_ONLY, PruneRecipe
from minitron.runtime import Runtime
from tests.conftest import make_model

CPU = torch.device("cpu")


def random_rotation(size: int, is_centred: bool = False) -> Tensor:
    """A random orthogonal matrix; a centred one keeps the vector of ones."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    if not is_centred:
        return orthogonal(turn)
    basis = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis[:, 0] = 1.0
    basis = orthogonal(basis)  # the first column is along the ones
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), orthogonal(turn[1:, 1:]))
    rotation: Tensor = basis @ inner @ basis.T
    return rotation


def orthogonal(matrix: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(matrix).Q
    return q


def signed_permutation(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    signs = torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0).double()
    return torch.eye(size, dtype=torch.float64)[torch.randperm(size, generator=generator)] * signs


def suitable(arch: Arch) -> Tensor:
    """The most general matrix that the family can be turned by."""
    if any(not norm.readers for norm in arch.family.norms):
        return signed_permutation(arch.axis_size("hidden"))
    return random_rotation(arch.axis_size("hidden"), arch.family.is_centred)


@torch.no_grad()
def logits(model: Any, input_ids: Tensor) -> Tensor:
    model.set_experts_implementation("eager")  # the others do not know float64
    return model.double()(input_ids=input_ids).logits  # type: ignore[no-any-return]


def turned_logits(teacher: Checkpoint, tensors: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    config = student_config(teacher, untied(teacher.arch), list(range(teacher.arch.axis_size("layer"))))
    return logits(build_model(config, tensors.items(), CPU), input_ids)


def turn(teacher: Checkpoint, rotation: Tensor) -> dict[str, Tensor]:
    read = Rotated(teacher.arch, rotation, lambda name: teacher.tensor(name).double())
    return {name: read(name) for name, _ in expected_shapes(untied(teacher.arch))}


def test_a_rotation_leaves_the_logits_unchanged(teacher: Checkpoint, input_ids: Tensor) -> None:
    tensors = turn(teacher, suitable(teacher.arch))
    assert {name: tuple(value.shape) for name, value in tensors.items()} == dict(expected_shapes(untied(teacher.arch)))
    expected = logits(load_model(teacher, CPU, torch.float64), input_ids)
    found = turned_logits(teacher, tensors, input_ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_rotation_that_one_tensor_misses_changes_them(teacher: Checkpoint, input_ids: Tensor) -> None:
    tensors = turn(teacher, suitable(teacher.arch))
    missed = [row for row in teacher.arch.rows if row.is_per_layer and len(row.dimensions) > 1 and "hidden" in row.axes]
    name = missed[-1].tensor_name(teacher.arch.layer_numbers(missed[-1].kind)[0], 0)
    tensors[name] = teacher.tensor(name).double()
    expected = logits(load_model(teacher, CPU, torch.float64), input_ids)
    assert (turned_logits(teacher, tensors, input_ids) - expected).abs().max() > 1e-3


def test_what_cannot_be_turned_is_refused(teacher: Checkpoint, tmp_path: Path) -> None:
    rotation = random_rotation(teacher.arch.axis_size("hidden"))
    if any(not norm.readers for norm in teacher.arch.family.norms):
        with pytest.raises(UserError, match="norms after its blocks"):
            turn(teacher, rotation)
    elif teacher.arch.family.is_centred:
        with pytest.raises(UserError, match="subtract the mean"):
            turn(teacher, rotation)
    else:
        turn(teacher, rotation)


def test_what_is_no_rotation_is_refused(teacher: Checkpoint) -> None:
    for matrix in (torch.randn(48, 48), torch.zeros(48, 48).index_fill(0, torch.tensor(0), 1.0)):
        with pytest.raises(ValueError, match="not orthogonal"):
            Rotated(teacher.arch, matrix, teacher.tensor)


def test_an_opt_with_its_norms_behind_is_refused(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "opt", "opt", do_layer_norm_before=False))
    with pytest.raises(UserError, match="norms after its blocks"):
        turn(teacher, random_rotation(48, is_centred=True))


def test_a_tied_model_gets_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "llama", "llama-tied"))
    assert untied(teacher.arch).num_parameters == teacher.arch.num_parameters + 258 * 48
    assert not student_config(teacher, untied(teacher.arch), [0, 1, 2, 3]).to_dict()[TIED]


def narrow(teacher: Checkpoint, size: int) -> tuple[Checkpoint, Tensor]:
    """The teacher with a stream that stays within a random space of so many dimensions, and that space's projector."""
    arch = teacher.arch
    turn = random_rotation(48, arch.family.is_centred)[:, :size]
    if arch.family.is_centred:
        ones = torch.ones(48, 1, dtype=torch.float64)
        turn = orthogonal(torch.cat([ones, turn[:, 1:] - ones @ ones.T @ turn[:, 1:] / 48], dim=1))
    projector = turn @ turn.T

    class Narrow(Checkpoint):
        def tensor(self, name: str) -> Tensor:
            value, row = super().tensor(name).double(), arch.family.match(name).row  # type: ignore[union-attr]
            reads = any(norm.is_read_by(row) for norm in arch.family.norms)
            is_norm = any(row.name.startswith(f"{norm.name}.") for norm in arch.family.norms)
            if "hidden" in row.axes and not reads and not is_norm:
                dim = row.dimensions.index((("hidden",),))
                value = (value.movedim(dim, -1) @ projector).movedim(-1, dim)
            # What norms add lies outside the space, and no norm of the student can add it.
            return value * 0 if is_norm and row.name.endswith("bias") else value

    return Narrow(
        **{k: getattr(teacher, k) for k in ("folder", "config", "arch", "tensors", "stored_names")}
    ), projector


@pytest.mark.parametrize("variant", ["llama", "llama-biases", "nemotron", "mixtral", "nemotron_h", "falcon_h1"])
def test_a_stream_that_needs_fewer_dimensions_is_cut_to_them_without_loss(
    teachers: Callable[[str], Checkpoint], variant: str, input_ids: Tensor
) -> None:
    teacher, moment = narrow(teachers(variant), 24)
    arch = teacher.arch
    student = arch.resized(hidden_size=24)
    importance = {axis: torch.ones(score_shape(arch, axis)) for axis in arch.prunable_axes} | {STREAM_MOMENT: moment}
    whole = {name: teacher.tensor(name) for name in teacher.tensors}
    expected = logits(build_model(teacher.config, whole.items(), CPU), input_ids)
    found, blocks = {}, Blocks(input_ids, torch.ones_like(input_ids, dtype=torch.int32))
    for name, recipe in {"turned": PruneRecipe(refit=False), "plain": CUT_ONLY}.items():
        cut = cut_to(student, teacher, importance, recipe)
        tensors = repaired(teacher, cut, blocks=blocks, recipe=recipe, runtime=Runtime(CPU, torch.float32))
        model = build_model(student_config(teacher, student, cut.layers), tensors, CPU)
        found[name] = logits(model, input_ids)
    # The norms' epsilon weighs more where the stream has less energy a channel.
    torch.testing.assert_close(found["turned"], expected, atol=2e-2, rtol=1e-2)
    assert (found["plain"] - expected).abs().max() > 0.1


def test_a_tied_model_stays_tied_in_a_basis_of_its_own(
    teachers: Callable[[str], Checkpoint], input_ids: Tensor
) -> None:
    teacher, generator = teachers("llama-tied"), torch.Generator().manual_seed(0)
    mixing = torch.randn(48, 48, generator=generator, dtype=torch.float64)
    basis = principal_basis(teacher.arch, 48, mixing @ mixing.T, teacher.tensor)
    assert not torch.allclose(basis, torch.eye(48, dtype=torch.float64))
    turned = Rotated(teacher.arch, basis, lambda name: teacher.tensor(name).double(), is_tied=True)
    tensors = {name: turned(name) for name in teacher.tensors}
    model = build_model(teacher.config, tensors.items(), CPU)
    expected = logits(load_model(teacher, CPU, torch.float64), input_ids)
    torch.testing.assert_close(logits(model, input_ids), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="diagonal"):
        Rotated(teacher.arch, random_rotation(48), teacher.tensor, is_tied=True)
    half = principal_basis(teacher.arch, 24, mixing @ mixing.T, teacher.tensor)
    inner = half.T @ (teacher.tensor("model.norm.weight").double()[:, None] * half)
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-9, rtol=0)
    moment = half.T @ mixing @ mixing.T @ half  # what it holds is what the best 24 directions hold
    assert float(moment.trace()) == pytest.approx(float(torch.linalg.eigvalsh(mixing @ mixing.T)[24:].sum()))


def test_a_rotation_that_is_asked_for_is_refused_where_it_cannot_be(teacher: Checkpoint) -> None:
    arch = teacher.arch
    importance = {axis: torch.ones(score_shape(arch, axis)) for axis in arch.prunable_axes}
    student = replace(arch, sizes={**arch.sizes, "hidden_size": 24})
    if obstacle(arch):
        with pytest.raises(UserError, match=r"prune.rotate: .*(norms after its blocks|tied embeddings)"):
            cut_to(student, teacher, importance, PruneRecipe(rotate=True))
        assert cut_to(student, teacher, importance, PruneRecipe()).basis is None
    else:
        with pytest.raises(UserError, match="without the moment of the stream"):
            cut_to(student, teacher, importance, PruneRecipe())
