"""Every module that touches tensors, on a GPU, or where there is none on a pretended one, against the CPU.

On a GPU these are the tests that `benchmarks/on_gpu.sh` runs. Elsewhere they find tensors on mixed devices: see
`placement.py`.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from minitron.data.blocks import Blocks
from minitron.data.tokens import load_tokenizer
from minitron.distillation.fused import Labels, LossOptions, States, logit_loss
from minitron.distillation.losses import COMPARISONS, comparison_of, forward_kl_
from minitron.distillation.nested import Member, Nested
from minitron.distillation.teacher import Learning, Live, Source, Teacher, stored
from minitron.distillation.trainer import Trainer
from minitron.evaluation import measure
from minitron.evaluation.agreement import Comparison, TeacherStates
from minitron.evaluation.answering import Answerer
from minitron.evaluation.generation import Sampling
from minitron.evaluation.multiple_choice import Item, accuracy
from minitron.evaluation.speed import alternate, measure_speed, speed_up
from minitron.model import schemes
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import Head, Headless, load_model, read_head
from minitron.nas.budget import Serving
from minitron.nas.sorted_teacher import deciding_sizes, sort_teacher
from minitron.nas.speed import Speeds
from minitron.nas.zero_shot import divergence
from minitron.pruning.calibrate import calibrate
from minitron.pruning.cut import cut_to
from minitron.pruning.depth import score_depth
from minitron.pruning.nested import beginning_of
from minitron.pruning.repair import repaired
from minitron.pruning.rotate import rotates
from minitron.pruning.scores import Importance, score
from minitron.recipe import (
    CalibrationRecipe,
    CorrectionRecipe,
    DepthRecipe,
    DistillRecipe,
    IntermediateRecipe,
    OnPolicyRecipe,
    PruneRecipe,
)
from minitron.runtime import Runtime, World
from tests.conftest import Verb, make_model
from tests.placement import GPU, MixedDevicesError, pretended_gpu
from tests.test_losses import fused, problem
from tests.test_nested import written
from tests.test_trim import cut_everywhere
from tests.test_trim import cut_to as as_wide

CPU = torch.device("cpu")
IDS = torch.randint(0, 258, (4, 24), generator=torch.Generator().manual_seed(0))
BLOCKS = Blocks(IDS, torch.ones_like(IDS, dtype=torch.int32))
PLAIN = ("llama-tied", "qwen3_moe", "nemotron_h", *(("gpt2", "gemma2") if torch.cuda.is_available() else ()))
"""A variant for each way of pruning: rotated and tied, with experts, with layers of several kinds; on a GPU also
transposed matrices and a stream that is not rotated."""


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    if torch.cuda.is_available():
        yield GPU
    else:
        with pretended_gpu():
            yield GPU


def test_a_tensor_left_on_the_cpu_is_found(gpu: torch.device) -> None:
    student, head, teacher, teacher_head = (each.detach().to(gpu) for each in problem())
    with pytest.raises((MixedDevicesError, RuntimeError), match="cpu"):
        logit_loss(student, Head(head), States(teacher, Head(teacher_head.cpu())), forward_kl_, 1)


@pytest.mark.parametrize("kind", COMPARISONS)
def test_losses(gpu: torch.device, kind: str) -> None:
    expected = fused(given := problem(), kind, temperature=2.0, softcaps=(3.0, 4.0))
    expected.backward()
    moved = tuple(each.detach().to(gpu, torch.float32).requires_grad_() for each in given)
    found = fused(moved, kind, temperature=2.0, softcaps=(3.0, 4.0))  # type: ignore[arg-type]
    found.backward()
    assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-6)
    for one, other in zip(moved[:2], given[:2], strict=True):
        assert_close(one.grad.cpu().double(), other.grad, rtol=1e-3, atol=1e-6)  # type: ignore[union-attr]
    uncapped = fused(moved, kind, temperature=2.0)  # type: ignore[arg-type]
    assert float((uncapped.detach().cpu() - expected.detach()).abs()) > 1e-4


@pytest.mark.parametrize("top_k", [None, 5])
def test_products_of_halves_are_summed_in_float32(gpu: torch.device, top_k: int | None) -> None:
    """Gradients differ from exact ones by the rounding of their operands, and of logits that were never rounded."""
    given = [each.detach().bfloat16().double() for each in problem()]
    labels = torch.arange(len(given[0])) % 50

    def gradients(states: list[Tensor], operands: torch.dtype | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        student, head = (each.clone().requires_grad_() for each in states[:2])
        options = LossOptions(labels=Labels(labels, 0.5), operands=operands, chunk_tokens=10)
        outputs = States(states[2], Head(states[3]))
        loss = logit_loss(student, Head(head), outputs, comparison_of("forward_kl", top_k=top_k), 37, options)
        return torch.autograd.grad(loss, (student, head))  # type: ignore[return-value]

    exact = gradients(given, None, labels)
    wide = gradients([each.to(gpu, torch.float32) for each in given], torch.bfloat16, labels.to(gpu))
    for one, other in zip(wide, exact, strict=True):
        error = float((one.cpu().double() - other).norm() / other.norm())
        assert 1e-5 < error < 5e-3


def runtime_of(device: torch.device, dtype: str = "float32") -> Runtime:
    return Runtime(device, getattr(torch, dtype), 0)


def stored_in(folder: Path, checkpoint: Checkpoint, runtime: Runtime, recipe: DistillRecipe) -> Teacher:
    from contextlib import nullcontext

    source = Source(
        {"teacher": "a"}, lambda: nullcontext(load_model(checkpoint, runtime.device, runtime.dtype)),
        read_head(checkpoint, runtime.device, runtime.dtype),
    )  # fmt: skip
    return stored(folder / "states", source, BLOCKS, recipe, World())


DISTILLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "in bfloat16": {"label_weight": 0.5},
    "inside the layers": {
        "intermediate": IntermediateRecipe(of=("embedding", "block_output", "mlp_input", "attention"))
    },
    "a teacher that learns": {"correction": CorrectionRecipe(trains="full")},
    "rounded": {"quantize": "int8", "temperature": 2.0},
    "stored states": {"teacher_states": "x"},
    "stored classes": {"teacher_states": "x", "stored": "top_k", "top_k": 7},
    "adapters": {"trains": "lora"},
    "layers in turn": {"trains": "lisa", "lisa_layers": 1, "lisa_steps": 1},
    "answers in documents": {"loss": "reverse_kl", "top_k": 9},
}


@pytest.mark.parametrize("name", DISTILLED)
def test_trainings(gpu: torch.device, name: str, tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied", num_hidden_layers=2))
    smaller = {"hidden_size": 36, "intermediate_size": 40, "num_hidden_layers": 2}
    pruned = open_checkpoint(make_model(tmp_path / "student", "llama-tied", 1, **smaller))
    recipe = DistillRecipe(tokens=24 * 6, batch_size=2, learning_rate=1e-2, **DISTILLED[name])
    blocks = BLOCKS
    if name == "answers in documents":
        blocks = replace(BLOCKS, is_learnt=IDS % 3 > 0, starts=IDS % 7 == 0)

    def losses(device: torch.device) -> list[float]:
        (work := tmp_path / device.type).mkdir()
        runtime = runtime_of(device, "bfloat16" if name == "in bfloat16" else "float32")
        source: Teacher
        if recipe.teacher_states:
            source = stored_in(work, teacher, runtime, recipe)
        elif recipe.correction.trains == "full":
            source = Learning(load_model(teacher, device, torch.float32), recipe.correction, 0)
        else:
            source = Live(load_model(teacher, device, runtime.dtype))
        heldout = blocks[:2] if name == "plain" else None
        Trainer(source, recipe, blocks, runtime, work, heldout).distill(pruned, work / "out")
        rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
        assert open_checkpoint(work / "out").arch == pruned.arch
        return [row[key] for row in rows for key in ("loss", "heldout_perplexity") if key in row]

    on_cpu, on_gpu = losses(CPU), losses(gpu)
    assert on_gpu == pytest.approx(on_cpu, rel=0.02 if name == "in bfloat16" else 1e-3)
    assert on_gpu[-1] != pytest.approx(on_gpu[0], rel=1e-3)  # the weights have moved


@pytest.mark.parametrize(
    "changes", [{"neftune_alpha": 5.0}, {"on_policy": OnPolicyRecipe(share=1.0, tokens=(4, 8), loss="reverse_kl")}]
)
def test_what_is_drawn(gpu: torch.device, changes: dict[str, Any], tmp_path: Path) -> None:
    """Devices draw other numbers, so losses are not compared."""
    one, model = (
        open_checkpoint(make_model(tmp_path / str(seed), "llama-tied", seed, num_hidden_layers=2)) for seed in (0, 1)
    )
    recipe = DistillRecipe(tokens=24 * 6, batch_size=2, **changes)
    teacher = Live(load_model(one, gpu, torch.float32))
    Trainer(teacher, recipe, BLOCKS, runtime_of(gpu), tmp_path).distill(model, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3
    assert all(0 < loss < 100 for loss in losses)


def test_answers(gpu: torch.device, chatty: Path) -> None:
    tokenizer = load_tokenizer(chatty)
    prompts, found = ["<user>a</s><assistant>", "<user>longer</s><assistant>"], []
    for device in (CPU, gpu):
        model = load_model(open_checkpoint(chatty), device, torch.float32)
        found.append(Answerer(model, tokenizer, Sampling(max_new_tokens=6)).answers(prompts, 0))
    assert found[0] == found[1]


def importance_of(teacher: Checkpoint, device: torch.device) -> Importance:
    recipe, others = CalibrationRecipe(), BLOCKS[:1] if rotates(teacher.arch, PruneRecipe()) else None
    statistics = calibrate(teacher, BLOCKS, recipe=recipe, runtime=runtime_of(device), others=others)
    return score(statistics, teacher, recipe)


@pytest.mark.parametrize("teacher", PLAIN, indirect=True)
def test_pruning(gpu: torch.device, teacher: Checkpoint) -> None:
    importance, found = (importance_of(teacher, device) for device in (CPU, gpu))
    for axis, scores in importance.items():
        assert_close(found[axis], scores, rtol=1e-3, atol=1e-5)
        assert found[axis].device == CPU
    for student, recipe in (
        (cut_everywhere(teacher.arch), PruneRecipe(merge_heads="query" in teacher.arch.prunable_axes)),
        (as_wide(teacher.arch, "all but hidden"), PruneRecipe(refit=True, ridge=0.1)),
    ):
        cut = cut_to(student, teacher, importance, recipe)
        made = [
            dict(repaired(teacher, cut, blocks=BLOCKS, recipe=recipe, runtime=runtime_of(device)))
            for device in (CPU, gpu)
        ]
        assert made[0].keys() == made[1].keys()
        for name, tensor in made[0].items():
            assert made[1][name].device == CPU
            assert_close(made[1][name], tensor, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("removal", ["one_shot", "iterative", "contiguous"])
def test_depth(gpu: torch.device, teachers: Any, removal: str, tmp_path: Path) -> None:
    teacher, tokenizer = teachers("llama"), load_tokenizer(teachers("llama").folder)
    (tmp_path / "items.jsonl").write_text(
        '{"text": "a few words"}\n{"context": "a", "choices": ["b", "c"], "gold": 1}\n'
    )
    for kind in ("block_influence", "perplexity", "kl", "logits_mse", "task"):
        if (kind == "block_influence") == (removal != "contiguous"):
            continue
        recipe = DepthRecipe(score=kind, removal=removal, task=str(tmp_path / "items.jsonl"))  # type: ignore[arg-type]
        on_cpu, on_gpu = (
            score_depth(
                load_model(teacher, device, torch.float32), teacher.arch, BLOCKS[:2], recipe=recipe, removed={1, 2},
                tokenizer=tokenizer,
            )
            for device in (CPU, gpu)
        )  # fmt: skip
        for name, table in on_cpu.items():
            assert_close(on_gpu[name], table, rtol=1e-3, atol=1e-4)


def test_measuring(gpu: torch.device, teachers: Any) -> None:
    teacher, other = teachers("gemma2"), teachers("gemma2")
    figures, right = [], []
    for device in (CPU, gpu):
        states = TeacherStates(BLOCKS)
        measure(load_model(teacher, device, torch.float32), teacher, BLOCKS, stage="teacher", observer=states)
        model = load_model(other, device, torch.float32)
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.5)
        figures.append(measure(model, other, BLOCKS, stage="m", num_samples=1, observer=Comparison(states)))
        items = [Item((("a few", " words"), ("some", " more")), 0), Item((("one", " two"),), 0)]
        right.append(accuracy(model, load_tokenizer(other.folder), items))
        assert measure_speed(model, 2, 8).prefill_tokens_per_second > 0
        assert len(alternate({"one": model, "other": model}, 1, 8, 1)["one"]) == 1
    speed = speed_up(model, model, 8)
    assert speed["low"] <= speed["median"] <= speed["high"]
    for name in ("perplexity", "bits_per_byte", "kl"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-3)
    assert figures[0]["kl"] > 1e-3
    assert figures[0]["samples"] == figures[1]["samples"]
    assert right[0] == right[1]


@pytest.mark.parametrize("teacher", ["llama-tied", "falcon_h1"], indirect=True)
def test_untrained_candidates(gpu: torch.device, teacher: Checkpoint) -> None:
    importance, recipe = importance_of(teacher, CPU), PruneRecipe()
    arch, losses = cut_everywhere(teacher.arch), []
    for device in (CPU, gpu):
        sizes = {name: arch.sizes[name] for name in deciding_sizes(teacher.arch, recipe)}
        runtime = runtime_of(device)
        found = sort_teacher(teacher, importance, sizes, recipe=recipe, blocks=BLOCKS[:2], runtime=runtime)
        outputs = Live(load_model(teacher, device, torch.float32))
        losses.append(divergence(found.model(arch, runtime), BLOCKS, outputs))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[0] > 1e-2


@pytest.mark.parametrize("teacher", ["llama-tied"], indirect=True)
def test_a_student_on_the_weights_of_a_larger_one(gpu: torch.device, teacher: Checkpoint, tmp_path: Path) -> None:
    models, cuts = written(teacher, tmp_path, BLOCKS, PruneRecipe())
    begins, found = beginning_of(models[0], cuts[0].layers, models[2], cuts[2].layers), []
    for device in (CPU, gpu):
        largest = Headless(load_model(models[0], device, torch.float32))
        own = load_model(models[2], device, torch.float32)
        nested = Nested(Member("small", models[2], begins, 1.0), largest, own)
        loss = nested(BLOCKS.ids.to(device), lambda hidden, head: head.logits(hidden).square().mean())
        loss.backward()
        gradient = largest.model.get_input_embeddings().weight.grad  # type: ignore[operator]
        assert gradient.device == device
        found.append([loss.item(), gradient.norm().item()])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_speeds_of_shapes(gpu: torch.device, teachers: Any, tmp_path: Path) -> None:
    teacher = teachers("llama")
    of_teacher = Speeds(teacher, Serving(2, 16), runtime_of(gpu), tmp_path / "teacher.jsonl")
    with Speeds(teacher, Serving(2, 16), runtime_of(gpu), tmp_path / "speeds.jsonl", of_teacher) as speeds:
        seconds = speeds.measure(teacher.arch.resized(intermediate_size=32))
    assert all(math.isfinite(value) and value > 0 for value in seconds.values())
    assert speeds.conditions["device"].startswith("cuda")


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_rounded_matrices(gpu: torch.device, name: str) -> None:
    scheme = replace(schemes.SCHEMES[name], group=32 if name == "int4" else None)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = (
        schemes.rounded(each, schemes.scales(each, scheme), scheme).cpu() for each in (weight, weight.to(gpu))
    )
    assert torch.equal(on_gpu, on_cpu)
    assert not torch.equal(on_cpu, weight.bfloat16())
    scale = schemes.input_scale(weight.to(gpu).abs().amax(), scheme)
    inputs = schemes.rounded_inputs(weight.to(gpu), scheme, scale)
    assert_close(inputs.cpu(), schemes.rounded_inputs(weight, scheme, scale.cpu()), rtol=1e-5, atol=1e-6)


def test_a_whole_search(gpu: torch.device, tmp_path: Path, verb: Verb) -> None:
    model = make_model(tmp_path / "model", "llama-tied", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text("\n".join(f"{i} times {i} is {i * i}." for i in range(900)))
    settings = {
        "data": tmp_path / "text.txt", "context": 32, "target_params": 0.7, "device": "cuda", "dtype": "float32",
        "calibration.tokens": 128, "search.tokens": 64, "search.shortlist": 2, "search.zero_shot": 3,
        "search.zero_shot_tokens": 32, "search.probe_tokens": 32, "search.distill_tokens": 64,
        "distill.tokens": 128, "distill.batch_size": 1, "evaluation.tokens": 64,
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    verb("search", model, tmp_path / "out", *words)
    rows = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()]
    assert all(row["zero_shot_kl"] > 0 for row in rows)
    assert any(row["distilled_kl"] for row in rows)
