"""What a model card states in sentences: origin, intended use, limits, ethical considerations and licence."""

from typing import Any

from minitron.history import History, Step
from minitron.model.arch import Arch
from minitron.reports.steps import in_order, model_name, scheme_in_words, stored_weights

LEAST_PER_PARAMETER = 11
"""Tokens per parameter on which the papers' students were trained at least: 94 billion for Minitron-8B, of 8.27 billion
parameters (arXiv 2407.14679, table 2)."""
EXPORTS = {"fp8": "fp8", "int8": "w8a8", "int4": "w4a16"}
"""The format in which a model that was trained for a scheme (`distill.quantize`) is exported."""
SAFETY = ("bbq", "crows_pairs", "hhh", "realtoxicityprompts", "toxigen", "truthfulqa", "winogender", "wmdp")
"""Beginnings of the names of benchmarks that measure bias, toxicity, truthfulness or hazardous knowledge."""


def origin_in_words(history: History, model: Arch) -> str:
    """Return a paragraph on what the model is and what it was made of."""
    kind = f"A {model.model_type} model of {model.num_parameters:,} parameters"
    ancestor = _link(history.base_model)
    descent = f" Its nearest ancestor on the Hugging Face Hub is {ancestor}." if ancestor else ""
    for step in history.steps:
        if step["step"] == "quantise":
            descent = f" The matrices of its layers are quantised: {scheme_in_words(step)}.{descent}"
    descent += "".join(
        f" The teacher's weights were stored quantised ({stored_weights(step)}) and were read in {step['dtype']}."
        for step in in_order(history)
        if step["step"] == "dequantise"
    )
    if {step["step"] for step in history.steps} <= {"quantise"}:
        return f"{kind}.{descent}"
    prunings = [step for step in history.steps if step["step"] == "prune"]
    trainings = [step for step in history.steps if step["step"] == "distill"]
    tokens = f"{sum(step['tokens'] for step in trainings):,} tokens"
    teachers = " and ".join(dict.fromkeys(f"`{model_name(step['teacher'])}`" for step in trainings))
    learnt = f"trained by distillation from {teachers} on {tokens}" if trainings else "not trained by distillation"
    if tuned := [step for step in history.steps if step["step"] == "tune"]:
        learnt += f", and tuned on {sum(step['tokens'] for step in tuned):,} tokens of text"
    if not prunings:
        corrected = history.steps[-1]["step"] == "correct"
        return f"{kind}{', a teacher trained further on text,' if corrected else ''} {learnt}.{descent}"
    last = prunings[-1]
    whole, source = prunings[0]["num_parameters"][0], model_name(last["of"])
    first = model_name(next(step["of"] for step in history.steps if "of" in step))
    share = f"{model.num_parameters / whole:.1%} of the parameters of `{first}`"
    if "random_seed" in last:
        return f"{kind}, {share}. It began with random weights and was {learnt}.{descent}"
    cut = f"It was cut out of `{source}` by the importance of its parts"
    return f"{kind}, {share}. {cut}, and {learnt}.{descent}"


def export_in_words(history: History) -> str:
    """Return which export holds the values that the model was trained with; empty where it was not trained for one."""
    scheme = history.steps[-1].get("quantize") if history.steps else None
    if scheme is None:
        return ""
    return (
        f"The model was trained to be exported in {scheme}: `minitron export PATH OUT --format {EXPORTS[scheme]}` "
        "writes the values that its matrices were trained with. This folder holds the weights before that rounding."
    )


def intended_use(history: History) -> str:
    """Return what the model is meant for."""
    trained = any(step["step"] == "distill" for step in history.steps)
    purpose = (
        "Generating text as its teacher does, at less cost: in applications that are evaluated on their own data "
        "first, in research on compression, and as the start of further training."
        if trained
        else "Research on compression, as a teacher, and as the start of further training."
    )
    return (
        f"{purpose} Uses that the teacher's card or licence excludes are excluded here as well. It is not meant for "
        "decisions about people without a person who checks them."
    )


def limits_in_words(steps: list[Step], model: Arch) -> str:
    """Return how long the model was trained compared with the papers, and what is known to suffer most."""
    tokens = sum(step["tokens"] for step in steps if step["step"] == "distill")
    each = tokens / model.num_parameters
    trained = (
        f"It was distilled on {tokens:,} tokens, {each:.2g} per parameter; the papers' students were trained on "
        f"{LEAST_PER_PARAMETER} or more per parameter."
        if tokens
        else "It was not trained after it was made smaller."
        if any(step["step"] == "prune" for step in steps)
        else "It was not trained by distillation."
    )
    shorter = (
        " Expect larger losses in knowledge, arithmetic, code and languages that are rare in the training data than "
        "perplexity on that data shows."
        if each < LEAST_PER_PARAMETER
        else " Abilities that the training data does not show may be lost."
    )
    return (
        f"{trained}{shorter} Facts that the teacher knows may be wrong here, and the model may state them with equal "
        "confidence. Text longer than the context of the training, and kinds of text that the training data lacks, "
        "were not part of it."
    )


def ethics_in_words(history: History, tasks: dict[str, Any] | None) -> str:
    """Return what the model inherits and may have lost, and whether its safety was measured."""
    measured = [name for name in (tasks or {"tasks": {}})["tasks"] if name.startswith(SAFETY)]
    safety = (
        f"Of its safety, only {', '.join(measured)} was measured (see Evaluation)."
        if measured
        else "It was not evaluated for safety, bias or toxicity."
    )
    ancestor = _link(history.base_model) or "the teacher"
    return (
        f"{safety} It inherits the biases of {ancestor} and of that model's training data, and may generate text that "
        "is false, offensive or private. Compression is known to cost most where data is rare, which can add to "
        "unequal treatment of groups (arXiv 2010.03058). Training on ordinary text is known to weaken what alignment "
        "has taught a model, refusals among it (arXiv 2310.03693), and the training above does not teach it again. "
        "Evaluate the model for your use, and add the safeguards that it needs."
    )


def licence_name(history: History) -> str:
    """Return the name of the licence that the model inherits; empty where none is known."""
    name = history.card.get("license_name") or history.card.get("license", "")
    return name if isinstance(name, str) else ", ".join(name)


def licence_in_words(history: History) -> str:
    """Return the licence that the model inherits, or that none is known."""
    card, name = history.card, licence_name(history)
    if not name:
        return (
            "The teacher states no licence that could be read. Find out which terms hold for the teacher before this "
            "model is passed on: they hold for this model, too."
        )
    link = f" ({card['license_link']})" if "license_link" in card else ""
    is_random = any("random_seed" in step for step in history.steps)
    share = "tokenizer and outputs" if is_random else "weights"
    return (
        f"`{name}`{link}, the licence of {_link(history.base_model) or 'the teacher'}, of whose {share} this model is "
        "made. The data named above has terms of its own."
    )


def _link(hub_id: str | list[str] | None) -> str:
    ids = [hub_id] if isinstance(hub_id, str) else hub_id or []
    return " and ".join(f"[{each}](https://huggingface.co/{each})" for each in ids)
