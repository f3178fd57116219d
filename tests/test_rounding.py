"""A student that is trained for a scheme computes, to the bit, with the values that its export will hold."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from minitron import cli, pipeline
from minitron.data.blocks import Blocks
from minitron.distillation.rounding import (
    RoundedLinear,
    as_exported,
    is_divided,
    require_roundable,
    simulate_rounding,
)
from minitron.distillation.teacher import Live
from minitron.distillation.trainer import Trainer
from minitron.errors import UserError
from minitron.evaluation.perplexity import measure_perplexity
from minitron.history import history_of
from minitron.model import schemes
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model
from minitron.model.schemes import SCHEMES, quantised_tensors, scheme_for
from minitron.recipe import DistillRecipe
from minitron.reports.html import write_comparison
from minitron.runtime import Runtime
from minitron.session import Session
from tests.conftest import VARIANTS, make_model, variant_arch
from tests.test_compress import QUICK, recipe
from tests.test_distributed import on_two_ranks

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, torch.float32)
DIVIDED = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
"""Sizes that groups of 32 entries divide."""
IDS = torch.randint(0, 258, (6, 24), generator=torch.Generator().manual_seed(0))
BLOCKS = Blocks(IDS, torch.ones_like(IDS, dtype=torch.int32))


def is_roundable(variant: str) -> bool:
    try:
        require_roundable(variant_arch(variant), "int8")
    except UserError:
        return False
    return True


ROUNDABLE = [variant for variant in VARIANTS if is_roundable(variant)]


def with_matrices(checkpoint: Checkpoint, name: str) -> Any:
    """The stock model, its matrices replaced by those of an export."""
    model, scheme = load_model(checkpoint, CPU, torch.float32), scheme_for(name, checkpoint.arch)
    state, prefix = model.state_dict(), checkpoint.arch.family.prefix
    for tensor in quantised_tensors(checkpoint.arch):
        weight = checkpoint.tensor(tensor)
        ours = tensor if tensor in state else model.base_model_prefix + "." + tensor.removeprefix(prefix)
        state[ours].copy_(schemes.rounded(weight, schemes.scales(weight, scheme), scheme))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def rounding_inputs(model: Any, name: str) -> Any:
    """The model, whose roundable modules receive inputs as the scheme rounds them."""

    def enter(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        (inputs,) = args
        if name == "int8":
            step = inputs.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127.5
            return ((inputs / step).round().clamp(-128, 127) * step,)
        step = (inputs.abs().max() / 448).to(torch.bfloat16).float()
        return ((inputs / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step,)

    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in module_name and "embed_out" not in module_name:
            module.register_forward_pre_hook(enter)
    return model


@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("teacher", ROUNDABLE, indirect=True)
def test_every_family_computes_as_its_export(teacher: Checkpoint, name: str) -> None:
    stock, model = load_model(teacher, CPU, torch.float32), load_model(teacher, CPU, torch.float32)
    simulate_rounding(model, teacher, name)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True))
    found, expected = logits(model), logits(rounding_inputs(with_matrices(teacher, name), name))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for other in (stock, with_matrices(teacher, name)):
        assert float((found - logits(other)).abs().max()) > 1e-3


def test_other_families_are_refused_in_one_line() -> None:
    refused = set(VARIANTS) - set(ROUNDABLE)
    assert {variant_arch(variant).model_type for variant in refused} >= {
        "gpt2",
        "mixtral",
        "gpt_oss",
        "mamba2",
        "bamba",
    }
    for variant in refused:
        with pytest.raises(UserError) as error:
            require_roundable(variant_arch(variant), "int8")
        assert "\n" not in str(error.value)


def test_shapes_whose_groups_do_not_divide_are_not_offered() -> None:
    arch = variant_arch("llama")
    sizes = {"hidden_size": np.array([48, 64, 64, 64, 64]), "intermediate_size": np.array([32, 32, 48, 96, 96]),
             "num_attention_heads": np.array([4, 4, 4, 4, 6])}  # fmt: skip
    for name, expected in (("int4", [False, True, False, True, False]), ("int8", [True] * 5)):
        found = is_divided(arch, name, sizes)
        assert np.broadcast_to(found, 5).tolist() == expected
        for i, is_accepted in enumerate(expected):
            shape = arch.resized(**{key: int(values[i]) for key, values in sizes.items()}, num_key_value_heads=2)
            with nullcontext() if is_accepted else pytest.raises(UserError, match="a multiple of 32"):
                require_roundable(shape, name)


def rounded_linear(name: str) -> Any:
    torch.manual_seed(0)
    linear: Any = torch.nn.Linear(64, 24)
    linear.__class__ = RoundedLinear
    linear.scheme = replace(SCHEMES[name], group=32) if name == "int4" else SCHEMES[name]
    linear.saved = torch.float32
    return linear


@pytest.mark.parametrize("name", SCHEMES)
def test_the_gradient_passes_straight_through(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, gradient = torch.randn(5, 64, generator=generator), torch.randn(5, 24, generator=generator)
    linear = rounded_linear(name)
    scheme = linear.scheme
    entering = inputs.clone().requires_grad_()
    linear(entering).backward(gradient)
    weight = as_exported(linear.weight.detach(), scheme).float()
    scale = schemes.input_scale(inputs.abs().max(), scheme)
    rounded = schemes.rounded_inputs(inputs, scheme, scale)
    torch.testing.assert_close(entering.grad, gradient @ weight)
    torch.testing.assert_close(linear.weight.grad, gradient.T @ rounded)
    torch.testing.assert_close(linear.bias.grad, gradient.sum(dim=0))
    assert float((entering.grad - gradient @ linear.weight.detach()).abs().max()) > 1e-4
    assert (float((linear.weight.grad - gradient.T @ inputs).abs().max()) > 1e-4) == (name != "int4")


Train = Callable[..., Trainer]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    student = make_model(tmp_path / "pruned", "llama-tied", seed=1, intermediate_size=32, **DIVIDED)
    return make_model(tmp_path / "teacher", "llama-tied", **DIVIDED), student


@pytest.fixture
def trainer(models: tuple[Path, Path], tmp_path: Path) -> Train:
    """Returns trainers, each with a folder of its own."""

    def make(name: str, quantize: str | None = "int4", **changes: Any) -> Trainer:
        (tmp_path / name).mkdir()
        values = {"tokens": 24 * 12, "batch_size": 2, "learning_rate": 3e-3, "quantize": quantize, **changes}
        teacher = Live(load_model(open_checkpoint(models[0]), CPU, torch.float32))
        return Trainer(teacher, DistillRecipe.model_validate(values), BLOCKS, RUNTIME, tmp_path / name, BLOCKS[:2])

    return make


@pytest.mark.parametrize("name", SCHEMES)
def test_the_saved_student_rounds_to_what_was_trained(
    models: tuple[Path, Path], trainer: Train, tmp_path: Path, name: str
) -> None:
    """Also where a loss at places within the layers is added; the controls are neighbours of that model."""
    pruned = open_checkpoint(models[1])
    more = {"intermediate": {"of": ["block_output", "attention"]}}
    trained = trainer("trained", name, **more).trained(pruned)
    computed = logits(trained.headless.model)
    trainer("saved", name, **more).distill(pruned, tmp_path / "student")
    student = open_checkpoint(tmp_path / "student")
    assert set(student.tensors) == set(pruned.tensors)
    if name == "int4":
        assert torch.equal(computed, logits(with_matrices(student, name)))
    again = load_model(student, CPU, torch.float32)
    simulate_rounding(again, student, name)
    assert torch.equal(computed, logits(again))
    for other in (load_model(student, CPU, torch.float32), with_matrices(pruned, name)):
        assert not torch.equal(computed, logits(other))
    rows = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["heldout_perplexity"] == measure_perplexity(again, BLOCKS[:2]).perplexity
    assert rows[-1]["loss"] < rows[1]["loss"]


def test_a_student_in_bfloat16_rounds_from_bfloat16(models: tuple[Path, Path], trainer: Train, tmp_path: Path) -> None:
    """What is trained in float32 is rounded to the dtype of the file first: else some values would be others."""
    state = load_file(models[1] / "model.safetensors")
    save_file(
        {key: value.bfloat16() for key, value in state.items()}, models[1] / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((models[1] / "config.json").read_text())
    (models[1] / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    pruned = open_checkpoint(models[1])
    assert pruned.dtype == torch.bfloat16
    trained = trainer("trained").trained(pruned)
    trainer("saved").distill(pruned, tmp_path / "student")
    student, scheme = open_checkpoint(tmp_path / "student"), scheme_for("int4", pruned.arch)
    parameters, from_float32 = trained.headless.model.state_dict(), []
    for tensor in quantised_tensors(pruned.arch):
        module: Any = trained.headless.model.get_submodule(tensor.removesuffix(".weight"))
        with torch.no_grad():
            computed = module(torch.eye(module.in_features)).T
        assert torch.equal(computed, as_exported(student.tensor(tensor), scheme).float())
        from_float32.append(torch.equal(computed, as_exported(parameters[tensor], scheme).float()))
    assert not all(from_float32)


@pytest.mark.parametrize("more", [{}, {"activation_checkpointing": True}])
def test_a_training_continues_to_the_same_bits(
    models: tuple[Path, Path], trainer: Train, tmp_path: Path, more: dict[str, Any]
) -> None:
    pruned, twice = open_checkpoint(models[1]), trainer("twice", **more)
    trainer("once").distill(pruned, tmp_path / "one")
    twice.trained(pruned, until=3)
    twice.distill(pruned, tmp_path / "two")
    trainer("unrounded", None).distill(pruned, tmp_path / "three")
    bits = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert bits[0] == bits[1] != bits[2]


def test_norms_alone_are_trained_on_rounded_matrices(models: tuple[Path, Path], trainer: Train, tmp_path: Path) -> None:
    pruned = open_checkpoint(models[1])
    trainer("norms", trains="norms").distill(pruned, tmp_path / "student")
    student = open_checkpoint(tmp_path / "student")
    changed = {name for name in pruned.tensors if not torch.equal(pruned.tensor(name), student.tensor(name))}
    assert changed == {name for name in pruned.tensors if "norm" in name}


@pytest.mark.filterwarnings("ignore")  # a compiler reads gradients of tensors that have none
@pytest.mark.parametrize("name", SCHEMES)
def test_compiled_maps_round_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    linear, inputs = rounded_linear(name), torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for function in (linear, torch.compile(linear, backend="aot_eager", fullgraph=True)):
        outputs = function(inputs)
        outputs.square().sum().backward()
        found.append((outputs.detach(), linear.weight.grad.clone()))
        linear.zero_grad()
    torch.testing.assert_close(found[1], found[0])
    assert float((found[0][0] - torch.nn.functional.linear(inputs, linear.weight, linear.bias)).abs().max()) > 1e-3


STEP = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from minitron.distillation.parallel import shard, whole
from minitron.distillation.rounding import simulate_rounding
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.runtime import Runtime, joined_world

checkpoint, out, dtype = open_checkpoint(Path(sys.argv[1])), sys.argv[2], getattr(torch, sys.argv[3])
cpu = torch.device("cpu")
ids = torch.randint(0, 258, (2, 24), generator=torch.Generator().manual_seed(0))
with joined_world(cpu) as world:
    runtime = Runtime(cpu, dtype, world=world)
    model = Headless(load_model(checkpoint, cpu, runtime.weights_dtype))
    simulate_rounding(model.model, checkpoint, "int4")
    shard(model, checkpoint.arch, runtime)
    with runtime.autocast():
        states = model(ids, lambda hidden, head: hidden)
    states.square().sum().backward()
    found = {name: whole(parameter.grad).contiguous() for name, parameter in model.named_parameters()
             if parameter.grad is not None}
    if world.is_main:
        save_file({"states": states.detach().contiguous(), **found}, out)
"""


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_two_processes_round_as_one(models: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    """Layers are gathered in float32 where they are rounded from it, also for a forward pass in bfloat16."""
    script = tmp_path / "step.py"
    script.write_text(STEP)
    program = [str(script), str(models[1]), str(tmp_path / "two.safetensors"), dtype]
    codes, log = on_two_ranks(program, tmp_path / "log")
    assert codes == [0, 0], log[-2000:]
    sys.argv = [*program[:2], str(tmp_path / "one.safetensors"), dtype]
    exec(compile(STEP, "step", "exec"), {})
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    atol, rtol = (1e-12, 1e-9) if dtype == "float64" else (1e-2, 1e-2)
    torch.testing.assert_close(two, one, atol=atol, rtol=rtol)
    assert torch.equal(two["states"], one["states"]) or dtype == "float64"


def test_a_run_measures_the_student_as_saved_and_rounded(tmp_path: Path, text_file: Path) -> None:
    teacher = make_model(tmp_path / "model", "qwen3-tied", **DIVIDED)
    shape = {"target_params": None, "shape": {"intermediate_size": 32}}
    given = recipe(teacher, text_file, **QUICK, **shape, **{"distill.quantize": "int4"})
    figures = pipeline.compress(given, tmp_path / "run")
    assert list(figures) == ["teacher", "pruned", "student", "student in int4"]
    student, evaluation = open_checkpoint(tmp_path / "run" / "student"), Session(given).splits.evaluation
    for name, model in (
        ("student", load_model(student, CPU, torch.float32)),
        ("student in int4", with_matrices(student, "int4")),
    ):
        assert figures[name]["perplexity"] == measure_perplexity(model, evaluation).perplexity
    assert figures["student"]["kl"] != figures["student in int4"]["kl"]
    assert history_of(student.folder).steps[-1]["quantize"] == "int4"
    card, report = ((tmp_path / "run" / path).read_text() for path in ("student/README.md", "report.html"))
    for text in (card, report):
        assert "as it is saved" in text
        assert "student in int4" in text
    assert "minitron export PATH OUT --format w4a16" in card
    write_comparison([tmp_path / "run"], tmp_path / "compared.html")
    assert f"{figures['student in int4']['perplexity']:.4g} in int4" in (tmp_path / "compared.html").read_text()


def test_what_makes_no_sense_is_refused_before_any_work(
    models: tuple[Path, Path], tmp_path: Path, text_file: Path
) -> None:
    given = ["--data", str(text_file), "--context", "32", "--tokens", "256", "--device", "cpu"]
    teacher, narrow = models[0], make_model(tmp_path / "narrow", "llama-tied")
    out = str(tmp_path / "out")
    for words, message in (
        (["distill", str(teacher), str(models[1]), out, "--set", "distill.trains=lora"], "trains: lora"),
        (["distill", str(teacher), str(narrow), out], "a multiple of 32"),
        (["correct", str(teacher), out], "correct trains the teacher alone"),
    ):
        with pytest.raises(UserError, match=message):
            cli.app([*words, *given, "--set", "distill.quantize=int4"], standalone_mode=False)
        assert not (tmp_path / "out").exists()


def test_stock_trainings_hold_no_rounded_module(models: tuple[Path, Path], trainer: Train) -> None:
    for quantize, number in ((None, 0), ("int4", 4 * 7)):
        model = trainer(f"{quantize}", quantize, tokens=48).trained(open_checkpoint(models[1])).headless.model
        assert sum(isinstance(module, RoundedLinear) for module in model.modules()) == number


@pytest.mark.filterwarnings("ignore")  # of the library that reads the export
def test_the_export_holds_what_was_trained(models: tuple[Path, Path], trainer: Train, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    pruned, student = open_checkpoint(models[1]), tmp_path / "student"
    trained = trainer("trained").trained(pruned).headless.model
    trainer("saved").distill(pruned, student)
    cli.app(["export", str(student), str(tmp_path / "export"), "--format", "w4a16"], standalone_mode=False)
    quantisation = CompressedTensorsConfig(dequantize=True)
    exported = AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", dtype=torch.float32, quantization_config=quantisation
    )
    for name in quantised_tensors(pruned.arch):
        module: Any = trained.get_submodule(name.removesuffix(".weight"))
        held = exported.get_parameter(name)
        assert torch.equal(as_exported(module.weight.detach(), module.scheme).float(), held)
        assert not torch.equal(module.weight, held)
