"""Writes the model card of a student: its origin, figures, shape, use and recipe."""

import json
import re
from pathlib import Path
from typing import Any

from minitron.errors import courtesy
from minitron.files import read_json, whole_file
from minitron.model.arch import Arch
from minitron.model.engines import ENGINES
from minitron.recipe import data_in_words
from minitron.reports.figures import Results, Rows, figures_table, speed_up_conditions
from minitron.run import teacher_of


def write_card(run: Path, record: dict[str, Any], teacher: Arch, student: Arch, results: Results) -> None:
    """Write `README.md` into the student's folder of a run, from what its `run.json` and `eval.json` hold."""
    recipe, folder = record["recipe"], run / "student"
    text = f"""---
{_metadata(record, results, teacher_of(run))}
---

# {_name(recipe)}, {student.num_parameters / 1e6:,.1f} M parameters

A {student.model_type} model of {student.num_parameters:,} parameters, \
{student.num_parameters / teacher.num_parameters:.1%} of its teacher `{recipe["teacher"]}`. The teacher was pruned by \
the importance of its activations, and the smaller model was trained by distillation from the teacher on \
{recipe["distill"]["tokens"]:,} tokens.

## Figures

{_markdown(figures_table(results))}

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

This is a stock Hugging Face checkpoint of {_model_class(folder)}. {_engines(folder)}

## Limits

The model inherits the errors of its teacher, and was compared with it on the text above alone. Its training was \
short: expect larger losses in knowledge and in rare languages than perplexity shows.

## Recipe

```json
{json.dumps({"recipe": recipe, "versions": record["versions"], "sources": record["sources"]}, indent=2)}
```
"""
    with whole_file(folder / "README.md") as staging:
        staging.write_text(text, encoding="utf-8")


def _name(recipe: dict[str, Any]) -> str:
    return str(recipe["teacher"]).rstrip("/").rsplit("/", 1)[-1]


def _metadata(record: dict[str, Any], results: Results, teacher: Path) -> str:
    """Return the YAML that the Hub reads: licence and language of the teacher, figures of `eval.json`."""
    from huggingface_hub import EvalResult, ModelCardData

    recipe, student = record["recipe"], results["student"]
    sources = [recipe["data"]] if isinstance(recipe["data"], str) else list(recipe["data"])
    dataset = {
        "dataset_name": data_in_words(recipe["data"]),
        "dataset_type": sources[0].partition(":")[0],
        "dataset_split": "held out",
        "dataset_args": {"context": student["context"], "num_tokens": student["num_tokens"], "seed": recipe["seed"]},
    }
    card = ModelCardData(
        **_inherited(teacher / "README.md"),
        base_model=recipe["teacher"] if _is_hub_id(recipe["teacher"]) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["minitron", "pruned", "distilled"],
        datasets=[source for source in sources if _is_hub_id(source)] or None,
        model_name=_name(recipe),
        eval_results=[
            EvalResult("text-generation", metric_type=metric, metric_value=round(student[metric], 4), **dataset)
            for metric in ("perplexity", "bits_per_byte")
        ],
    )
    return str(card.to_yaml(line_break="\n")).strip()


def _inherited(readme: Path) -> dict[str, Any]:
    """Return licence and language of a teacher's card, as far as they can be read."""
    from huggingface_hub.repocard import metadata_load

    metadata: Any = None
    if readme.is_file():
        with courtesy(f"{readme}: the licence and language of the model card"):
            metadata = metadata_load(readme)
    keys = ("language", "license", "license_link", "license_name")
    values = {key: metadata[key] for key in keys if key in metadata} if isinstance(metadata, dict) else {}
    return {key: value for key, value in values.items() if isinstance(value, (str, list))}


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) is not None and not Path(name).exists()


def _conditions(record: dict[str, Any], results: Results) -> str:
    recipe, versions, student = record["recipe"], record["versions"], results["student"]
    return (
        f"Measured on {student['num_tokens']:,} tokens of `{data_in_words(recipe['data'])}` that no other stage has "
        f"seen, in blocks of {student['context']} tokens, seed {recipe['seed']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}. {speed_up_conditions(student)}"
    ).rstrip()


def _shapes(teacher: Arch, student: Arch) -> str:
    rows = [["", "teacher", "student"]]
    rows += [[f"`{name}`", f"{teacher.sizes[name]:,}", f"{size:,}"] for name, size in student.sizes.items()]
    return _markdown(rows)


def _markdown(rows: Rows) -> str:
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])


def _engines(folder: Path) -> str:
    """Return which engines run the student and how, and which do not and why, as far as their sources were read."""
    config = read_json(folder / "config.json")
    running = [engine for engine in ENGINES if engine.runs(config)]
    parts = []
    if running:
        read = " and ".join(engine.title for engine in running)
        commands = "\n".join(engine.commands for engine in running)
        parts.append(f"By the sources of {read}, it also runs there:\n\n```sh\n{commands}\n```")
    for engine in ENGINES:
        if reasons := engine.obstacles(config):
            parts.append(f"{engine.title} does not run it as transformers does: {'; '.join(reasons.values())}.")
    return "\n\n".join(parts)


def _model_class(folder: Path) -> str:
    return str(read_json(folder / "config.json")["architectures"][0])
