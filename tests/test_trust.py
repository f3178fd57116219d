"""Tests that no code which a model folder holds is run, whoever calls the loader and whatever the folder states."""

import ast
import json
from pathlib import Path

import pytest

from minitron import cli
from tests.conftest import make_model

SOURCES = sorted(Path(__file__).parents[1].joinpath("src", "minitron").rglob("*.py"))
LOADERS = {"from_pretrained", "load_dataset_builder"}


def distrusts(call: ast.Call) -> bool:
    """Return whether a call states `trust_remote_code=False`."""
    return any(
        keyword.arg == "trust_remote_code" and isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        for keyword in call.keywords
    )


def loading_calls(source: str) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in LOADERS]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_loader_refuses_code(path: Path) -> None:
    trusting = [call.lineno for call in loading_calls(path.read_text(encoding="utf-8")) if not distrusts(call)]
    assert not trusting, f"{path}: line {trusting}"


def test_the_walk_sees_a_loader_that_would_run_code() -> None:
    [call] = loading_calls("AutoTokenizer.from_pretrained(folder, trust_remote_code=True)")
    assert not distrusts(call)
    assert any(loading_calls(path.read_text(encoding="utf-8")) for path in SOURCES)


HOSTILE = "open({mark!r}, 'w').close()\n"


def make_hostile(folder: Path, mark: Path, *files: str) -> None:
    """Write code that leaves a mark into a folder, and name it in the entries that transformers runs code for."""
    code = HOSTILE.format(mark=str(mark))
    for name in ("own.py", "custom_generate/generate.py", "modeling_own.py"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(code + "from transformers import *\nclass Own(PreTrainedTokenizerFast): pass\n")
    auto_map = {
        "tokenizer_config.json": {"AutoTokenizer": ["own.Own", None]},
        "config.json": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "modeling_own.Own"},
    }
    for name in files:
        path = folder / name
        values = json.loads(path.read_text())
        if name == "tokenizer_config.json":
            values["tokenizer_class"] = "Own"
        path.write_text(json.dumps({**values, "auto_map": auto_map[name]}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("config.json",), None),
        (("config.json", "tokenizer_config.json"), "the tokenizer needs Python code of its own, which is never run"),
    ],
)
@pytest.mark.parametrize("verb", ["evaluate", "calibrate"])
def test_a_hostile_folder_runs_nothing(
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: tuple[str, ...],
    message: str | None,
    verb: str,
) -> None:
    folder, mark = make_model(tmp_path / "model", "llama-tied"), tmp_path / "ran"
    make_hostile(folder, mark, *files)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    out = {"evaluate": [], "calibrate": [str(tmp_path / "out"), "--tokens", "64"]}[verb]
    limit = ["--max-tokens", "128"] if verb == "evaluate" else []
    arguments = [verb, str(folder), *out, *limit, "--data", str(text_file), "--context", "32"]
    monkeypatch.setattr("sys.argv", ["minitron", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    assert not mark.exists()
    if message is None:
        assert not stopped.value.code, captured.err
    else:
        assert stopped.value.code == 2
        assert message in captured.err


def test_the_hostile_code_would_leave_its_mark(tmp_path: Path) -> None:
    folder, mark = make_model(tmp_path / "model", "llama-tied"), tmp_path / "ran"
    make_hostile(folder, mark, "tokenizer_config.json")
    exec((folder / "own.py").read_text().splitlines()[0], {})
    assert mark.exists()
