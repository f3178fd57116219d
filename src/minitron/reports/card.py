"""The student's model card: what it was made of, how, how good it is, how to use it."""

import json
import re
from pathlib import Path
from typing import Any

from minitron.files import whole_file
from minitron.model.arch import Arch
from minitron.recipe import data_in_words
from minitron.reports.figures import Results, figures_table


def write_card(run: Path, record: dict[str, Any], teacher: Arch, student: Arch, results: Results) -> None:
    """Write `README.md` into the student's folder of a run, from the run's record and its figures."""
    recipe, folder = record["recipe"], run / "student"
    text = f"""---
{_metadata(record, results, run / "teacher")}
---

# {_name(recipe)}, {student.num_parameters / 1e6:,.1f} M parameters

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

```sh
vllm serve PATH                                                   # vLLM
python convert_hf_to_gguf.py PATH --outfile student.gguf          # llama.cpp: convert, then
llama-cli -m student.gguf
trtllm-serve PATH                                                 # TensorRT-LLM
```

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


def _name(recipe: dict[str, Any]) -> str:
    return str(recipe["teacher"]).rstrip("/").rsplit("/", 1)[-1]


def _metadata(record: dict[str, Any], results: Results, teacher: Path) -> str:
    """What the Hub reads, as YAML: the licence is the teacher's, the figures are those of `eval.json`."""
    from huggingface_hub import EvalResult, ModelCardData
    from huggingface_hub.repocard import metadata_load

    recipe, student = record["recipe"], results["student"]
    readme = teacher / "README.md"
    of_teacher: dict[str, Any] = (metadata_load(readme) if readme.is_file() else None) or {}
    inherited = {
        key: of_teacher[key] for key in ("license", "license_name", "license_link", "language") if key in of_teacher
    }
    sources = [recipe["data"]] if isinstance(recipe["data"], str) else list(recipe["data"])
    evaluated = {
        "task_type": "text-generation", "dataset_name": data_in_words(recipe["data"]),
        "dataset_type": sources[0].partition(":")[0], "dataset_split": "held out",
        "dataset_args": {"context": student["context"], "num_tokens": student["num_tokens"], "seed": recipe["seed"]},
    }  # fmt: skip
    card = ModelCardData(
        **inherited,
        base_model=recipe["teacher"] if _is_hub_id(recipe["teacher"]) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["minitron", "pruned", "distilled"],
        datasets=[source for source in sources if _is_hub_id(source)] or None,
        model_name=_name(recipe),
        eval_results=[
            EvalResult(**evaluated, metric_type=metric, metric_value=round(student[metric], 4))
            for metric in ("perplexity", "bits_per_byte")
        ],
    )
    return str(card.to_yaml(line_break="\n")).strip()


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) is not None and not Path(name).exists()


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


def _model_class(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])
