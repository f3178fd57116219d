"""OUT: where results may go, how they replace others, and that one command at a time writes it."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from minitron import lock, pipeline
from minitron.errors import UserError, courtesy
from minitron.history import History, history_of
from minitron.lock import LOCK, locked
from minitron.output import Output
from minitron.recipe import load_recipe
from minitron.run import RUN_RECORD, open_run, teacher_of
from minitron.verbs.calibrate import calibrate
from tests.conftest import make_model
from tests.processes import exit_code, start
from tests.test_compress import QUICK, recipe


def write_result(folder: Path, text: str) -> None:
    (folder / "inner").mkdir(parents=True)
    for name in ("config.json", "weights", "inner/file"):
        (folder / name).write_text(text)


def holds(folder: Path, text: str) -> bool:
    return all((folder / name).read_text() == text for name in ("config.json", "weights", "inner/file"))


@pytest.fixture(params=["missing", "empty", "linked", "old result", "root of a file system"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    path = tmp_path / "parent" / "out"
    if request.param == "linked":
        (tmp_path / "elsewhere").mkdir()
        path.parent.mkdir()
        path.symlink_to("../elsewhere")
    elif request.param == "old result":
        write_result(path, "old")
    elif request.param != "missing":
        path.mkdir(parents=True)
    if request.param == "root of a file system":
        (path / "lost+found").mkdir()
        (path / ".gitkeep").touch()
    return Output(path, "config.json")


def test_a_result_takes_its_place_and_leaves_nothing_else(out: Output) -> None:
    kept = set(out.path.glob("lost*")) | set(out.path.glob(".git*"))
    before = sorted(out.path.parent.rglob("*"))
    with suppress(KeyboardInterrupt), out.work("test") as work:
        write_result(work, "new")
        raise KeyboardInterrupt
    assert sorted(out.path.parent.rglob("*")) == before
    with out.work("test") as work:
        write_result(work, "new")
        assert out.is_empty or holds(out.path, "old")
        out.publish(work)
    assert holds(out.path, "new")
    assert {path.name for path in set(out.path.iterdir()) - kept} == {"config.json", "weights", "inner"}
    assert all(path.exists() for path in kept)


@pytest.mark.parametrize("moves", range(7))
def test_a_publication_that_was_killed_is_finished_by_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    out, move, num_moved = Output(tmp_path / "out", "config.json"), shutil.move, 0
    write_result(out.path, "old")

    def killed(source: Path, target: Path) -> None:
        nonlocal num_moved
        if num_moved == moves:
            raise KeyboardInterrupt
        num_moved += 1
        move(source, target)

    monkeypatch.setattr("shutil.move", killed)
    with pytest.raises(KeyboardInterrupt) if moves < 6 else nullcontext(), out.work("test") as work:
        write_result(work, "new")
        out.publish(work)
    if (out.path / "config.json").exists():  # what has the mark is whole
        assert holds(out.path, "old" if moves == 0 else "new")
    monkeypatch.setattr("shutil.move", move)
    with pytest.raises(UserError, match="is not empty"):
        out.require_usable(overwrite=False)
    assert holds(out.path, "new")
    assert {path.name for path in out.path.iterdir()} == {"config.json", "weights", "inner"}


@pytest.mark.parametrize("has_link", [True, False])
def test_the_teacher_of_a_run_is_found_with_links_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_link: bool
) -> None:
    (tmp_path / "model").mkdir()
    if not has_link:
        refuses: Any = lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no links here"))  # noqa: E731
        monkeypatch.setattr(Path, "symlink_to", refuses)
    with open_run(tmp_path / "run", recipe(tmp_path / "model", tmp_path), overwrite=False) as run:
        run.begin()
        run.link("teacher", tmp_path / "model")
        run.record["stages"]["calibrate"] = {"state": "done"}
    assert (tmp_path / "run" / "teacher").is_symlink() == has_link
    assert teacher_of(tmp_path / "run").samefile(tmp_path / "model")


def test_files_of_a_file_system_without_permissions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no modes here")))
    with (out := Output(tmp_path / "out", "config.json")).work("test") as work:
        write_result(work, "new")
        out.publish(work)
    assert holds(out.path, "new")


def hold(folder: Path) -> None:
    with locked(folder):
        (folder / "held").touch()
        time.sleep(300)


def test_a_second_process_is_refused_until_the_first_is_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(hold, tmp_path, log=tmp_path / "log")
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"process {first.pid} on \S+, since 2.*, last heartbeat \d+ s ago"):
        Output(tmp_path, "config.json").require_usable(overwrite=False)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    exit_code(first)
    with locked(tmp_path):
        assert f"was locked by process {first.pid}" in caplog.text
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    ("machine", "age", "has_flock", "is_held"),
    [
        ("another", 0, True, True),
        ("another", lock.STALE_SECONDS + 5, True, False),
        ("this", 0, True, False),  # the kernel has released the lock with the process
        ("this", 0, False, True),
        ("this", lock.STALE_SECONDS + 5, False, False),
    ],
)
def test_where_the_kernel_does_not_decide_heartbeats_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, age: float, has_flock: bool, is_held: bool
) -> None:
    if not has_flock:
        missing: Any = lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks here"))  # noqa: E731
        monkeypatch.setattr(fcntl, "flock", missing)
    holder = {
        "host": "node17",
        "pid": 4242,
        "machine": lock._machine() if machine == "this" else machine,
        "since": 1.8e9,
    }
    (tmp_path / LOCK).write_text(json.dumps(holder))
    os.utime(tmp_path / LOCK, (time.time() - age,) * 2)
    with pytest.raises(UserError, match="process 4242 on node17") if is_held else nullcontext(), locked(tmp_path):
        pass
    assert (tmp_path / LOCK).exists() == is_held


def test_a_lock_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.02)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 30
        while (tmp_path / LOCK).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK).stat().st_mtime > 0


@pytest.mark.parametrize("error", [ValueError("not YAML"), UserError("no card"), BaseException("panic")])
def test_a_courtesy_that_fails_is_a_warning(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), courtesy("the model card"):
        raise error
    assert caplog.messages == [f"the model card could not be made: {error}"]
    with pytest.raises(KeyboardInterrupt), courtesy("the model card"):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose card and report could not be made, with its teacher and text beside it."""
    folder = tmp_path_factory.mktemp("courtesies")
    teacher = make_model(folder / "model", "llama-tied")
    (teacher / "README.md").write_text("---\nThis model: a merge, see: below\n---\n")
    (folder / "text.txt").write_text("\n".join(f"{i} times {i} is {i * i}." for i in range(2500)))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pipeline.write_card", "pipeline.write_report", "evaluation.greedy_continuation"):
            patch.setattr(f"minitron.{name}", lambda *_: 1 / 0)
        pipeline.compress(recipe(teacher, folder / "text.txt", **QUICK), folder / "run")
    return folder


@pytest.mark.filterwarnings("ignore")
def test_what_accompanies_a_run_is_tried_again_and_costs_nothing_else(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(first / "run", run, symlinks=True)
    assert {stage["state"] for stage in json.loads((run / RUN_RECORD).read_text())["stages"].values()} == {"done"}
    assert (run / "student" / "model.safetensors").exists()
    assert "samples" not in json.loads((run / "eval.json").read_text())["student"]
    for missing in (run / "student" / "README.md", run / "report.html"):
        assert not missing.exists()
    monkeypatch.setattr("minitron.session.open_teacher", lambda *_: pytest.fail("the teacher was opened again"))
    pipeline.compress(recipe(first / "model", first / "text.txt", **QUICK), run)
    assert "license" not in (run / "student" / "README.md").read_text()
    assert (run / "report.html").exists()


def test_a_run_of_a_version_with_fewer_keys_continues(first: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(first / "run", run, symlinks=True)
    record = json.loads((run / RUN_RECORD).read_text())
    del record["recipe"]["search"]["engine"], record["recipe"]["search"]["tensor_parallel"]
    (run / RUN_RECORD).write_text(json.dumps(record))
    pipeline.compress(recipe(first / "model", first / "text.txt", **QUICK), run)
    changed: dict[str, Any] = {**QUICK, "search.engine": "vllm"}
    with pytest.raises(UserError, match=r"search\.engine is None in the folder and vllm now"):
        pipeline.compress(recipe(first / "model", first / "text.txt", **changed), run)


def test_a_run_is_replaced_once_the_new_one_is_finished(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, new = tmp_path / "run", recipe(first / "model", first / "text.txt", **{**QUICK, "seed": 1})
    shutil.copytree(first / "run", run, symlinks=True)
    old = (run / "student" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "distill", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.compress(new, run, overwrite=True)
    assert (run / "student" / "model.safetensors").read_bytes() == old
    with pytest.raises(UserError, match="belongs to another recipe"):
        pipeline.compress(new, run)
    assert "holds an unfinished run, which --overwrite continues" in caplog.text
    monkeypatch.setattr(pipeline, "write_importance", lambda *_: pytest.fail("importance was measured again"))
    pipeline.compress(new, run, overwrite=True)
    assert json.loads((run / RUN_RECORD).read_text())["seed"] == 1
    assert (run / "student" / "model.safetensors").read_bytes() != old
    assert not list(run.glob(".*"))
    assert (run / "teacher").samefile(first / "model")


def test_a_series_that_has_replaced_another_names_its_members_by_their_places(first: Path, tmp_path: Path) -> None:
    series, old = tmp_path / "series", recipe(first / "model", first / "text.txt")
    for overwrite in (False, True):
        with open_run(series, old, overwrite) as run:
            run.begin()
            run.record["stages"]["calibrate"] = {"state": "done"}
            for name, teacher in (("0.7", first / "model"), ("0.5", run.path("0.7") / "student")):
                with open_run(run.path(name), recipe(teacher, first / "text.txt"), False) as member:
                    member.begin()
                    member.path("student").mkdir()
                    History().then({"step": "prune", "of": str(teacher)}).write(member.path("student"))
                    member.link("teacher", teacher)
                    member.record["stages"]["calibrate"] = {"state": "done"}
            assert overwrite == ("minitron-overwrite" in (run.path("0.5") / RUN_RECORD).read_text())
            run.publish()
    assert json.loads((series / "0.5" / RUN_RECORD).read_text())["recipe"]["teacher"] == str(series / "0.7" / "student")
    assert history_of(series / "0.5" / "student").steps[0]["of"] == str(series / "0.7" / "student")
    assert teacher_of(series / "0.5").samefile(series / "0.7" / "student")


def test_a_run_does_not_replace_its_own_inputs(first: Path, tmp_path: Path) -> None:
    shutil.copytree(first / "run", tmp_path / "run", symlinks=True)
    with pytest.raises(UserError, match="which is one of the inputs"):
        pipeline.compress(recipe(tmp_path / "run" / "student", first / "text.txt"), tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "student" / "config.json").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct)
def test_every_file_of_a_run_has_the_permissions_of_the_umask(first: Path, tmp_path: Path, umask: int) -> None:
    shared, before = tmp_path / "shared", os.umask(umask)
    shared.mkdir()
    shared.chmod(0o2775)
    try:
        settings = {**QUICK, "distill.teacher_states": str(shared / "states")}
        pipeline.compress(recipe(first / "model", first / "text.txt", **settings), shared / "run")
        values = {"teacher": str(first / "model"), "data": str(first / "text.txt"), "context": 32}
        given = load_recipe(None, values | {"calibration.tokens": 1024})
        calibrate(first / "model", shared / "scores", recipe=given, device="cpu")
    finally:
        os.umask(before)
    files = [path for path in shared.rglob("*") if not path.is_symlink()]
    assert len(files) > 20
    for path in files:
        wanted = (0o2777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o7777 == wanted, path
