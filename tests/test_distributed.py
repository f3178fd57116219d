"""Property 8, many processes: worlds of 1 and 2 and every accumulation split give the same gradient and student."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron import cli
from minitron.data.blocks import Blocks
from minitron.distillation.intermediate import compare_on_the_way
from minitron.distillation.objective import Objective
from minitron.distillation.parallel import layers_of, lighten
from minitron.distillation.teacher import Live
from minitron.distillation.trainer import Trainer
from minitron.errors import UserError
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.recipe import DistillRecipe, IntermediateRecipe
from minitron.runtime import Runtime
from tests.conftest import make_model
from tests.processes import exit_code, kill_in, start

CPU = torch.device("cpu")
ON_THE_WAY = ("embedding", "block_output", "mlp_input", "attention")
WAYS = [
    ("float32", ", correction: {trains: full}", 1e-3, 1e-5),
    ("bfloat16", "", 0.1, 1e-2),
]
"""With bounds on the difference between two processes and one: of weights, as a share of the distance that they moved,
and of losses. Adam takes full steps along the smallest gradients, however they are rounded."""

STEP = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from minitron.data.blocks import Blocks
from minitron.distillation.parallel import shard, whole
from minitron.runtime import Runtime, joined_world
from minitron.distillation.intermediate import compare_on_the_way
from minitron.distillation.teacher import Live
from minitron.distillation.objective import Objective
from minitron.model.language_model import Headless, load_model
from minitron.model.checkpoint import open_checkpoint
from minitron.recipe import DistillRecipe, IntermediateRecipe

teacher, student, out = map(Path, sys.argv[1:4])
cpu = torch.device("cpu")
ids = torch.randint(0, 258, (4, 24), generator=torch.Generator().manual_seed(0))
pruned = open_checkpoint(student)
with joined_world(cpu) as world:
    model = Headless(load_model(pruned, cpu, torch.float64).train())
    said = Live(load_model(open_checkpoint(teacher), cpu, torch.float64))
    between = compare_on_the_way(
        said.headless.model, open_checkpoint(teacher).arch, model, pruned.arch, IntermediateRecipe(of=sys.argv[4:]), cpu
    )
    runtime = Runtime(cpu, torch.float64, world=world)
    shard(model, pruned.arch, runtime)
    shard(said.headless, said.arch, runtime, is_teacher=True)
    recipe = DistillRecipe(batch_size=4, label_weight=0.5)
    objective = Objective(said, recipe, runtime, between if between.places else None)
    loss = objective.accumulate(model, Blocks(ids, ids), torch.arange(4))
    grads = {name: whole(p.grad).contiguous() for name, p in model.named_parameters()}
    grads["loss"] = world.sum(loss)
    if world.is_main:
        save_file(grads, out)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "teacher", "llama-tied"), make_model(
        folder / "student",
        "llama-tied",
        seed=1,
        intermediate_size=40,
        hidden_size=36,
        vocab_size=264,  # padded
    )


def gradients(
    models: tuple[Path, Path], micro_batch_size: int, num_blocks: int = 4, of: Sequence[Any] = (), **more: Any
) -> dict[str, torch.Tensor]:
    teacher, student = (load_model(open_checkpoint(folder), CPU, torch.float64) for folder in models)
    headless = Headless(student)
    ids = torch.randint(0, 258, (4, 24), generator=torch.Generator().manual_seed(0))[:num_blocks]
    recipe = DistillRecipe(batch_size=num_blocks, micro_batch_size=micro_batch_size, label_weight=0.5, **more)
    arches = [open_checkpoint(folder).arch for folder in models]
    between = compare_on_the_way(teacher, arches[0], headless, arches[1], IntermediateRecipe(of=tuple(of)), CPU)
    calls: list[Any] = []
    student.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    lighten(headless, arches[1], recipe)
    objective = Objective(Live(teacher), recipe, Runtime(CPU, torch.float64), between if of else None)
    loss = objective.accumulate(headless, Blocks(ids, ids), torch.arange(num_blocks))
    grads = {name: parameter.grad for name, parameter in headless.named_parameters() if parameter.grad is not None}
    return {**grads, "loss": loss, "calls": torch.tensor(len(calls))}


@pytest.mark.parametrize("of", [(), ON_THE_WAY])
@pytest.mark.parametrize("micro_batch_size", [2, 3, 4])
def test_any_accumulation_split_gives_the_same_gradient(
    models: tuple[Path, Path], micro_batch_size: int, of: Sequence[str]
) -> None:
    one, other = gradients(models, 1, of=of), gradients(models, micro_batch_size, of=of)
    assert ("projection.weight" in one) == bool(of)
    assert one.pop("calls") > other["calls"]
    for name, expected in one.items():
        torch.testing.assert_close(other[name], expected, atol=1e-12, rtol=1e-9)


def test_fewer_blocks_do_not(models: tuple[Path, Path]) -> None:
    one, other = gradients(models, 1), gradients(models, 1, num_blocks=3)
    del one["calls"]
    assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-6


def test_forgotten_activations_are_the_same_when_computed_anew(models: tuple[Path, Path]) -> None:
    one, other = gradients(models, 2, of=ON_THE_WAY), gradients(models, 2, of=ON_THE_WAY, activation_checkpointing=True)
    assert other.pop("calls") == 2 * one.pop("calls")
    assert all(torch.equal(other[name], expected) for name, expected in one.items())


def test_layers_are_compiled_if_asked_for(models: tuple[Path, Path]) -> None:
    pruned = open_checkpoint(models[1])
    for wanted in (False, True):
        student = Headless(load_model(pruned, CPU, torch.float32))
        lighten(student, pruned.arch, DistillRecipe(compile=wanted))
        assert [layer._compiled_call_impl is not None for layer in layers_of(student, pruned.arch)] == [wanted] * 4


@pytest.mark.parametrize("of", [(), ON_THE_WAY])
def test_two_processes_give_the_gradient_of_one(models: tuple[Path, Path], tmp_path: Path, of: Sequence[str]) -> None:
    script, out = tmp_path / "step.py", tmp_path / "grads.safetensors"
    script.write_text(STEP)
    program = [str(script), *map(str, models), str(out), *of]
    if of:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run([*torchrun, *program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        codes, log = on_two_ranks(program, tmp_path / "log")
        assert codes == [0, 0], log[-2000:]
    found = load_file(out)
    expected_gradients = gradients(models, 1, of=of)
    del expected_gradients["calls"]
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(found[name], expected, atol=1e-12, rtol=1e-9)


def apart(one: Path, two: Path, start: Path) -> float:
    """How far two students are from each other, as a share of how far they are from their start."""
    found, other, first = (load_file(folder / "model.safetensors") for folder in (one, two, start))
    between, way = (sum(float((found[n] - x[n]).square().sum()) for n in found) for x in (other, first))
    return float((between / way) ** 0.5)


def run_program(arguments: list[str], kill_at: int | None = None) -> None:
    """Run a program, or the command line for `minitron`, whose first rank is killed in a step of distillation."""
    sys.argv = arguments
    if kill_at is not None and os.environ.get("RANK", "0") == "0":
        kill_in("distill", kill_at, signal.SIGKILL)
    if arguments[0] == "minitron":
        cli.main()
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def on_two_ranks(program: list[str], log: Path, kill_at: int | None = None) -> tuple[list[int], str]:
    """Return the exit codes of two processes as torchrun would start them, and what they wrote.

    If one fails, both end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        start(run_program, program, kill_at, log=log, environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    while any(rank.is_alive() for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)
    return [exit_code(rank) for rank in ranks], log.read_text()


def losses(folder: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([row["loss"] for row in rows if "loss" in row])


@pytest.mark.parametrize(("dtype", "more", "share", "rtol"), WAYS)
def test_two_processes_train_the_student_of_one(
    models: tuple[Path, Path],
    tmp_path: Path,
    text_file: Path,
    dtype: str,
    more: str,
    share: float,
    rtol: float,
) -> None:
    options = ["--data", str(text_file), "--context", "32", "--tokens", "1280", "--device", "cpu", "--dtype", dtype]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"distill: {{batch_size: 4{more}}}\nsearch: {{tokens: 256}}\n")
    one, two = (
        ["distill", *map(str, models), str(tmp_path / name), *options, "--recipe", str(recipe)]
        for name in ("one", "two")
    )
    cli.app(one, standalone_mode=False)
    codes, log = on_two_ranks(["minitron", *two], tmp_path / "log")
    assert codes == [0, 0], log[-2000:]
    assert apart(tmp_path / "one", tmp_path / "two", models[1]) < share
    expected = losses(tmp_path / "one")
    assert len(expected) == 10
    torch.testing.assert_close(losses(tmp_path / "two"), expected, rtol=rtol, atol=0)


STOPPED = """
import runpy, signal, sys
from tests.processes import kill_in

kill_in("distill", 4, int(sys.argv.pop(1)))
runpy.run_module("minitron", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("name", "status", "more"),
    [("SIGTERM", 143, ""), ("SIGINT", 130, ", intermediate: {of: [embedding, block_output]}")],
)
def test_a_run_that_is_told_to_stop_loses_nothing(
    models: tuple[Path, Path], tmp_path: Path, text_file: Path, name: str, status: int, more: str
) -> None:
    (tmp_path / "stopped.py").write_text(STOPPED)
    (tmp_path / "recipe.yaml").write_text(f"distill: {{batch_size: 4{more}}}\nsearch: {{tokens: 256}}\n")
    given = ["--data", str(text_file), "--context", "32", "--tokens", "1280", "--recipe", str(tmp_path / "recipe.yaml")]
    verb = [*map(str, models)]
    stopped = subprocess.run(
        [sys.executable, str(tmp_path / "stopped.py"), str(int(signal.Signals[name])), "distill", *verb,
         str(tmp_path / "out"), *given], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert stopped.returncode == status, stopped.stderr
    assert stopped.stderr.splitlines()[-1] == "stopped, with everything saved: run the same command again to continue"
    assert json.loads((tmp_path / "out" / ".minitron-distill" / "checkpoint" / "state.json").read_text())["step"] == 4
    for out in ("out", "through"):
        cli.app(["distill", *verb, str(tmp_path / out), *given], standalone_mode=False)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "through" / "model.safetensors"
    ).read_bytes()
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == (tmp_path / "through" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("broken", [[2], list(range(3, 12)), list(range(3, 13))])
def test_steps_without_a_finite_loss_are_skipped(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: list[int]
) -> None:
    ids = torch.randint(0, 258, (14, 24), generator=torch.Generator().manual_seed(0))
    blocks, teacher = (
        Blocks(ids, torch.ones_like(ids)),
        Live(load_model(open_checkpoint(models[0]), CPU, torch.float32)),
    )
    weights, steps = [], iter(range(14))

    accumulate = Objective.accumulate

    def accumulate_or_break(objective: Objective, student: Headless, *rest: Any, **options: Any) -> torch.Tensor:
        weights.append(student.model.get_input_embeddings().weight.detach().clone())  # type: ignore[operator]
        losses = accumulate(objective, student, *rest, **options)
        return losses * float("nan") if next(steps) in broken else losses

    monkeypatch.setattr(Objective, "accumulate", accumulate_or_break)
    recipe = DistillRecipe(tokens=14 * 24, batch_size=1)
    (tmp_path / "work").mkdir()

    def run() -> None:
        trainer = Trainer(teacher, recipe, blocks, Runtime(CPU, torch.float32), tmp_path / "work", blocks[:2])
        trainer.distill(open_checkpoint(models[1]), tmp_path / "out")

    if len(broken) == 10:
        with pytest.raises(UserError, match=r"loss nan, gradient .* the last of 10 in a row"):
            run()
        assert not (tmp_path / "out").exists()
        return
    run()
    for step in range(13):
        assert torch.equal(weights[step], weights[step + 1]) == (step in broken)
    rows = [json.loads(row) for row in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] - 1 for row in rows if "skipped" in row] == broken


@pytest.mark.parametrize("more", [", correction: {trains: full}", ""])
def test_a_run_killed_on_two_processes_continues_on_one(
    models: tuple[Path, Path], tmp_path: Path, text_file: Path, more: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    # Held-out perplexity is measured every other step, and a checkpoint follows every step.
    recipe.write_text(f"distill: {{batch_size: 4, checkpoint_seconds: 0{more}}}\nsearch: {{tokens: 256}}\n")
    verb = ["distill", *map(str, models)]
    options = ["--data", str(text_file), "--context", "32", "--tokens", "1280", "--device", "cpu", "--dtype", "float32",
               "--recipe", str(recipe)]  # fmt: skip
    program = ["minitron", *verb, str(tmp_path / "two"), *options]
    codes, log = on_two_ranks(program, tmp_path / "log", kill_at=4)
    assert codes[0] == -signal.SIGKILL, log[-2000:]
    checkpoint = tmp_path / "two" / ".minitron-distill" / "checkpoint"
    assert json.loads((checkpoint / "state.json").read_text())["step"] == 3
    assert all(path.suffix in {".safetensors", ".json"} for path in checkpoint.iterdir())
    for name in ("two", "one"):
        cli.app([*verb, str(tmp_path / name), *options], standalone_mode=False)
    assert apart(tmp_path / "one", tmp_path / "two", models[1]) < 1e-3
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=0)
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(row)["step"] for row in rows[0]] == [json.loads(row)["step"] for row in rows[1]]
    assert not list(tmp_path.glob(".*"))


# One shape is on the short list: of shapes that tie, the faster one is chosen, by the clock.
STAGES = """
stages:
  - {name: corrected, correct: true, distill: {tokens: 256}}
  - {name: searched, target_params: 0.7, distill: {tokens: 1280}}
  - {name: longer, context: 64, distill: {tokens: 512}}
calibration: {tokens: 512}
search: {tokens: 256, shortlist: 1, zero_shot: 4, zero_shot_tokens: 64, probe_tokens: 0, distill_tokens: 0}
distill: {batch_size: 4, checkpoint_seconds: 0}
evaluation: {tokens: 256}
"""


def test_compress_takes_the_stages_of_one_process_on_two(
    models: tuple[Path, Path], tmp_path: Path, text_file: Path
) -> None:
    """Also where the first process is killed in a step of the second stage, and the command is run again."""
    (tmp_path / "recipe.yaml").write_text(STAGES)
    options = ["--data", str(text_file), "--context", "32", "--device", "cpu", "--dtype", "float32",
               "--recipe", str(tmp_path / "recipe.yaml")]  # fmt: skip
    verbs = {name: ["compress", str(models[0]), str(tmp_path / name), *options] for name in ("one", "two")}
    codes, log = on_two_ranks(["minitron", *verbs["two"]], tmp_path / "log", kill_at=4)
    assert codes[0] == -signal.SIGKILL, log[-2000:]
    state = tmp_path / "two" / "searched" / "checkpoint" / "state.json"
    assert json.loads(state.read_text())["step"] == 3
    codes, log = on_two_ranks(["minitron", *verbs["two"]], tmp_path / "log")
    assert codes == [0, 0], log[-2000:]
    cli.app(verbs["one"], standalone_mode=False)
    for name, of in (("corrected", "corrected"), ("searched", "student"), ("longer", "student")):
        one, two = (tmp_path / run / name for run in ("one", "two"))
        torch.testing.assert_close(losses(two), losses(one), rtol=1e-4, atol=0)
        assert open_checkpoint(one / of).arch.sizes == open_checkpoint(two / of).arch.sizes
        figures = [json.loads((run / "eval.json").read_text()) for run in (one, two)]
        assert figures[1][of]["perplexity"] == pytest.approx(figures[0][of]["perplexity"], rel=1e-4)
        steps = json.loads((two / "run.json").read_text())["stages"]
        assert {step["state"] for step in steps.values()} == {"done"}
    assert (tmp_path / "two" / "report.html").exists()
    assert not list(tmp_path.glob("two/.*"))


def test_two_processes_tune_on_chats_like_one(chatty: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(80)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--data", str(tmp_path / "chats.jsonl"), "--context", "64", "--epochs", "1", "--device", "cpu",
               "--dtype", "float32", "--set", "distill.batch_size=4", "--learning-rate", "1e-3"]  # fmt: skip
    verbs = {name: ["tune", str(chatty), str(tmp_path / name), *options] for name in ("one", "two")}
    codes, log = on_two_ranks(["minitron", *verbs["two"]], tmp_path / "log")
    assert codes == [0, 0], log[-2000:]
    cli.app(verbs["one"], standalone_mode=False)
    assert apart(tmp_path / "one", tmp_path / "two", chatty) < 1e-3
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=0)
    steps = [json.loads((tmp_path / name / "minitron.json").read_text())["steps"][-1] for name in ("one", "two")]
    assert steps[0]["answers"] == steps[1]["answers"]
    assert not list(tmp_path.glob("two/.*"))


def test_chats_of_the_teacher_reach_both_processes(chatty: Path, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "shape: {intermediate_size: 48}\nchats: {share: 0.25, max_new_tokens: 4}\nevaluation: {tokens: 256}\n"
        "calibration: {tokens: 256}\ndistill: {batch_size: 4}\n"
    )
    options = ["--data", str(text_file), "--context", "32", "--tokens", "1024", "--device", "cpu", "--dtype", "float32",
               "--recipe", str(tmp_path / "recipe.yaml")]  # fmt: skip
    verbs = {name: ["compress", str(chatty), str(tmp_path / name), *options] for name in ("one", "two")}
    codes, log = on_two_ranks(["minitron", *verbs["two"]], tmp_path / "log")
    assert codes == [0, 0], log[-2000:]
    cli.app(verbs["one"], standalone_mode=False)
    one, two = ((tmp_path / name / "chats.jsonl").read_text() for name in ("one", "two"))
    assert one == two
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4, atol=0)
