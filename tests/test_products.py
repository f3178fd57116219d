"""How this machine's processor is used: products of float32, the memory of malloc, threads that wait for each other."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron.data.blocks import Blocks
from minitron.distillation import stored_teacher
from minitron.distillation.teacher import Live
from minitron.distillation.trainer import Trainer
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.recipe import DistillRecipe, recipe_from
from minitron.runtime import Runtime, resolve_device, rounds_products
from minitron.session import Session
from tests.conftest import make_model

CPU = torch.device("cpu")
EXACT, ROUNDED = Runtime(CPU, torch.float32), Runtime(CPU, torch.float32, rounds=True)
IN_BFLOAT16 = "float32, operands of products in bfloat16"
has_amx = pytest.mark.skipif(not rounds_products("auto", CPU), reason="oneDNN rounds on processors with AMX only")
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
BLOCKS = Blocks(
    torch.randint(0, 258, (8, 32), generator=torch.Generator().manual_seed(0)), torch.ones(8, 32, dtype=torch.int32)
)


def errors(shape: tuple[int, int, int]) -> list[float]:
    """The errors of a product, of a linear layer, and of the gradient of its weight, relative to float64."""
    generator = torch.Generator().manual_seed(0)
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    weight = b.T.contiguous().requires_grad_()
    output = torch.nn.functional.linear(a, weight)
    output.backward(output.detach())  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    exact = a.double() @ b.double()
    of_weight = output.detach().double().T @ a.double()
    pairs = [(a @ b, exact), (output, exact), (weight.grad, of_weight)]
    return [float((found.detach() - wanted).norm() / wanted.norm()) for found, wanted in pairs]


@pytest.mark.parametrize("shape", [(64, 96, 80), (512, 576, 1536)])
def test_products_of_float32_round_no_operands(shape: tuple[int, int, int]) -> None:
    """The control rounds them to bfloat16, as PyTorch allows oneDNN to do where we ask for it."""
    resolve_device("cpu")
    generator = torch.Generator().manual_seed(0)
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    exact = a.double() @ b.double()
    assert max(errors(shape)) < 1e-6
    with EXACT.training():
        assert max(errors(shape)) < 1e-6
    rounded = a.bfloat16().double() @ b.bfloat16().double()
    assert (rounded - exact).norm() > 1e-4 * exact.norm()


@has_amx
@pytest.mark.parametrize("shape", [(64, 96, 80), (512, 576, 1536)])
def test_trainings_round_operands_and_nothing_else_does(shape: tuple[int, int, int]) -> None:
    with ROUNDED.training():
        assert all(1e-4 < error < 5e-3 for error in errors(shape))
    assert max(errors(shape)) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "device", "processor", "rounds"),
    [
        ("auto", "cpu", {"cpu_name": "Intel", "amx_tile": True, "amx_bf16": True}, True),
        ("float32", "cpu", {"cpu_name": "Intel", "amx_tile": True, "amx_bf16": True}, False),
        ("bfloat16", "cpu", {"cpu_name": "Intel", "amx_tile": True, "amx_bf16": True}, False),
        ("auto", "cuda", {"cpu_name": "Intel", "amx_tile": True, "amx_bf16": True}, False),
        ("auto", "cpu", {"cpu_name": "AMD", "avx512_f": True, "avx512_bf16": True}, False),
        ("auto", "cpu", {}, False),
    ],
)
def test_auto_rounds_on_processors_with_amx(
    dtype: str, device: str, processor: dict[str, Any], rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert rounds_products(dtype, torch.device(device)) is rounds


def trained(folder: Path, runtimes: list[Runtime], steps: int = 4) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The metrics and weights of a student whose training is continued in each of some runtimes."""
    if not (folder.parent / "teacher").exists():
        make_model(folder.parent / "teacher", "llama-tied")
        make_model(folder.parent / "pruned", "llama-tied", seed=1, intermediate_size=40)
    folder.mkdir()
    teacher, pruned = (open_checkpoint(folder.parent / name) for name in ("teacher", "pruned"))
    recipe = DistillRecipe(tokens=steps * 2 * 32, batch_size=2)
    for number, runtime in enumerate(runtimes):
        live = Live(load_model(teacher, CPU, torch.float32))
        trainer = Trainer(live, recipe, BLOCKS[2:], runtime, folder, BLOCKS[:2])
        if number < len(runtimes) - 1:
            trainer.trained(pruned, until=number + 1)
        else:
            trainer.distill(pruned, folder / "out")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(folder / "out" / "model.safetensors")


@has_amx
def test_trainings_round_and_their_measurements_do_not(tmp_path: Path) -> None:
    """The first row is measured before the first step; a resumed training repeats the rounding bit by bit."""
    exact, rounded, resumed = (
        trained(tmp_path / name, runtimes)
        for name, runtimes in (("exact", [EXACT]), ("rounded", [ROUNDED]), ("resumed", [ROUNDED, ROUNDED]))
    )
    assert exact[0][0] == rounded[0][0]
    losses = [rows[-1]["loss"] for rows, _ in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    for row in resumed[0]:
        row.pop("trial", None)  # the test stops a training as a trial is stopped
    assert rounded[0] == resumed[0]
    assert all(torch.equal(rounded[1][name], resumed[1][name]) for name in rounded[1])
    assert not all(torch.equal(rounded[1][name], exact[1][name]) for name in exact[1])


def test_metrics_hold_in_what_each_machine_computed(tmp_path: Path) -> None:
    rows, _ = trained(tmp_path / "moved", [EXACT, ROUNDED, ROUNDED])
    assert [(row["step"], row["dtype"]) for row in rows if "dtype" in row] == [(1, "float32"), (2, IN_BFLOAT16)]


@has_amx
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_stored_states_are_those_of_the_teacher_in_memory(dtype: str, tmp_path: Path, text_file: Path) -> None:
    """The control runs the teacher in the other way."""
    folder = make_model(tmp_path / "teacher", "llama-tied")
    settings = {"teacher": str(folder), "data": str(text_file), "context": 32, "dtype": dtype, "device": "cpu"}
    tokens = {"distill": {"tokens": 64}, "calibration": {"tokens": 64}, "search": {"tokens": 64, "distill_tokens": 64}}
    session = Session(recipe_from(None, **settings, **tokens, evaluation={"tokens": 64}))
    assert session.runtime.training_dtype == (IN_BFLOAT16 if dtype == "auto" else "float32")
    blocks, numbers = session.splits.train[:2], torch.arange(2)
    recipe = session.recipe.distill.model_copy(update={"stored_dtype": "float32"})
    found: Any = stored_teacher(session, tmp_path / "states", blocks, recipe)(blocks.ids, numbers, None)
    assert json.loads((tmp_path / "states" / "states.json").read_text())["dtype"] == (
        f"torch.{session.runtime.training_dtype}"
    )
    live = Live(load_model(session.teacher, CPU, torch.float32))

    def same(runtime: Runtime) -> bool:
        with runtime.training():
            outputs: Any = [live(blocks.ids[i][None], numbers[i][None]) for i in range(2)]
        return all(torch.equal(found.hidden[i], outputs[i].hidden[0]) for i in range(2))

    assert same(session.runtime)
    assert not same(EXACT if session.runtime.rounds else ROUNDED)


MEASURE_FREED = """
import sys, torch
from minitron.evaluation.peak_memory import resident
from minitron.runtime import configure_backends, release_memory
if sys.argv[1] == "configured":
    configure_backends()
before = resident("VmRSS")
tensor = torch.ones(2**24)
held = resident("VmRSS")
del tensor
freed = resident("VmRSS")
release_memory()
print(held - before, freed - before, resident("VmRSS") - before)
"""


@on_glibc
@pytest.mark.parametrize("way", ["configured", "plain"])
def test_freed_memory_is_kept_until_it_is_released(way: str) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE_FREED, way], capture_output=True, text=True, check=True)
    held, freed, released = (int(figure) / 2**26 for figure in done.stdout.split())
    assert held > 0.9
    assert (freed > 0.9) == (way == "configured")
    assert released < 0.1


@pytest.mark.skipif(sys.platform != "linux", reason="torch waits by another library elsewhere")
@pytest.mark.parametrize("given", [None, "active"])
def test_threads_of_the_command_line_sleep_while_they_wait(given: str | None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": given} if given else {})
    command = [sys.executable, "-m", "minitron", "calibrate", str(tmp_path / "none"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    policies = [line.split("'")[1] for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
    assert set(policies) == {(given or "passive").upper()}
