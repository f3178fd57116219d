"""Plans: operations, memory, disk and time from configs alone."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import minitron
from minitron.data.blocks import Blocks
from minitron.distillation.optimizers import make_optimizer, make_state
from minitron.distillation.parameters import choose_parameters
from minitron.distillation.rounding import simulate_rounding
from minitron.distillation.teacher import Live
from minitron.distillation.trainer import Trainer
from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.model.memory import attention_windows
from minitron.model.work import forward_flops, layers_along, training_flops
from minitron.planning.disk import disk_space
from minitron.planning.layers import Place, layers_of
from minitron.planning.machine import described_machine
from minitron.planning.memory import moment_bytes, trained_parameters, training_memory
from minitron.recipe import DistillRecipe
from minitron.runtime import Runtime
from tests.conftest import SIZES, make_config, make_model, variant_arch

NEMOTRON = {
    "model_type": "nemotron", "vocab_size": 256_000, "hidden_size": 6144, "intermediate_size": 24_576,
    "num_hidden_layers": 32, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "max_position_embeddings": 4096,
}  # fmt: skip
"""Nemotron-4 15B; its students Minitron 8B and 4B (arXiv 2407.14679, table 5)."""
PAPERS = {
    "15B": ({}, 4.4e17),
    "8B": ({"hidden_size": 4096, "intermediate_size": 16_384}, 2.5e17),
    "4B": ({"hidden_size": 3072, "intermediate_size": 9216, "num_attention_heads": 24}, 1.2e17),
}
"""Each shape, with the operations per step that the paper states for a batch of 1,152."""
BATCH, CONTEXT = 1152, 4096
TINY = {"model_type": "llama", **SIZES, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}
CPU = torch.device("cpu")


def step_flops(name: str) -> float:
    arch = Arch.from_config({**NEMOTRON, **PAPERS[name][0]})
    return training_flops(arch, CONTEXT) * BATCH * CONTEXT


@pytest.mark.parametrize("name", PAPERS)
def test_operations_per_step_are_those_of_the_papers(name: str) -> None:
    assert float(f"{step_flops(name):.1e}") == PAPERS[name][1]


def test_six_operations_per_parameter_are_not_those_of_the_papers() -> None:
    """The control: without attention, and with the input embeddings, the 8B comes out at 2.3e17."""
    found = {
        name: 6 * Arch.from_config({**NEMOTRON, **PAPERS[name][0]}).num_parameters * BATCH * CONTEXT for name in PAPERS
    }
    assert [float(f"{flops:.1e}") for flops in found.values()] == [4.4e17, 2.3e17, 1.2e17]


def test_a_series_saves_what_the_papers_state_without_the_teachers_passes() -> None:
    """Students are trained on a fortieth of the tokens; the teacher's forward passes make 1.80 into 1.77."""
    large, middle, small = (step_flops(name) for name in PAPERS)
    from_scratch, distilled = large + middle + small, large + (middle + small) / 40
    assert round(from_scratch / distilled, 1) == 1.8
    teacher = large / 3
    assert from_scratch / (distilled + 2 * teacher / 40) == pytest.approx(1.77, abs=0.005)


def test_windows_and_chosen_experts_lower_the_operations() -> None:
    arch = variant_arch("mistral")
    full, windowed = forward_flops(arch, 64), forward_flops(arch, 64, [16] * 4)
    per_token = 4 * arch.axis_size("query") * arch.axis_size("head_dim")
    assert full - windowed == 4 * per_token * (64 - 16)
    assert forward_flops(arch, 16) == forward_flops(arch, 16, [16] * 4)
    experts = variant_arch("mixtral")
    more = experts.resized(num_local_experts=3)
    assert forward_flops(experts, 64) - forward_flops(more, 64) == 2 * 4 * experts.axis_size("hidden")  # the router's
    assert experts.num_parameters > more.num_parameters


def saved_bytes(model: Headless, is_mixed: bool) -> int:
    """What autograd keeps of a forward pass over 64 tokens, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # so that no storage takes the place of another
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
    ):
        model(torch.arange(64)[None], lambda hidden, _: hidden.sum())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen3-tied", "nemotron", "gemma2", "gemma3", "granite"])
def test_activations_are_those_that_autograd_keeps(variant: str, dtype: str, attention: str | None) -> None:
    """Within 8 %; the control is the prediction for one layer less. None is transformers' choice, as on a GPU."""
    config, is_mixed = make_config(variant), dtype == "bfloat16"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    model = Headless(model.eval())
    arch, windows = Arch.from_config(config.to_dict()), attention_windows(config.to_dict())
    masked = sum(window < 64 for window in windows) / layers_along(arch, "query")

    def predicted(arch: Arch, place: Place) -> float:
        parts = training_memory(arch, None, DistillRecipe(batch_size=1), place).parts
        return parts["student activations"] + parts.get("weights cast to bfloat16", 0)

    place = Place(64, dtype, "cpu", masked=masked, attention=attention or "sdpa")
    measured = saved_bytes(model, is_mixed)
    assert predicted(arch, place) == pytest.approx(measured, rel=0.08)
    assert predicted(arch.resized(num_hidden_layers=3), place) != pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", ["fp8", "int4"])
def test_rounded_matrices_and_inputs_are_kept_too(quantize: str, dtype: str, tmp_path: Path) -> None:
    """Within 8 %; the control is the prediction without rounding, except where autocast copies as much by itself."""
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
    checkpoint, is_mixed = open_checkpoint(make_model(tmp_path, "llama-tied", **sizes)), dtype == "bfloat16"
    model = load_model(checkpoint, CPU, torch.float32, "eager")
    simulate_rounding(model, checkpoint, quantize)

    def predicted(**changes: Any) -> float:
        recipe = DistillRecipe(batch_size=1, **changes)
        parts = training_memory(checkpoint.arch, None, recipe, Place(64, dtype, "cpu")).parts
        kept = ("student activations", "rounded weights", "weights cast to bfloat16")
        return sum(parts.get(name, 0) for name in kept)

    measured = saved_bytes(Headless(model), is_mixed)
    assert predicted(quantize=quantize) == pytest.approx(measured, rel=0.08)
    assert (predicted() == pytest.approx(measured, rel=0.08)) == is_mixed


@pytest.mark.parametrize("trains", ["full", "norms"])
def test_trained_parameters_and_moments_are_those_of_the_optimizer(trains: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path, "llama-tied"))
    recipe = DistillRecipe.model_validate({"trains": trains})
    model = load_model(checkpoint, CPU, torch.float32)
    choose_parameters(model, checkpoint.arch, recipe, seed=0)
    optimizer = make_optimizer(Headless(model), recipe)
    make_state(optimizer)
    held = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    num_trained = trained_parameters(checkpoint.arch, recipe)
    assert moment_bytes(num_trained, recipe) == sum(value.numel() * value.element_size() for value in held)
    assert (num_trained == checkpoint.arch.num_parameters) == (trains == "full")


def test_disk_is_what_a_training_writes(tmp_path: Path) -> None:
    """A checkpoint after one of two steps; safetensors adds its headers."""
    checkpoint = open_checkpoint(make_model(tmp_path / "model", "llama-tied", hidden_size=96, intermediate_size=256))
    recipe, ids = DistillRecipe(tokens=256, batch_size=2), torch.zeros(4, 64, dtype=torch.int64)
    trainer = Trainer(
        Live(load_model(checkpoint, CPU, torch.float32)), recipe, Blocks(ids, torch.ones_like(ids)),
        Runtime(CPU, torch.float32), tmp_path,
    )  # fmt: skip
    trainer.trained(checkpoint, until=1)
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoint").iterdir())
    space = disk_space("cut", checkpoint.arch, checkpoint.arch, recipe, 64, "float32")
    assert space["two checkpoints"] / 2 == pytest.approx(written, rel=0.05)
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    assert space["student"] == pytest.approx(size, rel=0.05)


def test_what_lowers_memory() -> None:
    arch = Arch.from_config({**NEMOTRON, **PAPERS["8B"][0]})
    teacher, place = Arch.from_config(NEMOTRON), Place(4096, "bfloat16", "cuda", 8)

    def total(place: Place = place, **changes: Any) -> float:
        return training_memory(arch, teacher, DistillRecipe(batch_size=64, **changes), place).total

    for changes in (
        {"activation_checkpointing": True},
        {"optimizer": "adamw8bit"},
        {"teacher_states": "folder"},
        {"trains": "norms"},
    ):
        assert total(**changes) < total()
    assert total(micro_batch_size=2) > total()
    assert total(label_weight=1.0) > total()
    assert total(Place(4096, "bfloat16", "cuda", 16)) < total()
    assert total(Place(2048, "bfloat16", "cuda", 8)) < total()
    assert total(intermediate={"of": ["block_output"]}) > total()
    assert total(correction={"trains": "full"}) > total()


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., Path]:
    def write(**values: Any) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return path

    return write


def staged() -> dict[str, Any]:
    return {
        "context": CONTEXT,
        "distill": {"batch_size": BATCH},
        "stages": (
            {"name": "8b", "shape": PAPERS["8B"][0], "distill": {"tokens": "94B"}},
            {"name": "4b", "shape": PAPERS["4B"][0], "distill": {"tokens": "94B"}},
        ),
    }


def test_a_plan_of_stages(config_file: Callable[..., Path]) -> None:
    teacher = config_file(**NEMOTRON)
    found = minitron.plan(None, teacher, gpus="128xA100-80", price=2.0, **staged()).to_dict()
    assert [stage["num_parameters"] for stage in found["stages"]] == [8_271_699_968, 4_190_509_056]
    large, small = found["stages"]
    assert float(f"{large['flops_per_step']['student']:.1e}") == 2.5e17
    assert large["flops_per_step"]["teacher"] == pytest.approx(step_flops("15B") / 3)
    step_seconds = (large["flops_per_step"]["student"] + large["flops_per_step"]["teacher"]) / (128 * 312e12 * 0.4)
    assert large["tokens_per_second"] == pytest.approx(BATCH * CONTEXT / step_seconds)
    assert large["hours"] == pytest.approx(large["steps"] * step_seconds / 3600, rel=1e-3)  # and calibration
    assert large["cost"] == pytest.approx(large["hours"] * 128 * 2)
    assert small["hours"] < large["hours"]
    assert large["fits"]
    half = minitron.plan(None, teacher, gpus="128xA100-80", utilisation=0.2, **staged()).to_dict()
    assert half["stages"][0]["hours"] == pytest.approx(2 * large["hours"])
    assert half["stages"][0]["cost"] is None


def test_a_series_runs_its_teacher_once(config_file: Callable[..., Path]) -> None:
    teacher = config_file(**TINY)
    settings: dict[str, Any] = {"distill": {"tokens": "1M"}, "context": 64, "gpus": "H100"}
    first, second = minitron.plan(None, teacher, target_params=(0.8, 0.6), **settings).to_dict()["stages"]
    assert first["flops_per_step"]["teacher"] == second["flops_per_step"]["teacher"] == 0
    assert first["flops_besides"]["teacher outputs"] > 0
    assert "teacher outputs" not in second["flops_besides"]
    assert first["disk"]["teacher outputs"] == 1_000_000 // 64 * 64 * SIZES["hidden_size"] * 2
    assert first["num_shapes"] > 1
    assert first["smallest_num_parameters"] < first["num_parameters"] > second["num_parameters"]
    live = {**settings, "lineage": {"stores_states": False}}
    first, _ = minitron.plan(None, teacher, target_params=(0.8, 0.6), **live).to_dict()["stages"]
    assert first["flops_per_step"]["teacher"] > 0


def test_a_nested_series_takes_the_tokens_of_one_training(config_file: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {"distill": {"tokens": "1M"}, "context": 64, "gpus": "H100", "target_params": (0.8, 0.6)}
    teacher = config_file(**TINY)
    found = minitron.plan(None, teacher, **settings, lineage={"nested": True, "weights": (3, 1)}).to_dict()["stages"]
    chain = minitron.plan(None, teacher, **settings).to_dict()["stages"]
    first, second = (stage["tokens"] for stage in found)
    assert first == pytest.approx(750_000, rel=1e-3)
    assert second == pytest.approx(250_000, rel=1e-3)
    assert [stage["tokens"] for stage in chain] == pytest.approx([1_000_000] * 2, rel=1e-3)
    assert found[0]["flops_besides"]["calibration"] > found[1]["flops_besides"]["calibration"] == 0
    assert found[0]["num_parameters"] > found[1]["num_parameters"]


def test_what_does_not_fit_is_stated_with_what_to_change(config_file: Callable[..., Path]) -> None:
    teacher = config_file(**NEMOTRON)
    planned = minitron.plan(None, teacher, gpus="8xA100-40", **(staged() | {"distill": {"batch_size": 64}}))
    first = planned.to_dict()["stages"][0]
    assert not first["fits"]
    assert {"distill.activation_checkpointing=true", "distill.teacher_states=FOLDER"} <= {
        change["settings"] for change in first["changes"]
    }
    assert not any("adamw8bit" in change["settings"] for change in first["changes"])  # one process only
    assert all(change["memory"] < first["memory"]["total"] for change in first["changes"])
    assert any(change["fits"] and "devices" in change["settings"] for change in first["changes"])
    assert "8b does not fit into 36.00 GB" in planned.tables()[-1][2]
    roomy = minitron.plan(None, teacher, gpus="8", gpu_memory="1TB", gpu_flops="312T", **staged()).to_dict()
    assert roomy["stages"][0]["fits"]
    assert not roomy["stages"][0]["changes"]


def test_what_cannot_run_on_several_devices_is_stated(config_file: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {"shape": {"hidden_size": 24}, "context": 64, "gpus": "3xH100", "optimizer": "adamw8bit"}
    distill = {"batch_size": 8, "optimizer": settings.pop("optimizer")}
    [stage] = minitron.plan(None, config_file(**TINY), distill=distill, **settings).to_dict()["stages"]
    assert [problem.split(" ")[0] for problem in stage["problems"]] == ["distill.batch_size", "distill.optimizer"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": "8xH1000"}, "GPU 'H1000' is not known: did you mean 'H100'"),
        ({"gpus": "8"}, "names no GPU: give --gpu-memory"),
        ({"gpus": "x"}, "--gpus 'x' is not understood; accepted: such as 8xH100"),
        ({"gpus": "8xH100", "gpu_memory": "large"}, "--gpu-memory: 'large' must be a size such as 20GiB"),
        ({"gpus": "H100", "utilisation": 0.0}, "--utilisation 0.0 is not a share; accepted: above 0, at most 1"),
        ({"gpus": "H100", "price": -1.0}, "--price -1.0 is below 0"),
        (
            {"gpus": "H100", "dtype": "float16"},
            "dtype float16 is not one to train in; accepted: auto, bfloat16, float32",
        ),
        ({"gpus": "H100", "shape": {}}, "the recipe states no student: give a shape"),
        ({"gpus": "H100", "shape": {"hidden_size": 4800}}, "hidden_size 4800 is above the teacher's 48"),
        ({"gpus": "H100", "context": 4096}, "context 4096 is above the 256 tokens"),
    ],
)
def test_bad_input_is_refused(settings: dict[str, Any], message: str, config_file: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=message):
        minitron.plan(None, config_file(**TINY), **{"shape": {"hidden_size": 24}, "context": 64, **settings})


def test_gpus_are_named_or_described() -> None:
    named = described_machine("8xh100", None, None, "bfloat16")
    assert (named.num_devices, named.memory, named.flops) == (8, 80e9, 989e12)
    assert described_machine("H100", None, None, "float32").flops == 67e12
    described = described_machine("2xMI300X", "192GB", "1307T", "bfloat16")
    assert (described.name, described.memory, described.flops) == ("MI300X", 192e9, 1307e12)


def test_the_command_needs_no_torch(config_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("shape: {hidden_size: 24}\ncontext: 64\n")
    code = (
        "import sys\nfrom minitron.cli import app\napp(standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = ["plan", str(recipe), "--teacher", str(config_file(**TINY)), "--gpus", "8xH100", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["stages"][0]["name"] == "run"


def test_this_machine_is_measured(config_file: Callable[..., Path]) -> None:
    found = minitron.plan(None, config_file(**TINY), shape={"hidden_size": 24}, context=64, device="cpu").to_dict()
    assert found["machine"]["device"] == "cpu"
    assert found["machine"]["flops"] > 1e9
    assert found["stages"][0]["dtype"] == "float32"


def test_every_layer_is_counted_once() -> None:
    """The parameters of layers and of what is outside them are those of the model, in every family."""
    for variant in ("llama", "gpt2", "mixtral", "gpt_oss", "nemotron_h", "falcon_h1"):
        arch = variant_arch(variant)
        in_layers = sum(count * layer.num_parameters for count, layer in layers_of(arch))
        outside = sum(
            torch.Size(row.shape(arch.axis_size)).numel()
            for row in arch.rows
            if not row.is_per_layer and not row.is_buffer
        )
        assert in_layers + outside == arch.num_parameters
