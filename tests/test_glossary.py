"""The prose of the source and the documents keeps to docs/glossary.md: docstrings, comments, help texts, messages."""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "minitron"
GLOSSARY = ROOT / "docs" / "glossary.md"
PARTS = tuple(sorted(path.name for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()))
"""Packages and modules of src/minitron."""
DOCUMENTS = ("README.md", "CHANGELOG.md", "docs", "docs/how-to", "docs/tutorials", "docs/studies")
"""Documents and folders of documents that are checked as well."""
TEXT_CALLS = {"print", "warn", "warning", "info", "error", "Setting", "Progress", "note"}


class Rule(NamedTuple):
    """A row of the glossary's second table."""

    write: str
    patterns: tuple[re.Pattern[str], ...]
    example: str

    def matches(self, text: str) -> Iterator[re.Match[str]]:
        """Yield the places where a text breaks the rule."""
        for pattern in self.patterns:
            yield from pattern.finditer(text)


def read_rules() -> list[Rule]:
    table = GLOSSARY.read_text(encoding="utf-8").split("## Write, and avoid")[1]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines() if line.startswith("|")][2:]
    rules = []
    for write, avoid, example in rows:
        expressions = re.findall(r"`([^`]+)`", avoid.replace("\\|", "|"))
        patterns = tuple(re.compile(expression.replace(" ", r"\s")) for expression in expressions)
        rules.append(Rule(write.strip(), patterns, example.strip()))
    return rules


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every docstring, comment, help text and message of a module."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # docstrings, those of attributes too
            yield from _strings(node.value)
        elif isinstance(node, ast.Raise) and node.exc:
            yield from _strings(node.exc)
        elif isinstance(node, ast.keyword) and node.arg == "help":
            yield from _strings(node.value)
        elif isinstance(node, ast.Call) and _name(node.func) in TEXT_CALLS:
            for argument in node.args:
                yield from _strings(argument)
    yield from _comments(source)


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _strings(node: ast.expr) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.JoinedStr):
        yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in node.values)
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.lineno, node.value
    else:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr | ast.keyword):
                yield from _strings(child.value if isinstance(child, ast.keyword) else child)


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield comments, those on lines of their own joined while they follow one another."""
    first, lines = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if lines and token.start[0] != first + len(lines):
            yield first, "\n".join(lines)
            lines = []
        first = first if lines else token.start[0]
        lines.append(token.string.lstrip("# "))
    if lines:
        yield first, "\n".join(lines)


def paragraphs(document: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every paragraph of a Markdown document; blocks of code are skipped."""
    document = re.sub(r"```.*?```", lambda code: "\n" * code[0].count("\n"), document, flags=re.DOTALL)
    for paragraph in re.finditer(r"(?:^(?! {4}).+\n?)+", document, flags=re.MULTILINE):
        yield 1 + document[: paragraph.start()].count("\n"), paragraph[0]


def broken(passages: Iterable[tuple[int, str]], rules: list[Rule]) -> list[tuple[int, str, str]]:
    """Return line, wording and remedy of every place that breaks a rule; code in backticks is skipped."""
    places = set()
    for line, text in passages:
        prose = re.sub(r"\n +", "\n", re.sub(r"`[^`]*`", lambda code: re.sub(r"[^\n]", "0", code[0]), text))
        for rule in rules:
            for match in rule.matches(prose):
                wording = " ".join(match[0].split())
                places.add((line + prose[: match.start()].count("\n"), wording, rule.write))
    return sorted(places)


def modules(part: str = "") -> list[Path]:
    path = SOURCE / part
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


RULES = read_rules()


@pytest.mark.parametrize("part", PARTS)
def test_prose_keeps_to_the_glossary(part: str) -> None:
    places = [
        f"{path.relative_to(ROOT)}:{line}: '{wording}': write {write}"
        for path in modules(part)
        for line, wording, write in broken(texts(path.read_text(encoding="utf-8")), RULES)
    ]
    assert not places, "\n".join(["docs/glossary.md:", *places])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_keep_to_the_glossary(name: str) -> None:
    documents = [ROOT / name] if name.endswith(".md") else sorted(set((ROOT / name).glob("*.md")) - {GLOSSARY})
    assert documents
    places = [
        f"{path.relative_to(ROOT)}:{line}: '{wording}': write {write}"
        for path in documents
        for line, wording, write in broken(paragraphs(path.read_text(encoding="utf-8")), RULES)
    ]
    assert not places, "\n".join(["docs/glossary.md:", *places])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.write)
def test_every_rule_finds_its_example_and_no_remedy(rule: Rule) -> None:
    assert list(rule.matches(rule.example)), "the row's example has to break the rule"
    assert not [other.write for other in RULES for _ in other.matches(rule.write)]


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ('"""A model is mended."""', 1),
        ('x = 1\n"""First line.\n\nA model is mended."""', 4),
        ('class A:\n    x: int = 1\n    """It is mended."""', 3),
        ('raise UserError(f"{x} is mended")', 1),
        ('raise UserError(\n    "plain " + f"{x}: {y} is mended"\n)', 2),
        ('typer.Option("--x",\n    help="Is mended.")', 2),
        ('Setting("x", "x", "Is mended.")', 1),
        ("x = 1  # is mended", 1),
        ("# a model that\n# is\n# mended", 3),
        ('"""Candidates are shared\nout."""', 1),
        ('"""Calls `mended` once."""', None),
        ('mended = "mended"', None),
    ],
)  # fmt: skip
def test_the_check_can_fail(source: str, line: int | None) -> None:
    assert [place[0] for place in broken(texts(source), RULES)] == ([] if line is None else [line])


@pytest.mark.parametrize(
    ("document", "line"),
    [
        ("# Title\n\nA model\nis mended.", 4),
        ("- one\n- candidates are shared\n  out", 2),
        ("| a | is mended |", 1),
        ("Text.\n\n    minitron mended\n", None),
        ("```sh\nminitron mended\n```\n", None),
        ("```sh\nminitron\n```\n\nIs mended.", 5),
    ],
)
def test_the_check_of_documents_can_fail(document: str, line: int | None) -> None:
    assert [place[0] for place in broken(paragraphs(document), RULES)] == ([] if line is None else [line])


if __name__ == "__main__":
    for path in modules():
        for line, wording, write in broken(texts(path.read_text(encoding="utf-8")), RULES):
            sys.stdout.write(f"{path.relative_to(ROOT)}:{line}: '{wording}': write {write}\n")
