"""Writes the model card of a model folder, from its history and, if a run made it, from the run's figures."""

import json
import re
from pathlib import Path
from typing import Any

from minitron.files import read_json, whole_file
from minitron.history import HUB_ID, History, Step, bibtex_entries, history_of
from minitron.model.arch import Arch
from minitron.model.engines import ENGINES
from minitron.recipe import data_in_words
from minitron.reports.figures import (
    Rows,
    figures_table,
    rounded_conditions,
    speed_up_conditions,
    tasks_conditions,
    tasks_table,
    versions_in_words,
)
from minitron.reports.run_files import RunFiles
from minitron.reports.steps import answers_table, cut_sizes, data_rows, in_order, model_name, step_table, step_title
from minitron.reports.words import (
    ethics_in_words,
    export_in_words,
    intended_use,
    licence_in_words,
    limits_in_words,
    origin_in_words,
)

CITATIONS = Path(__file__).with_name("citations.bib")
"""The papers of the method; the last one is that of Mamba heads and their channels."""
EXPORT = "export.json"
"""The file in which an export records what it has written and checked."""
MAMBA_SIZES = ("mamba_num_heads", "mamba_head_dim")


def write_card(folder: Path, model: Arch, run: RunFiles | None = None) -> None:
    """Write `README.md` into a model folder, from its `minitron.json`, and from the figures of the run that made it."""
    history = history_of(folder)
    steps = in_order(history)
    checked = read_json(folder / EXPORT)["checked"] if (folder / EXPORT).is_file() else None
    sections = {
        "How it was made": _made(steps),
        "Training data": _training_data(steps),
        "Evaluation": _evaluation(steps, run) if checked is None else _checked(checked),
        "Use": "\n\n".join(filter(None, (_use(folder), export_in_words(history)))),
        "Intended use": intended_use(history),
        "Limits": limits_in_words(steps, model),
        "Ethical considerations": ethics_in_words(history, run.read("tasks.json") if run else None),
        "Licence": licence_in_words(history),
        "Citation": f"```bibtex\n{_citations(history, steps)}\n```",
        "Recipe": _recipe(run.record) if run else "",
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items() if text)
    size, unit = (model.num_parameters / 1e6, "M") if model.num_parameters >= 1e6 else (model.num_parameters / 1e3, "k")
    title = f"# {_name(steps)}, {size:,.1f} {unit} parameters"
    text = f"---\n{_metadata(history, steps, run)}\n---\n\n{title}\n\n{origin_in_words(history, model)}\n\n{body}\n"
    with whole_file(folder / "README.md") as staging:
        staging.write_text(text, encoding="utf-8")


def _name(steps: list[Step]) -> str:
    names = (step.get("of") or step.get("teacher") for step in steps)
    return model_name(next(filter(None, names), "A model")).rsplit("/", 1)[-1]


def _metadata(history: History, steps: list[Step], run: RunFiles | None) -> str:
    """Return the YAML that the hub reads: origin, licence and language, data sets, and figures of `eval.json`."""
    from huggingface_hub import EvalResult, ModelCardData

    trainings = [step for step in steps if "data" in step]
    sources = [source for step in trainings for source in _sources(step["data"])]
    descends = history.base_model is not None and not any("random_seed" in step for step in history.steps)
    done = {step["step"] for step in history.steps}
    tags = {"pruned": "prune" in done, "distilled": "distill" in done, "quantised": "quantise" in done}
    relation = "quantized" if done == {"quantise"} else "finetune"  # the hub knows adapter and merge besides
    figures: dict[str, Any] = {}
    if run:
        student, recipe = run.results["student"], run.record["recipe"]
        dataset = {
            "dataset_name": data_in_words(recipe["data"]),
            "dataset_type": Path(_sources(recipe["data"])[0].partition(":")[0]).name,
            "dataset_split": "held out",
            "dataset_args": {
                "context": student["context"],
                "num_tokens": student["num_tokens"],
                "seed": recipe["seed"],
            },
        }
        results = [
            EvalResult("text-generation", metric_type=metric, metric_value=round(student[metric], 4), **dataset)
            for metric in ("perplexity", "bits_per_byte")
        ]
        figures = {"model_name": _name(steps), "eval_results": results}
    card = ModelCardData(
        **history.card,
        base_model=history.base_model if descends else None,
        base_model_relation=relation if descends else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["minitron", *(tag for tag, is_true in tags.items() if is_true)],
        datasets=list(dict.fromkeys(source.partition(":")[0] for source in sources if _is_on_hub(source))) or None,
        **figures,
    )
    return str(card.to_yaml(line_break="\n")).strip()


def _sources(data: Any) -> list[str]:
    return [data] if isinstance(data, str) else list(data)


def _is_on_hub(source: str) -> bool:
    return re.fullmatch(rf"{HUB_ID}(:[^:]+)*", source) is not None and not Path(source).exists()


def _made(steps: list[Step]) -> str:
    if not steps:
        return "The folder holds no `minitron.json`: how the model was made is not recorded."
    parts = []
    for step in steps:
        parts.append(f"### {step_title(step)}\n\n{_markdown(step_table(step))}")
        if answers := answers_table(step):
            parts += ["Answers to held-out chats, greedy, before and after:", _markdown(answers, 3)]
        if step["step"] == "prune":
            sizes = [[f"`{name}`", f"{old:,}", f"{new:,}"] for name, (old, new) in step["sizes"].items()]
            parts.append(_markdown([["size", "before", "after"], *sizes]))
    return "\n\n".join(parts)


def _training_data(steps: list[Step]) -> str:
    trainings = [step for step in steps if "tokens" in step]
    if not trainings:
        return "The model was not trained."
    return (
        f"{_markdown(data_rows(trainings), 2)}\n\nTokens are those of the tokenizer. The text is repeated where "
        "more tokens were processed than are unique."
    )


def _evaluation(steps: list[Step], run: RunFiles | None) -> str:
    """Return the figures of the run with their conditions; without a run, what is known from the training alone."""
    if run is None:
        heldout = any(step.get("heldout") for step in steps)
        known = " The held-out perplexity above followed the training; it is no final figure." if heldout else ""
        return f"The model has not been evaluated on text that no stage has seen.{known}"
    recipe, student = run.record["recipe"], run.results["student"]
    conditions = (
        f"Measured on {student['num_tokens']:,} tokens of `{data_in_words(recipe['data'])}` that no other stage has "
        f"seen, in blocks of {student['context']} tokens, seed {recipe['seed']}, "
        f"{versions_in_words(run.record['versions'])}."
    )
    conditions = " ".join(filter(None, (conditions, rounded_conditions(run.results), speed_up_conditions(student))))
    parts = [_markdown(figures_table(run.results)), conditions]
    if tasks := run.read("tasks.json"):
        parts += [_markdown(tasks_table(tasks)), f"Benchmarks: {tasks_conditions(tasks)}."]
    return "\n\n".join(parts)


def _checked(checked: dict[str, Any]) -> str:
    """Return the figures of an export that was compared with the model that it was made of, with their conditions."""
    table = [
        ["", "before quantisation", "quantised"],
        ["perplexity", f"{checked['perplexity_before']:,.4g}", f"{checked['perplexity']:,.4g}"],
        ["KL to the model before, nats per token", "0", f"{checked['kl']:.4g}"],
        ["equal most likely tokens", "100 %", f"{checked['agreement']:.2%}".replace("%", " %")],
    ]
    return (
        f"{_markdown(table)}\n\nMeasured in {checked['engine']} on {checked['num_tokens']:,} tokens of "
        f"`{checked['data']}`, in blocks of {checked['context']} tokens, seed {checked['seed']}, in {checked['dtype']} "
        f"on {checked['device']}. The inputs of quantised matrices were {checked['inputs']}."
    )


def _use(folder: Path) -> str:
    config = read_json(folder / "config.json")
    ask = 'inputs = tokenizer("The capital of France is", return_tensors="pt")'
    if _has_chat_template(folder):
        ask = (
            'messages = [{"role": "user", "content": "What is the capital of France?"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
        )
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH")
{ask}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

{_kind(config)} {_engines(config)}""".rstrip()


def _kind(config: dict[str, Any]) -> str:
    method = (config.get("quantization_config") or {}).get("quant_method")
    needs = f", which transformers reads with the package `{method}`" if method else ""
    return f"This is a stock Hugging Face checkpoint of {config['architectures'][0]}{needs}."


def _has_chat_template(folder: Path) -> bool:
    tokenizer = folder / "tokenizer_config.json"
    return any(folder.glob("chat_template*")) or (tokenizer.is_file() and "chat_template" in read_json(tokenizer))


def _engines(config: dict[str, Any]) -> str:
    """Return which engines run the model and how, and which do not and why, as far as their sources were read."""
    running = [engine for engine in ENGINES if engine.runs(config)]
    parts = []
    if running:
        read = " and ".join(engine.title for engine in running)
        commands = "\n".join(engine.commands for engine in running)
        parts.append(f"By the sources of {read}, it also runs there:\n\n```sh\n{commands}\n```")
    for engine in ENGINES:
        if found := engine.obstacles(config):
            reasons = "; ".join(obstacle.reason for obstacle in found)
            parts.append(f"{engine.title} does not run it as transformers does: {reasons}.")
    return "\n\n".join(parts)


def _citations(history: History, steps: list[Step]) -> str:
    """Return the BibTeX entries of the method and of the teacher."""
    entries = bibtex_entries(CITATIONS.read_text(encoding="utf-8"))
    cuts_mamba = any(name in cut_sizes(step) for step in steps for name in MAMBA_SIZES)
    method = entries if cuts_mamba else entries[:-1]
    return "\n\n".join(dict.fromkeys([*method, *bibtex_entries(history.citation)]))


def _recipe(record: dict[str, Any]) -> str:
    shown = {key: record[key] for key in ("recipe", "versions", "sources")}
    return f"```json\n{json.dumps(shown, indent=2)}\n```"


def _markdown(rows: Rows, num_texts: int = 1) -> str:
    """Return a table, of which the first `num_texts` columns are text; without a head, all are."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---" if i < num_texts or not any(head) else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *body])
