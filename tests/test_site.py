"""The pages of the site: their commands run or are accepted, their pictures and the reference follow the source."""

import inspect
import io
import re
import runpy
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from minitron import cli, recipe
from minitron.data import corpus
from minitron.errors import UserError
from minitron.model import source
from minitron.stages import stages_of
from minitron.verbs.inspect import split_sizes
from tests.conftest import byte_tokenizer, make_model
from tests.test_chat import TEMPLATE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md") if path.parent.name != "studies")
FEWER = {
    "context": 32, "calibration.tokens": 256, "search.tokens": 64, "search.probe_tokens": 0, "search.zero_shot": 2,
    "search.zero_shot_tokens": 64, "search.shortlist": 1, "search.distill_tokens": 0, "search.tolerance": 0.2,
    "distill.tokens": 128, "distill.batch_size": 2, "evaluation.tokens": 64, "device": "cpu",
}  # fmt: skip
"""What is small where a command of a page runs; shapes and tokens of pages are for SmolLM2."""
SMALLER = {"448": "32", "1152": "48", "512": "32", "256": "16", "8k": "256", "16k": "256"}
"""Sizes and lengths on pages, and those of the tiny model in their place."""
ELSEWHERE = {
    "--vocab-size": "test_narrowing.py",
    "--trim-vocab": "test_narrowing.py",
    "--throughput": "test_search_run.py",
    "bench": "test_compress.py",
    "families": "test_derivation.py",
    "examples/custom_score.py": "test_custom_score.py",
    "examples/custom_loss.py": "test_examples.py",
}
"""Words of commands that are accepted here and run by another file of tests."""
OTHERS = {"pip", "hf", "python", "llama-server", "vllm", "trtllm-serve", "trtllm-eval", "trtllm-bench", "make", "git",
          "benchmarks/on_gpu.sh"}  # fmt: skip
"""Programs of other people, and scripts; only blocks that name what they need may call them, apart from examples."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of every command of a shell block."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r'^ *```(\w+)(?: title="([^"]*)")?[^\n]*\n(.*?)^ *```$', text, flags=re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in found]


RUN = [
    page
    for page in PAGES
    if page not in {"docs/papers.md", "docs/architecture.md", "docs/new-family.md"}
    and any(block.language in {"sh", "python"} for block in blocks(page))
]
"""Pages whose unmarked commands run here one after the other, in a folder per page."""


def arguments(words: list[str]) -> list[str] | None:
    """Return what a command hands to Minitron, or None where it calls another program."""
    if words[0] == "minitron":
        return words[1:]
    if words[0] == "torchrun":
        return words[words.index("minitron") + 1 :]
    return None


class Recorder:
    """A module of a verb whose functions check their arguments, and do nothing else."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, function: str) -> Callable[..., None]:
        real = getattr(import_module(f"minitron.{self.name}"), function)

        def check(*given: Any, **keywords: Any) -> None:
            bound = inspect.signature(real).bind(*given, **keywords).arguments
            settings = split_sizes(bound.get("settings", {}))[1]
            recipe.recipe_from(bound.get("recipe"), teacher="teacher", **settings)

        return check


@pytest.fixture
def accept(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Return a function that hands a command to the command line without running its verb."""

    def call(given: list[str]) -> None:
        with monkeypatch.context() as patch:
            for module in (cli.making, cli.measuring):
                patch.setattr(module, "imported", Recorder)
            for name, function in (
                ("inspect", "inspect"),
                ("inspect", "dry_run"),
                ("plan", "plan"),
                ("report", "report"),
            ):
                module = import_module(f"minitron.verbs.{name}")
                patch.setattr(module, function, lambda *given, **keywords: None)
            cli.app(given, standalone_mode=False)

    return call


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_command_is_accepted(
    page: str, accept: Callable[[list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for block in blocks(page):
        if block.language == "yaml" and block.title:
            stages_of(recipe.recipe_from(None, teacher="teacher", **yaml.safe_load(block.text)))
            (tmp_path / block.title).write_text(block.text)
        for words in block.commands if block.language == "sh" else []:
            given = arguments(words)
            if given is not None:
                accept(given)
            else:
                assert words[0] in OTHERS, words
                is_example = words[0] == "python" and words[1].startswith("examples/")
                assert page == "README.md" or is_example or block.title.startswith("needs"), words
                assert not is_example or (ROOT / words[1]).is_file(), words


@pytest.mark.parametrize("command", [
    "inspekt smollm2", "compress smollm2", "compress smollm2 out --target-parameters 0.7", "bench m --batch one",
    "compress smollm2 out --set distill.temprature=2", "distill t s out --tokens many", "prune t out --hidden-size x",
])  # fmt: skip
def test_the_check_can_fail(command: str, accept: Callable[[list[str]], None]) -> None:
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    with pytest.raises((UserError, usage_error)):
        accept(command.split())


def test_what_is_run_elsewhere_is_run() -> None:
    for word, name in ELSEWHERE.items():
        assert word.removeprefix("--").rpartition("/")[2] in (ROOT / "tests" / name).read_text(), word


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets folders stand for the built-in teacher and text, and makes every recipe small."""
    for module in (source, corpus):
        monkeypatch.setattr(module, "BUILT_IN", {})
    real = recipe.recipe_from

    def smaller(given: recipe.RecipeSource = None, **settings: Any) -> recipe.Recipe:
        made = real(given, **settings | FEWER)
        return made.model_copy(update={"stages": tuple(map(smaller_stage, made.stages))})

    monkeypatch.setattr(recipe, "recipe_from", smaller)


def smaller_stage(stage: dict[str, Any]) -> dict[str, Any]:
    """Return a stage of a page's recipe with few tokens, and sizes of the tiny model."""
    shape = {name: int(SMALLER.get(str(size), size)) for name, size in stage.get("shape", {}).items()}
    changes: dict[str, Any] = {"distill": {"tokens": 128}, "context": 64 if "context" in stage else 32}
    return {**stage, **changes, **({"shape": shape} if shape else {})}


def set_up(folder: Path) -> None:
    """Make the built-in teacher and text of pages in a folder, in tiny."""
    divided = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}  # by groups of 32 entries
    make_model(folder / "smollm2", "llama-tied", num_hidden_layers=3, **divided)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "smollm2")
    (folder / "wiki").mkdir()
    text = "\n".join(f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}." for i in range(300))
    (folder / "wiki" / "text.txt").write_text(text)
    many = "".join(f'{{"text": "{line}"}}\n' for line in text.splitlines())
    (folder / "my-text.jsonl").write_text(many)


def run(words: list[str]) -> None:
    """Run a command on the tiny model, unless another file of tests runs it."""
    given = arguments([SMALLER.get(word, word) for word in words])
    if given is not None and not set(ELSEWHERE) & set(words):
        cli.app(given, standalone_mode=False)


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", RUN)
def test_every_unmarked_command_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    set_up(tmp_path)
    names: dict[str, Any] = {}
    unmarked = [block for block in blocks(page) if not block.title.startswith("needs")]
    text = "".join(block.text for block in unmarked)
    if "runs/first" in text and "compress smollm2 runs/first" not in text:
        run(["minitron", "compress", "smollm2", "runs/first", "--target-params", "0.7"])
    for block in unmarked:
        if block.title:
            (tmp_path / block.title).write_text(block.text * (60 if block.language == "json" else 1))
        elif block.language == "python":
            exec(block.text, names)
        elif block.language == "sh":
            for words in block.commands:
                monkeypatch.setattr("sys.stdin", io.StringIO("one and one\n"))
                run(words)


def test_every_verb_and_option_is_in_the_reference() -> None:
    pytest.importorskip("mkdocs")
    generate = import_module("docs.generate")
    page = generate.verbs_page()
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        section = page.split(f"### {name}\n")[1].split("\n### ")[0]
        for parameter in command.params:
            assert re.search(rf"\| `{parameter.opts[0]}\b", section), (name, parameter.opts)


def test_every_key_with_its_default_and_docstring_is_in_the_reference() -> None:
    pytest.importorskip("mkdocs")
    generate = import_module("docs.generate")
    page, documents = generate.recipe_page(), generate.attribute_docstrings()
    assert "| `label_weight` | number ≥ 0 | `0.0` | Weight of the cross-entropy" in page
    for path, name in generate.parts_of(recipe.Recipe.model_json_schema(), "Recipe"):
        section = page.split(f"{{ #{path or 'recipe'} }}\n")[1].split("\n## ")[0]
        for key in getattr(recipe, name).model_fields:
            assert f"`{key}`" in section, (path, key)
            first = documents[name].get(key, "").split("\n")[0]
            assert generate.linked(first) in section, (path, key)


def test_every_public_name_is_in_the_reference() -> None:
    pytest.importorskip("mkdocs")
    minitron = import_module("minitron")
    page = import_module("docs.generate").api_page()
    for name in set(minitron.__all__) - {"__version__"}:
        assert f"heading: minitron.{name}}}" in page


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f"- {page.relative_to(DOCS)}\n" in text or f": {page.relative_to(DOCS)}\n" in text, page


def test_pictures_are_as_drawn() -> None:
    drawn = SimpleNamespace(**runpy.run_path(str(DOCS / "pictures.py"))).PICTURES
    for draw in drawn:
        assert (DOCS / "pictures" / f"{draw.__name__}.svg").read_text() == draw().svg() + "\n", draw.__name__
