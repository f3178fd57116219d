"""Losses on the way through the layers, against slow formulas, and in every family."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from minitron.data.blocks import Blocks
from minitron.distillation.intermediate import Intermediate, compare_on_the_way, relation_loss
from minitron.distillation.teacher import Live
from minitron.distillation.trainer import Trainer
from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.recipe import DistillRecipe, IntermediateRecipe
from minitron.runtime import Runtime
from tests.conftest import make_model

CPU = torch.device("cpu")
ON_THE_WAY: tuple[Any, ...] = ("embedding", "block_output", "mlp_input", "attention")
IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))


def between(teacher: Checkpoint, student: Checkpoint, *of: Any, **more: Any) -> tuple[Any, Headless, Intermediate]:
    model, headless = load_model(teacher, CPU, torch.float64), Headless(load_model(student, CPU, torch.float64))
    recipe = IntermediateRecipe(of=of, **more)
    return model, headless, compare_on_the_way(model, teacher.arch, headless, student.arch, recipe, CPU)


@torch.no_grad()
def loss_of(model: Any, headless: Headless, places: Intermediate, teaches: Tensor | None = None) -> Tensor:
    with places.watching():
        model(IDS)
        headless(IDS, lambda hidden, head: hidden)
        return places.loss(teaches, IDS.numel())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    folder = tmp_path_factory.mktemp("pair")
    smaller = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
    return (
        open_checkpoint(make_model(folder / "teacher", "llama-tied")),
        open_checkpoint(make_model(folder / "student", "llama-tied", seed=1, **smaller)),
    )


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_streams_by_the_slow_formula(pair: tuple[Checkpoint, Checkpoint], kind: str) -> None:
    model, headless, places = between(*pair, "embedding", "block_output", loss=kind, layers=((3, 2), (1, 0)))
    teaches = torch.rand(IDS.shape) < 0.7
    found = loss_of(model, headless, places, teaches)
    ends: dict[str, list[Tensor]] = {}
    for name, one in (("teacher", model), ("student", headless.model)):
        streams = ends.setdefault(name, [])
        layers: Any = one.model.layers  # type: ignore[union-attr]
        stream = one.model.embed_tokens(IDS)  # type: ignore[union-attr,operator]
        turns = one.model.rotary_emb(stream, torch.arange(20)[None])  # type: ignore[union-attr,operator]
        streams.append(stream)
        for layer in layers:
            stream = layer(stream, position_embeddings=turns)
            streams.append(stream)
    norms = [*(layer.input_layernorm for layer in model.model.layers), model.model.norm]
    expected = torch.zeros((), dtype=torch.float64)
    for i, j in ((0, 0), (4, 3), (2, 1)):
        wanted, given = norms[i](ends["teacher"][i]), norms[i](places.projection(ends["student"][j]))
        for b, t in teaches.nonzero().tolist():
            expected += (
                1 - cosine_similarity(wanted[b, t], given[b, t], dim=0)
                if kind == "cosine"
                else ((wanted[b, t] - given[b, t]) ** 2).mean()
            )
    torch.testing.assert_close(found, expected / IDS.numel(), rtol=1e-9, atol=0)
    assert abs(float(loss_of(model, headless, places)) - float(found)) > 1e-6


def test_the_projection_begins_as_the_best_between_embeddings(pair: tuple[Checkpoint, Checkpoint]) -> None:
    model, headless, places = between(*pair, "block_output")
    of_teacher, of_student = model.model.embed_tokens.weight, headless.model.model.embed_tokens.weight  # type: ignore
    best = torch.linalg.lstsq(of_student, of_teacher).solution
    torch.testing.assert_close(places.projection.get_parameter("weight").T, best, rtol=1e-5, atol=1e-7)
    assert "projection.weight" in dict(headless.named_parameters())


def test_relations_by_the_slow_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 5, n, dtype=torch.float64, generator=generator) for n in (12, 6))
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for b in range(2):
        for head in range(3):
            for t in range(5):
                p, q = (
                    torch.stack([x[b, t, part] @ x[b, s, part] / (part.stop - part.start) ** 0.5 for s in range(t + 1)])
                    for x, part in (
                        (teacher, slice(4 * head, 4 * head + 4)), (student, slice(2 * head, 2 * head + 2))
                    )
                )  # fmt: skip
                p, q = p.softmax(0), q.softmax(0)
                expected[b, t] += (p * (p / q).log()).sum() / 3
    torch.testing.assert_close(relation_loss(teacher, student, 3), expected)
    assert not relation_loss(teacher, teacher, 3).any()
    assert float((relation_loss(teacher, student, 1) - expected).abs().max()) > 1e-3


def test_every_family_has_its_places(teacher: Checkpoint) -> None:
    # Grouped products of experts know no float64.
    model, headless = load_model(teacher, CPU, torch.float32), Headless(load_model(teacher, CPU, torch.float32))
    found: list[Intermediate] = []
    for number in range(teacher.arch.axis_size("layer")):
        for kind in ON_THE_WAY:
            recipe = IntermediateRecipe(of=(kind,), layers=((number, number),))
            with suppress(UserError):  # in hybrids, not every layer has them
                found.append(compare_on_the_way(model, teacher.arch, headless, teacher.arch, recipe, CPU))
    axes = set(teacher.arch.axes)
    assert len(found) >= 2 * teacher.arch.axis_size("layer") + ("query" in axes) + bool(axes & {"ffn", "expert"})
    assert [float(loss_of(model, headless, places)) for places in found] == pytest.approx([0.0] * len(found), abs=1e-6)
    with torch.no_grad():
        embeddings: Any = headless.model.get_input_embeddings()  # type: ignore[operator]
        embeddings.weight.copy_(embeddings.weight.flip(0))
    assert all(float(loss_of(model, headless, places)) > 1e-5 for places in found)


def test_what_is_not_there_is_named(pair: tuple[Checkpoint, Checkpoint]) -> None:
    with pytest.raises(UserError, match=r"layers 3:3: the teacher has layers 0 to 3, the student 0 to 2"):
        between(*pair, "block_output", layers=((3, 3),))
    with pytest.raises(ValueError, match="intermediate needs the teacher in memory"):
        DistillRecipe(teacher_states="x", intermediate=IntermediateRecipe(of=("embedding",)))


@pytest.mark.parametrize("weight", [None, 0.5])
def test_a_student_comes_nearer_and_is_stock(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path, weight: float | None
) -> None:
    blocks = Blocks(IDS.repeat(4, 1), torch.ones(8, 20, dtype=torch.int32))
    for name, of in (("with", ("embedding", "block_output")), ("without", ())):
        (tmp_path / name).mkdir()
        recipe = DistillRecipe(
            tokens=20 * 40,
            batch_size=2,
            learning_rate=3e-3,
            intermediate=IntermediateRecipe(of=of, weight=weight),  # type: ignore[arg-type]
        )
        teacher, runtime = Live(load_model(pair[0], CPU, torch.float32)), Runtime(CPU, torch.float32)
        trainer = Trainer(teacher, recipe, blocks, runtime, tmp_path / name, blocks[:2])
        trainer.distill(pair[1], tmp_path / name / "out")
    saved = load_file(tmp_path / "with" / "out" / "model.safetensors")
    assert saved.keys() == load_file(pair[1].folder / "model.safetensors").keys()
    start, near, far = (
        float(loss_of(*between(pair[0], open_checkpoint(folder), "embedding", "block_output")))
        for folder in (pair[1].folder, tmp_path / "with" / "out", tmp_path / "without" / "out")
    )
    assert near < start
    assert near < far
