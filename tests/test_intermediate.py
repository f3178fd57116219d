"""Losses on the way through the layers, against slow formulas, and in every family."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from minitron.data.blocks import Blocks
from minitron.distillation.intermediate import (
    Intermediate,
    compare_on_the_way,
    dynamic_weights,
    relation_loss,
)
from minitron.distillation.objective import Objective
from minitron.distillation.teacher import Live
from minitron.distillation.trainer import Trainer
from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.nas.trial import trial_recipe
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
        return places.losses(teaches, IDS.numel()).sum()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    folder = tmp_path_factory.mktemp("pair")
    smaller = {"hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
    return (
        open_checkpoint(make_model(folder / "teacher", "llama-tied")),
        open_checkpoint(make_model(folder / "student", "llama-tied", seed=1, **smaller)),
    )


def streams_of(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Any]]:
    """The residual stream before every layer and after the last, and the norms that read it there."""
    stream = model.model.embed_tokens(ids)
    turns = model.model.rotary_emb(stream, torch.arange(ids.shape[1])[None])
    streams = [stream]
    for layer in model.model.layers:
        streams.append(layer(streams[-1], position_embeddings=turns))
    return streams, [*(layer.input_layernorm for layer in model.model.layers), model.model.norm]


def slow_losses(models: tuple[Any, Any], projection: Any, ids: Tensor, norms: str, kind: str = "cosine",
                places: tuple[tuple[int, int], ...] = ((0, 0), (4, 3), (2, 1))) -> Tensor:  # fmt: skip
    """Each token's loss (B, T), summed over places: the numbers of layers before which streams are compared."""
    (wanted, readers), (given, own_readers) = (streams_of(model, ids) for model in models)
    total = torch.zeros(ids.shape, dtype=torch.float64)
    for i, j in places:
        target = readers[i](wanted[i])
        found = projection(own_readers[j](given[j])) if norms == "own" else readers[i](projection(given[j]))
        total = total + (
            1 - cosine_similarity(target, found, dim=-1) if kind == "cosine" else ((target - found) ** 2).mean(dim=-1)
        )
    return total


@pytest.mark.parametrize("norms", ["own", "teacher"])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_streams_by_the_slow_formula(pair: tuple[Checkpoint, Checkpoint], kind: str, norms: str) -> None:
    options: dict[str, Any] = {"loss": kind, "layers": ((3, 2), (1, 0))}
    model, headless, places = between(*pair, "embedding", "block_output", norms=norms, **options)
    teaches = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    found = loss_of(model, headless, places, teaches)
    with torch.no_grad():
        ways = {
            way: slow_losses((model, headless.model), places.projection, IDS, way, kind) for way in ("own", "teacher")
        }
    expected = ways.pop(norms)
    torch.testing.assert_close(found, expected[teaches].sum() / IDS.numel(), rtol=1e-9, atol=0)
    # The controls: all tokens, and the other way.
    assert abs(float(loss_of(model, headless, places)) - float(found)) > 1e-6
    assert all(abs(float(other[teaches].sum() / IDS.numel()) - float(found)) > 1e-3 for other in ways.values())


@pytest.mark.parametrize("norms", ["own", "teacher"])
def test_the_projection_begins_as_the_best_between_embeddings(pair: tuple[Checkpoint, Checkpoint], norms: str) -> None:
    model, headless, places = between(*pair, "block_output", norms=norms)
    bases: list[Any] = [model.model, headless.model.model]
    embeddings = [base.embed_tokens.weight for base in bases]
    if norms == "own":
        embeddings = [base.layers[0].input_layernorm(rows) for base, rows in zip(bases, embeddings, strict=True)]
    best = torch.linalg.lstsq(embeddings[1], embeddings[0]).solution
    torch.testing.assert_close(places.projection.get_parameter("weight").T, best, rtol=1e-5, atol=1e-7)
    assert "projection.weight" in dict(headless.named_parameters())


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_dynamic_weights_are_this_steps_ratio_of_the_losses(
    pair: tuple[Checkpoint, Checkpoint], label_weight: float, micro_batch_size: int
) -> None:
    """L = L_CLM + L_logits + α L_is with α = L_logits / L_is, all of one sequence, and a constant in the gradient."""
    model, headless, places = between(*pair, "embedding", "block_output")
    ids = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(5))
    recipe = DistillRecipe(batch_size=3, micro_batch_size=micro_batch_size, label_weight=label_weight)
    objective = Objective(Live(model), recipe, Runtime(CPU, torch.float64), places)
    whole, intermediate, added, _ = objective.accumulate(headless, Blocks(ids, torch.ones_like(ids)), torch.arange(3))
    found = {name: parameter.grad for name, parameter in headless.named_parameters()}
    headless.zero_grad()

    log_q, log_p = (one(ids).logits.log_softmax(dim=-1) for one in (headless.model, model))
    of_logits = (log_p.exp() * (log_p - log_q)).sum(dim=(1, 2)) / ids.numel()
    of_labels = -log_q[:, :-1].gather(-1, ids[:, 1:, None]).sum() / ids[:, 1:].numel()
    student: Any = headless.model
    within = slow_losses((model, student), places.projection, ids, "own", places=((0, 0), (2, 1))).sum(1) / ids.numel()
    alpha = (of_logits / within).detach()
    expected = label_weight * of_labels + of_logits.sum() + (alpha * within).sum()
    torch.testing.assert_close(whole, expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(intermediate, within.sum().detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(added, of_logits.sum().detach(), rtol=1e-9, atol=0)
    assert alpha.max() > 1.01 * alpha.min()

    def off(loss: Tensor) -> float:
        """How far the gradient of a loss is from that found, as a share."""
        parameters = dict(headless.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        pairs = [(found[name], gradient) for name, gradient in zip(parameters, gradients, strict=True)]
        return max(float((a - b).norm() / b.norm()) for a, b in pairs if a is not None and b is not None)

    assert off(expected) < 1e-6  # norms compute in float32
    # The controls: no intermediate loss, as in the first step of a weight taken from the step before; α with labels.
    assert off(label_weight * of_labels + of_logits.sum()) > 1e-2
    with_labels = alpha * float(1 + label_weight * of_labels.detach() / of_logits.detach().sum())
    others = label_weight * of_labels + of_logits.sum() + (with_labels * within).sum()
    assert (off(others) > 1e-2) == bool(label_weight)


def test_a_place_without_a_loss_has_no_weight() -> None:
    losses = torch.tensor([0.5, 0.0, 2.0])
    assert dynamic_weights(torch.ones(3), losses).tolist() == [2.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("layers", "of", "expected"),
    [
        (3, None, ("embedding", "block_output")),
        (4, None, ()),
        (3, (), ()),
        (4, ("attention",), ("attention",)),
    ],
)
def test_places_are_compared_by_themselves_where_depth_is_cut(
    tmp_path: Path, layers: int, of: Any, expected: tuple[str, ...]
) -> None:
    """Three of four layers: a quarter is cut. The third layer from the end of each is compared (29:13 of 32:16)."""
    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    student = open_checkpoint(make_model(tmp_path / "student", "llama-tied", seed=1, num_hidden_layers=layers))
    assert IntermediateRecipe(of=of).compared(4, layers) == expected
    blocks, work = Blocks(IDS, torch.ones_like(IDS)), tmp_path / "work"
    work.mkdir()
    recipe = DistillRecipe(tokens=40, batch_size=2, intermediate=IntermediateRecipe(of=of))
    live = Live(load_model(teacher, CPU, torch.float32))
    Trainer(live, recipe, blocks, Runtime(CPU, torch.float32), work).distill(student, tmp_path / "out")
    row = json.loads((work / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("intermediate_loss" in row) == bool(expected)
    if expected:
        assert row["loss"] == pytest.approx(2 * row["intermediate_weight"] * row["intermediate_loss"])
    stored = Trainer(lambda *_: pytest.fail("it runs"), recipe, blocks, Runtime(CPU, torch.float32), work)
    if of:
        with pytest.raises(UserError, match="needs the teacher in memory"):
            stored._intermediate(Headless(load_model(student, CPU, torch.float32)), student)
    else:
        assert stored._intermediate(Headless(load_model(student, CPU, torch.float32)), student) is None


def test_the_searchs_trials_compare_logits_alone() -> None:
    given = {"intermediate": {"of": ["embedding"]}, "warmup_steps": 7}
    recipe = trial_recipe(DistillRecipe(**given), 4, 32)  # type: ignore[arg-type]
    assert recipe.intermediate.of == ()
    assert recipe.warmup_steps is None


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


@pytest.mark.parametrize("norms", ["own", "teacher"])
def test_every_family_has_its_places(teacher: Checkpoint, norms: Any) -> None:
    # Grouped products of experts know no float64.
    model, headless = load_model(teacher, CPU, torch.float32), Headless(load_model(teacher, CPU, torch.float32))
    found: list[Intermediate] = []
    for number in range(teacher.arch.axis_size("layer")):
        for kind in ON_THE_WAY:
            recipe = IntermediateRecipe(of=(kind,), layers=((number, number),), norms=norms)
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
