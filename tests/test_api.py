"""What `import minitron` offers."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import minitron
from minitron.recipe import Recipe, recipe_from
from tests.conftest import make_model


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(minitron.__all__) == dir(minitron)
    for name in minitron.__all__:
        value = getattr(minitron, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        _ = minitron.compres


def test_verbs_of_the_command_line_are_functions() -> None:
    from minitron.cli import app

    for command in app.registered_commands:
        assert command.callback is not None
        assert callable(getattr(minitron, command.callback.__name__))


def test_a_verb_is_known_without_torch() -> None:
    code = (
        "import sys, minitron; assert minitron.compress.__doc__; assert minitron.prune.__doc__; "
        "sys.exit(1 if {'torch', 'transformers', 'pydantic'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_functions_stay_functions_when_packages_are_imported() -> None:
    for package in ("pruning", "distillation", "nas", "evaluation", "reports", "verbs.prune", "verbs.search"):
        importlib.import_module(f"minitron.{package}")
    assert callable(minitron.prune)
    assert callable(minitron.search)
    assert callable(minitron.report)


def test_settings_are_the_keys_of_a_recipe() -> None:
    given = recipe_from(None, teacher=Path("t"), distill={"tokens": "2k"}, data={"a": 1, "b": 2}, **{"prune.ridge": 1})
    assert (given.teacher, given.distill.tokens, given.prune.ridge) == ("t", 2000, 1)
    assert given.data == {"a": 1, "b": 2}
    assert recipe_from(given, seed=3) == given.model_copy(update={"seed": 3})
    with pytest.raises(minitron.UserError, match=r"unknown key 'distil', did you mean 'distill'\?"):
        recipe_from(None, teacher="t", distil={"tokens": 1})
    with pytest.raises(minitron.UserError, match=r"unknown key 'distill.token', did you mean 'tokens'\?"):
        recipe_from(None, teacher="t", distill={"token": 1})
    assert isinstance(given, Recipe)


def test_results_print_and_turn_into_html(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama-tied")
    result = minitron.inspect(folder)
    assert f"{result.arch.num_parameters:,}" in str(result)
    assert f"<td>{result.arch.num_parameters:,}</td>" in result._repr_html_()
    planned = minitron.prune(folder, intermediate_size=48)
    assert planned.arch.sizes["intermediate_size"] == 48
    assert planned.to_dict()["share_of_teacher"] < 1


def test_progress_can_be_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    from minitron.progress import Progress

    minitron.disable_progress()
    try:
        with Progress("hidden", 1) as progress:
            progress.advance(1)
        assert not capsys.readouterr().err
    finally:
        minitron.enable_progress()
    with Progress("shown", 1) as progress:
        progress.advance(1)
    assert "shown: done" in capsys.readouterr().err
