"""Writes the pages of the reference from the source while mkdocs builds the site: verbs, recipe keys, engines, …

mkdocs calls `on_files` and `on_post_page` (hooks of mkdocs.yml). Nothing that is written here is a file of the
repository.
"""

import ast
import inspect
import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import minitron
from minitron import recipe
from minitron.cli import app
from minitron.model.anatomy import AXES
from minitron.model.engines import BY_NAME, Engine
from minitron.model.families import FAMILIES, family_of
from minitron.model.families.table_files import COMMITTED, committed_types
from minitron.recipe import cutting, run, training

VERBS = {
    "Verbs that make models": (
        "compress",
        "calibrate",
        "search",
        "prune",
        "distill",
        "correct",
        "tune",
        "prefer",
        "generate",
        "merge",
    ),
    "Verbs that look at models": ("inspect", "families", "evaluate", "bench", "chat", "report", "push"),
}
"""The known verbs in the order of a job; a verb that is named nowhere here stands under `Further verbs`."""

Schema = dict[str, Any]
"""A JSON schema as pydantic writes it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those that mkdocs found in docs/."""
    for name, text in (
        ("cli", verbs_page()),
        ("recipe", recipe_page()),
        ("python", api_page()),
        ("families", families_page()),
        ("engines", engines_page()),
    ):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warn of what a page would load from another host; a strict build then fails."""
    for loaded in re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="((?:https?:)?//[^"]*)', output):
        logging.getLogger("mkdocs.generate").warning("%s loads %s", page.file.src_uri, loaded)
    return output


def verbs_page() -> str:
    """Return a page of all verbs with their arguments and options, as the command line declares them."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    further = tuple(name for name in commands if not any(name in verbs for verbs in VERBS.values()))
    lines = [
        "# Command line",
        "Every verb is called as `minitron VERB …`. `minitron VERB --help` prints what this page lists. Most options "
        "set a key of the [recipe](recipe.md); `--set KEY=VALUE` sets any other one.",
    ]
    for title, names in (VERBS | ({"Further verbs": further} if further else {})).items():
        lines.append(f"## {title}")
        for name in names:
            lines += _verb(name, commands[name])
    return "\n\n".join(lines) + "\n"


def _verb(name: str, command: Any) -> list[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    pieces = [piece for param in arguments for piece in param.get_usage_pieces(context)]
    usage = " ".join(["minitron", name, *pieces, "[OPTIONS]"])
    parts = [f"### {name}", f"```text\n{usage}\n```", linked(command.help or "")]
    for title, params in (("Argument", arguments), ("Option", options)):
        records = [param.get_help_record(context) for param in params]
        rows = [(f"`{named}`", linked(words)) for named, words in filter(None, records)]
        parts += [_table((title, ""), rows)] if rows else []
    return parts


def recipe_page() -> str:
    """Return a page of all recipe keys with accepted values, defaults and the docstrings of their attributes."""
    documents, schema = attribute_docstrings(), recipe.Recipe.model_json_schema()
    lines = [
        "# Recipe",
        "A recipe is a YAML file, or the keyword arguments of a function of the Python API. `--recipe FILE` reads it, "
        "and `--set KEY=VALUE` sets one key, with dots between a part and its key: `--set distill.loss=jsd`. Counts "
        "accept the suffixes k, M, B and T (`40k`, `2M`, `4.2B`). Where a description says None, YAML has `null`.",
    ]
    for path, name in parts_of(schema, "Recipe"):
        title = f"## `{path}` {{ #{path} }}" if path else "## A whole run { #recipe }"
        rows = []
        for key, field in _class(schema, name)["properties"].items():
            part = f"{path}.{key}".lstrip(".")
            shown = f"[`{key}`](#{part})" if _part(field) else f"`{key}`"
            default = "" if "$ref" in field else f"`{_default(field)}`" if "default" in field else "must be given"
            described = linked(documents[name].get(key, ""))
            rows.append((shown, _escaped(accepted(field, schema["$defs"])), default, described))
        lines += [title, linked(inspect.getdoc(getattr(recipe, name)) or "")]
        lines.append(_table(("Key", "Accepted", "Default", ""), rows))
    return "\n\n".join(lines) + "\n"


def parts_of(schema: Schema, name: str, path: str = "", above: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield the dotted path and the class of a recipe and of all parts within it, each before its own parts."""
    yield path, name
    for key, field in _class(schema, name)["properties"].items():
        part = _part(field)
        if part and part not in {name, *above}:
            yield from parts_of(schema, part, f"{path}.{key}".lstrip("."), (*above, name))


def attribute_docstrings() -> dict[str, dict[str, str]]:
    """Return for every class of the recipe its attributes with their docstrings."""
    found: dict[str, dict[str, str]] = {}
    modules = map(inspect.getsource, (cutting, training, run))
    for node in (node for module in modules for node in ast.parse(module).body):
        if isinstance(node, ast.ClassDef):
            pairs = zip(node.body, node.body[1:], strict=False)
            found[node.name] = {
                field.target.id: inspect.cleandoc(text.value.value)
                for field, text in pairs
                if isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            }
    return found


def accepted(field: Schema, classes: Schema) -> str:
    """Describe in words which values a JSON schema accepts."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[1]
        keys = ", ".join(f"`{key}`" for key in classes[name]["properties"])
        return "keys of its own" if len(keys) > 60 else f"a mapping with {keys}"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(accepted(choice, classes) for choice in field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    kind = field.get("type")
    if "const" in field:
        return f"`{field['const']}`"
    if kind == "array":
        items = [accepted(item, classes) for item in field.get("prefixItems", [field.get("items", {})])]
        return f"a list of {items[0]}" if len(set(items)) == 1 else f"a list: {', '.join(items)}"
    if kind == "object":
        values = field.get("additionalProperties", True)
        return "a mapping" if isinstance(values, bool) else f"a mapping to {accepted(values, classes)}"
    signs = (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
    bounds = [f"{sign} {_number(field[name])}" for name, sign in signs if name in field]
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": "`null`"}
    return " ".join([names.get(str(kind), "any value"), ", ".join(bounds)]).strip()


def api_page() -> str:
    """Return a page of the public names of `minitron`, for mkdocstrings to fill in."""
    homes = {name: getattr(minitron, name).__module__ for name in minitron.__all__ if not name.startswith("__")}
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    verbs = [name for name in commands if name in homes]
    classes = [name for name in homes if inspect.isclass(getattr(minitron, name))]
    others = [name for name in homes if name not in {*verbs, *classes}]
    lines = [
        "# Python",
        "Every verb is a function of `minitron` with an equal name and meaning. Keyword arguments are keys of the "
        '[recipe](recipe.md): `seed=1`, or a part with its keys, `distill={"tokens": "2M"}`. What is wrong with an '
        "input is raised as `minitron.UserError`. Importing `minitron` does not import torch.",
    ]
    for title, names in (("Verbs", verbs), ("Further functions", others), ("Classes", classes)):
        lines.append(f"## {title}")
        lines += [f"::: {homes[name]}.{name}\n    options: {{heading: minitron.{name}}}" for name in names]
    return "\n\n".join(lines) + "\n"


def engines_page() -> str:
    """Return a page of what engines run and what they ask of a folder, each fact with its source."""
    lines = [
        "# Engines",
        "What was read in the sources of engines that run or train model folders; nothing was run. "
        "[Engines](../how-to/engines.md) explains how a folder is checked and how a search uses this. GPUs are those "
        "over which every tensor is split. An `@` stands before the commit at which a file was read.",
    ]
    for name, engine in BY_NAME.items():
        lines += [f"## {engine.name} {{ #{name} }}", *_engine(engine)]
    return "\n\n".join(lines) + "\n"


def _engine(engine: Engine) -> list[str]:
    def quoted(families: frozenset[str]) -> str:
        return "all" if families == engine.families else ", ".join(f"`{family}`" for family in sorted(families))

    sizes = [
        (", ".join(f"`{AXES[axis]}`" for axis in limit.axes), limit.rule, quoted(limit.families), f"`{limit.source}`")
        for limit in engine.size_limits
    ]
    networks = [(quoted(limit.families), f"`{limit.source}`") for limit in engine.limits]
    absent = [(f"`{family}`", reason) for family, reason in sorted(engine.unsupported.items())]
    notes = [(quoted(note.families), f"`{note.source}`") for note in engine.notes]
    tables = (
        ("Sizes that pass:", ("Size", "Passes", "Families", "Read in"), sizes),
        ("Networks that it computes otherwise, or refuses:", ("Families", "Read in"), networks),
        ("What it does by itself, or has announced:", ("Families", "Read in"), notes),
        ("Families that it does not run:", ("Family", "Reason"), absent),
    )
    lines = [
        f"Version {engine.version} of [{engine.repository.removeprefix('https://')}]({engine.repository}).",
        f"Families: {', '.join(f'`{family}`' for family in sorted(engine.families))}.",
    ]
    for title, head, rows in tables:
        lines += [title, _table(head, rows)] if rows else []
    return lines


def families_page() -> str:
    """Return a page of all families with the sizes that can be cut, as their tables state."""
    rows = []
    for name, family in sorted((FAMILIES | {name: family_of(name) for name in committed_types()}).items()):
        axes = dict.fromkeys(axis for tap in family.taps for axis in tap.axes)
        names = [f"`{AXES[axis]}`" for axis in axes]
        kinds = sorted({tap.kind for tap in family.taps if tap.kind})
        origin = "written" if name in FAMILIES else "derived"
        rows.append((f"`{name}`", origin, ", ".join(names), ", ".join(kinds)))
    obstacles = json.loads((COMMITTED / "obstacles.json").read_text(encoding="utf-8"))
    lines = [
        "# Families",
        "A family is the models of one `model_type` in `config.json`. Layers are dropped in every family. Which widths "
        "can be cut follows from the family's table; some are tied to each other by the config class, which `minitron "
        "prune --dry-run` reports. Sizes have the names that recipes, options and `arch.json` use, whatever a family's "
        "config calls them. `--family` reads a model of another `model_type` as one of these.",
        _table(("`model_type`", "Table", "Widths and counts that can be cut", "Kinds of layers"), rows),
        "Derived tables were proven on tiny random models ([how](../how-to/families.md)).",
        "## Without a table",
        "The other causal models of transformers, and what stands in the way of a table:",
        _table(("`model_type`", "Obstacle"), [(f"`{name}`", reason) for name, reason in obstacles.items()]),
    ]
    return "\n\n".join(lines) + "\n"


def _class(schema: Schema, name: str) -> Schema:
    """Return the schema of a class; pydantic keeps that of the recipe itself apart, unless a part refers to it."""
    described: Schema = schema["$defs"].get(name, schema)
    return described


def _part(field: Schema) -> str | None:
    """Return the class of a field that is a part of the recipe with keys of its own, or a list of such parts."""
    reference = field.get("$ref") or field.get("items", {}).get("$ref")
    return str(reference).rsplit("/", 1)[1] if reference else None


def _default(field: Schema) -> str:
    value = field["default"]
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;")


def linked(text: str) -> str:
    """Return a text in one line, in which the documents that it names are links."""
    return re.sub(r"\bdocs/([\w/-]+\.md)", r"[\1](../\1)", _escaped(text))
