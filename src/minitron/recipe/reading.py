"""Reads YAML, command-line options or keyword arguments into a validated recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from minitron.errors import UserError, nearest
from minitron.recipe.parts import Part
from minitron.recipe.run import Recipe

Model = TypeVar("Model", bound=BaseModel)
RecipeSource = str | Path | Recipe | Sequence[str | Path] | None
"""A YAML file, the name of a built-in recipe, several of them, each laid over those before, a recipe, or None: the
defaults."""


def load_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """Read a recipe from a YAML file and override its values; the key `a.b.c` names an entry of part b of part a.

    `path` may also be the name of a built-in recipe, such as `minitron-8b`.

    Raises:
        UserError: the file is missing or does not hold a mapping, or a key or a value is not accepted.
    """
    return _overlaid(_read_yaml(_resolve(path)) if path else {}, overrides, str(path) if path else "options")


def recipe_from(source: RecipeSource = None, **settings: Any) -> Recipe:
    """Return the recipe of a YAML file, of a built-in name or of another recipe, with settings laid over it.

    A setting is a key (`seed=1`), a part with its keys (`distill={"tokens": "2M"}`), or a dotted key; None is a
    value as in YAML, where it is `null`.

    Raises:
        UserError: a file is missing, or a key or a value is not accepted.
    """
    values: dict[str, Any] = {}
    if isinstance(source, Recipe):
        values, where = source.model_dump(), "recipe"
    else:
        files = [source] if isinstance(source, str | Path) else list(source or ())
        where = " and ".join(map(str, files)) or "options"
        for file in files:
            values = laid_over(values, _read_yaml(_resolve(Path(file))))
    dotted = {key: value for key, value in settings.items() if "." in key}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items() if "." not in key}
    return _overlaid(laid_over(values, plain), dotted, where)


def laid_over(values: Mapping[str, Any], changes: Mapping[str, Any], model: type[BaseModel] | None = None) -> Any:
    """Return the values of a recipe with changes laid over them: parts key by key, everything else as a whole."""
    fields, merged = (model or Recipe).model_fields, dict(values)
    for key, change in changes.items():
        part = fields[key].annotation if key in fields else None
        if isinstance(part, type) and issubclass(part, Part) and isinstance(change, Mapping):
            before = merged.get(key)
            change = laid_over(before if isinstance(before, Mapping) else {}, change, part)
        merged[key] = change
    return merged


def _overlaid(values: dict[str, Any], overrides: dict[str, Any], where: str) -> Recipe:
    for key, value in overrides.items():
        *parts, name = key.split(".")
        target = values
        for part in parts:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise UserError(f"{where}: {part} must be a mapping of keys to values")
        target[name] = value
    return validate(Recipe, values, where)


def validate(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """Build a recipe, or a part of one, from plain values.

    Raises:
        UserError: a value is not accepted; the message is the first complaint in one line, prefixed with `where`.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_complaint(model, error)}") from error


def _first_complaint(model: type[BaseModel], error: ValidationError) -> str:
    complaint = error.errors()[0]
    location = ".".join(str(part) for part in complaint["loc"])
    if complaint["type"] == "extra_forbidden":
        owner = model
        for part in complaint["loc"][:-1]:
            annotation = owner.model_fields[str(part)].annotation
            assert isinstance(annotation, type)
            owner = annotation
        return f"unknown key '{location}', {nearest(str(complaint['loc'][-1]), list(owner.model_fields))}"
    if complaint["type"] == "missing":
        return f"{location} is not given"
    message = complaint["msg"].removeprefix("Value error, ")
    return f"{location}: {message}" if location else message


def built_in_recipes() -> dict[str, Path]:
    """Return the files of the built-in recipes by name, such as `minitron-8b` or `released/minitron-8b`."""
    root = Path(__file__).parents[1] / "recipes"
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in sorted(root.rglob("*.yaml"))}


def _resolve(path: Path) -> Path:
    """Return the file of a built-in recipe by its name, or the path of any other file unchanged."""
    built_in, name = built_in_recipes(), path.as_posix()
    if path.is_file() or path.suffix in {".yaml", ".yml", ".json"}:
        return path
    if name not in built_in:
        raise UserError(f"recipe '{path}' is neither a file nor built in; {nearest(name, list(built_in))}")
    return built_in[name]


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise UserError(f"recipe {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a mapping of keys to values")
    return values
