"""Where a model folder comes from: its ancestor on the hub, that model's licence and citation, and the steps since.

`minitron.json` in a model folder holds all of it. A stage that writes a model folder adds what it did to the steps of
the folder that it started from, so that a model card states what was really done, whichever commands did it.
"""

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from minitron.errors import courtesy
from minitron.files import read_json, write_json

HISTORY = "minitron.json"
INHERITED = ("language", "license", "license_link", "license_name")
"""Entries of a model card that hold for the models that descend from it, too."""
HUB_ID = r"[\w.-]+/[\w.-]+"

Step = dict[str, Any]
"""What was done: `step` names it (dequantise, prune, distill, tune, …), the other entries state how."""


@dataclass(frozen=True)
class History:
    """How a model folder was made."""

    base_model: str | list[str] | None = None
    """The nearest ancestor that the hub has, or the model itself if the hub has it; None: not known."""
    card: dict[str, Any] = field(default_factory=dict)
    """Language and licence, as a model card of the hub states them."""
    citation: str = ""
    """The BibTeX entries of the ancestor's card."""
    steps: tuple[Step, ...] = ()
    """What was done since, the first step first."""

    def then(self, step: Step) -> "History":
        """Return the history of a model that is made of this one by a step."""
        return replace(self, steps=(*self.steps, step))

    def write(self, folder: Path) -> None:
        """Write `minitron.json` into a model folder."""
        write_json(folder / HISTORY, asdict(self))


def record_step(folder: Path, made_from: Path, step: Step) -> None:
    """Write the history of a model folder: that of the folder that it was made from, and the step that made it."""
    history_of(made_from).then(step).write(folder)


def history_of(folder: Path) -> History:
    """Return the history of a model folder: from its `minitron.json`, or else from its model card.

    A folder in the cache of the hub's client is the model of the hub that its path names. What cannot be read is
    missing in the result, with a warning.
    """
    folder, history = folder.resolve(), History()
    if (folder / HISTORY).is_file():
        with courtesy(f"{folder / HISTORY}: the history of the model"):
            values = read_json(folder / HISTORY)
            history = History(**{**values, "steps": tuple(values["steps"])})
    elif (folder / "README.md").is_file():
        with courtesy(f"{folder / 'README.md'}: the licence and language of the model card"):
            history = history_of_card(folder / "README.md")
    return replace(history, base_model=hub_id_of(folder) or history.base_model)


def hub_id_of(folder: Path) -> str | None:
    """Return the hub id of a folder in the cache of the hub's client, `models--owner--name/snapshots/…`."""
    repository = folder.parent.parent.name.split("--")
    if folder.parent.name != "snapshots" or repository[0] != "models":
        return None
    return "/".join(repository[1:])


def bibtex_entries(text: str) -> list[str]:
    """Return the BibTeX entries in a text, each from its `@` to the brace that closes it."""
    entries = []
    for start in re.finditer(r"@[A-Za-z]+\{[^\s{},]+,", text):
        depth = 0
        for end in range(start.start(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0 and text[end] == "}":
                entries.append(text[start.start() : end + 1])
                break
    return list(dict.fromkeys(entries))


def history_of_card(readme: Path) -> History:
    """Return what a model card states: the nearest ancestor on the hub, licence, language and citation."""
    from huggingface_hub.repocard import metadata_load

    metadata: Any = metadata_load(readme)
    values = metadata if isinstance(metadata, dict) else {}
    known = {key: value for key, value in values.items() if _is_text(value)}
    return History(
        base_model=known.get("base_model"),
        card={key: known[key] for key in INHERITED if key in known},
        citation="\n\n".join(bibtex_entries(readme.read_text(encoding="utf-8", errors="replace"))),
    )


def _is_text(value: Any) -> bool:
    # YAML reads the language code "no" as false.
    return bool(value) and all(isinstance(part, str) for part in (value if isinstance(value, list) else [value]))
