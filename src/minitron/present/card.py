"""The student's model card: what it was made of, how, how good it is, how to use it."""

import json
from pathlib import Path
from typing import Any

import yaml

from minitron.files import whole_file
from minitron.model.arch import Arch
from minitron.recipe import data_in_words

LABELS = {
    "num_parameters": "parameters",
    "num_non_embedding_parameters": "of these not in embeddings",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "tokens_per_second": "tokens/s, forward pass",
}


def write_card(
    folder: Path, record: dict[str, Any], teacher: Arch, student: Arch, results: dict[str, dict[str, Any]]
) -> None:
    """Write `README.md` into the student's folder from the run's record and its figures."""
    recipe = record["recipe"]
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minitron", "pruned", "distilled"],
    }
    hub_like = recipe["teacher"].count("/") == 1 and not Path(recipe["teacher"]).exists()
    if hub_like:
        metadata["base_model"] = recipe["teacher"]
    text = f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {recipe["teacher"].rstrip("/").rsplit("/", 1)[-1]}, {student.num_parameters / 1e6:,.1f} M parameters

A {student.model_type} model of {student.num_parameters:,} parameters, \
{student.num_parameters / teacher.num_parameters:.1%} of its teacher `{recipe["teacher"]}`. The teacher was pruned by \
activation importance and the rest retrained by distillation (forward KL to the teacher's next-token distribution) \
on {recipe["distill"]["tokens"]:,} tokens.

## Figures

{_figures(results)}

{_conditions(record, results)}

## Shape

{_shapes(teacher, student)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

It is a stock checkpoint: any engine that runs {_model_class(folder)} runs it.

## Limits

It inherits what its teacher gets wrong, and was compared with it on the text above alone. Retraining was short: \
expect more loss in knowledge and in rare languages than perplexity shows.

## Recipe

```json
{json.dumps({"recipe": recipe, "versions": record["versions"], "sources": record["sources"]}, indent=2)}
```
"""
    with whole_file(folder / "README.md") as staging:
        staging.write_text(text, encoding="utf-8")


def figures_table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of `measure, teacher, pruned, student`, the head first, as text."""
    names = list(results)
    rows = [["", *names]]
    for key, label in LABELS.items():
        rows.append([label, *(_format(results[name][key]) for name in names)])
    return rows


def _figures(results: dict[str, dict[str, Any]]) -> str:
    return _markdown(figures_table(results))


def _conditions(record: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    recipe, versions, student = record["recipe"], record["versions"], results["student"]
    return (
        f"Measured on {student['num_tokens']:,} tokens of `{data_in_words(recipe['data'])}` that no other stage has "
        f"seen, in blocks of {student['context']} tokens, seed {recipe['seed']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}. Speeds are of this measurement, on the machine that made the model."
    )


def _shapes(teacher: Arch, student: Arch) -> str:
    rows = [["", "teacher", "student"]]
    rows += [[f"`{name}`", f"{teacher.sizes[name]:,}", f"{size:,}"] for name, size in student.sizes.items()]
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def _format(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _model_class(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])
