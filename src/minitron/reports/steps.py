"""What was done to make a model, step by step, as tables of text for cards and pages."""

from pathlib import Path
from typing import Any

from minitron.history import History, Step
from minitron.model.anatomy import AXES
from minitron.recipe import data_in_words
from minitron.reports.figures import Rows, versions_in_words

TITLES = {
    "dequantise": "Dequantisation of the teacher",
    "merge": "Merging of the teacher's adapter",
    "narrow": "Cut of the vocabulary",
    "prune": "Pruning",
    "correct": "Correction of the teacher",
    "distill": "Distillation",
    "tune": "Tuning",
    "prefer": "Preference training",
    "quantise": "Quantisation",
    "interpolate": "Merging of two models",
    "rejoin": "Return into the multimodal model",
}
SCHEMES = {
    "fp8": "FP8 (E4M3), a scale for each row",
    "int8": "integers of 8 bits, a scale for each row",
    "int4": "integers of 4 bits, a scale for each {group} entries of a row",
}
"""How the schemes of a quantisation store the matrices of the layers."""
INPUTS = {
    "tensor": "rounded alike, with a scale for each matrix; in vLLM this needs an NVIDIA GPU",
    "token": "rounded alike, with a scale for each token, computed as the model runs",
    None: "not rounded",
}
"""How the inputs of quantised matrices are treated."""
LOSSES = {
    "forward_kl": "KL(teacher, student) of next-token distributions",
    "reverse_kl": "KL(student, teacher) of next-token distributions",
    "jsd": "Jensen-Shannon divergence of next-token distributions, weight {beta} on the teacher",
    "probability_mse": "squared error of next-token probabilities",
    "probability_cosine": "1 − cosine similarity of next-token probabilities",
    "mse": "squared error of logits",
    "cosine": "1 − cosine similarity of logits",
}
"""The losses of `distill.loss` in words; one that a script has added goes by its name."""
OF_LOGITS = ("mse", "cosine")
"""The losses that do not depend on a temperature."""
DATA = {"wiki": "built in: summaries of 10,033 articles of the English Wikipedia, CC BY-SA 4.0"}
"""What the built-in data are, and their licence."""
KINDS = {
    "embedding": "embeddings",
    "block_output": "outputs of layers",
    "mlp_input": "inputs of MLPs",
    "attention": "attention relations",
}
TRAINS = {
    "full": "all",
    "norms": "those of the norms",
    "lora": "low-rank adapters",
    "lisa": "embeddings, output matrix, final norm and some layers",
}
SCORES = {
    "ffn": ("ffn_scores",),
    "query": ("head_scores",),
    "kv": ("head_scores",),
    "mhead": ("mamba_scores",),
    "mchan": ("mamba_scores",),
    "expert": ("expert_scores",),
}
"""The keys of `calibration` that decide the scores of an axis, in addition to the aggregates."""


def in_order(history: History) -> list[Step]:
    """Return the steps of a model in their order, those of its teachers before the steps in which they taught."""
    steps: list[Step] = []
    for step in history.steps:
        steps += [each for each in [*step.get("teacher_steps", []), step] if each not in steps]
    return steps


def step_title(step: Step) -> str:
    """Return the heading of a step."""
    if "random_seed" in step:
        return "Random start"
    return TITLES[step["step"]]


def step_table(step: Step) -> Rows:
    """Return what a step did, a row per setting; the head is empty."""
    if step["step"] == "dequantise":
        return [["", ""], ["weights stored", stored_weights(step)], ["read in", step["dtype"]]]
    if step["step"] == "merge":
        return [["", ""], ["adapter", step["adapter"]], ["base model", model_name(step["base"])]]
    if step["step"] == "prefer":
        return [["", ""], *_preference_rows(step), *_common_rows(step)]
    if step["step"] == "interpolate":
        shares = f"{1 - step['weight']:g} of {model_name(step['of'])}, {step['weight']:g} of {model_name(step['with'])}"
        return [["", ""], ["weights", f"linear interpolation: {shares}"]]
    if step["step"] == "rejoin":
        return [["", ""], ["fitted to the stream", ", ".join(step["moved"]) or "nothing: its width stayed"]]
    if step["step"] == "prune":
        return [["", ""], *(_random_rows(step) if "random_seed" in step else _pruning_rows(step)), *_common_rows(step)]
    if step["step"] == "narrow":
        return [["", ""], *_narrowing_rows(step)]
    if step["step"] == "quantise":
        return [["", ""], *_quantisation_rows(step), *_common_rows(step)]
    learnt = "text itself" if step["learns"] == "all tokens" else "answers"
    text = [["model", model_name(step.get("of", ""))], ["loss", f"cross-entropy of the {learnt}"]]
    matching = _matching_rows(step) if step["step"] == "distill" else text
    return [["", ""], *matching, *_training_rows(step), *_common_rows(step)]


def stored_weights(step: Step) -> str:
    """Return how the weights were stored that a step dequantised: the method, and their bits or types."""
    kinds = step["types"] if "types" in step else [f"{bits} bits" for bits in step["bits"]]
    return f"{step['method'].upper() if step['method'] == 'gguf' else step['method']}, {' and '.join(kinds)}"


def model_name(name: str) -> str:
    """Return a short name of a model: its hub id, its file, or the last parts of its path."""
    path = Path(name)
    if not path.is_absolute() and not name.startswith((".", "~")):
        return name
    return f"{path.parent.name}/{path.name}" if path.name == "student" else path.name


def cut_sizes(step: Step) -> dict[str, tuple[int, int]]:
    """Return the sizes that a pruning has changed, by config name, before and after."""
    return {name: (before, after) for name, (before, after) in step.get("sizes", {}).items() if before != after}


def data_rows(steps: list[Step]) -> Rows:
    """Return the data of trainings: a row per training and source, with its weight and the tokens of the training."""
    rows = [["training", "data", "share of characters", "tokens processed", "unique tokens", "context", "seed"]]
    for step in steps:
        data = {step["data"]: 1.0} if isinstance(step["data"], str) else step["data"]
        figures = [f"{step[key]:,}" for key in ("tokens", "unique_tokens", "context")]
        for number, (source, weight) in enumerate(data.items()):
            share = f"{weight / sum(data.values()):.3g}"
            what = f"{source} ({DATA[source]})" if source in DATA else source
            first = number == 0
            rest = [*figures, str(step["seed"])] if first else [""] * 4
            rows.append([step_title(step).lower() if first else "", what, share, *rest])
    return rows


def loss_in_words(step: Step) -> str:
    """Return the loss of the logits of a distillation."""
    name = str(step["loss"])
    words = LOSSES.get(name, name).format(beta=step["beta"])
    if step["loss"] not in OF_LOGITS:
        words += f" at temperature {step['temperature']:g}"
    if step["top_k"]:
        return f"{words}, over the teacher's {step['top_k']:,} most likely tokens and all others as one class"
    return f"{words}, over the whole vocabulary"


def _random_rows(step: Step) -> Rows:
    before, after = step["num_parameters"]
    shape = f"a shape that could be cut from {model_name(step['of'])}: {after:,} of {before:,} parameters"
    return [["shape", shape], ["weights", f"random, seed {step['random_seed']}; none are the teacher's"]]


def _narrowing_rows(step: Step) -> Rows:
    (tokens, kept), (before, after) = step["sizes"][AXES["vocab"]], step["num_parameters"]
    rows = [
        ["cut from", f"{model_name(step['of'])}, {before:,} parameters"],
        ["parameters", f"{after:,}, {after / before:.1%}"],
        ["tokens kept", f"{kept:,} of {tokens:,}; the others are written with these"],
    ]
    if step.get("merges_rows"):
        rows.append(["rows of pieces", "means, by occurrences, with the rows of tokens that left and begin with them"])
    if "coverage" in step:
        longer, shorter = step["bytes_per_token"]
        text = f"{step['heldout_tokens']:,} tokens of held-out text"
        rows.append(["coverage", f"{step['coverage']:.2%} of {text}"])
        rows.append(["bytes per token", f"{longer:.3g} before, {shorter:.3g} after, on that text"])
        for script, left in step["left"].items():
            samples = " ".join(f"`{' '.join(text.split())}`" for text in left["samples"] if text.strip("` \n"))
            rows.append([f"tokens that left, {script}", f"{left['tokens']:,}: {samples}"])
    return rows


def _pruning_rows(step: Step) -> Rows:
    before, after = step["num_parameters"]
    cut = cut_sizes(step)
    kept, depth = step["kept_layers"], step["sizes"][AXES["layer"]][0]
    rows = [
        ["cut from", f"{model_name(step['of'])}, {before:,} parameters"],
        ["parameters", f"{after:,}, {after / before:.1%}"],
        ["sizes cut", ", ".join(f"{name} {old:,} → {new:,}" for name, (old, new) in cut.items()) or "none"],
        ["layers kept", f"all {depth}" if len(kept) == depth else f"{_spans(kept)} of 0–{depth - 1}"],
        ["importance", _importance(step, cut)],
    ]
    if step["rounds"] > 1:
        rows.append(["rounds", f"{step['rounds']}, with importance measured again before each"])
    if AXES["hidden"] in cut:
        along = {"rotated": "principal directions of the residual stream", "channels": "channels"}
        rows.append(["hidden_size cut along", along[step["hidden"]]])
    if step.get("nested"):  # earlier histories have no such entry
        rows.append(["nested series", "entries in the order of their importance, as the beginning of a larger student"])
    if step["merges_heads"]:
        rows.append(["query heads", "dropped ones merged into those kept"])
    done = {"norms rescaled": step["rescales_norms"], "matrices refitted by least squares": step["refits"]}
    return [*rows, ["repair", ", ".join(name for name, is_done in done.items() if is_done) or "none"]]


def _quantisation_rows(step: Step) -> Rows:
    rows = [
        ["model", model_name(step["of"])],
        ["matrices of the layers", scheme_in_words(step)],
        ["their inputs", INPUTS[step["activations"]]],
        ["everything else", "bfloat16, or as it was: embeddings, the output matrix, norms, routers, convolutions"],
    ]
    if measured := step["calibration"]:
        on = f"{measured['tokens']:,} tokens of {data_in_words(measured['data'])}, context {measured['context']}"
        rows.append(["scales of inputs", f"from the largest inputs on {on}"])
    return [*rows, ["written with", f"compressed-tensors {step['library']['compressed-tensors']}"]]


def scheme_in_words(step: Step) -> str:
    """Return how a quantisation stores the matrices of the layers."""
    return SCHEMES[step["scheme"]].format(group=step["group"])


def _importance(step: Step, cut: dict[str, tuple[int, int]]) -> str:
    """Return how the importance of what was cut was measured."""
    measured = step.get("measured")
    if measured is None:
        return "read from a file that does not record how it was measured"
    scores, depth, parts = measured["scores"], measured["depth"], []
    axes = [axis for axis, name in AXES.items() if name in cut and axis != "layer"]
    if axes:
        keys = dict.fromkeys(key for axis in axes for key in SCORES.get(axis, ()))
        chosen = "".join(f", {key} {scores[key]}" for key in keys)
        parts.append(f"width by activations: {scores['batch']} over blocks, {scores['sequence']} over tokens{chosen}")
    if AXES["layer"] in cut:
        parts.append(f"layers by {depth['score']}, removed {depth['removal']}, ranked {depth['ranking']}")
    where = (
        f"{measured['tokens']:,} tokens of {data_in_words(measured['data'])}, context {measured['context']}, "
        f"seed {measured['seed']}"
    )
    return "; ".join([*parts, f"measured on {where}"])


def _matching_rows(step: Step) -> Rows:
    weight, learning = step["label_weight"], step["teacher_learns"]
    learns = ""
    if learning:
        weights, rate = TRAINS[learning["trains"]], learning["learning_rate"]
        learns = f"; trained on the text while it taught (weights: {weights}; peak learning rate {rate:g})"
    corrected = any(each["step"] == "correct" for each in step["teacher_steps"])
    before = "; trained on the text before (correction)" if corrected else ""
    return [
        ["teacher", f"{model_name(step['teacher'])}{before}{learns}"],
        ["teacher outputs", step["teacher_outputs"]],
        ["loss", loss_in_words(step)],
        ["label loss", f"{weight:g} × cross-entropy of the text's own next tokens" if weight else "none"],
        ["intermediate losses", _intermediate(step["intermediate"])],
        *_on_policy_rows(step.get("on_policy")),  # earlier histories have no such entry
    ]


def _on_policy_rows(recipe: dict[str, Any] | None) -> Rows:
    if recipe is None:
        return []
    first, last = recipe["tokens"]
    text = f"the last {recipe['share']:.0%} of the steps, by {first} to {last} tokens; {LOSSES[recipe['loss']]}"
    return [["continued by the student", text.format(beta=0.5)]]


def _intermediate(losses: dict[str, Any] | None) -> str:
    if losses is None:
        return "none"
    kinds = ", ".join(KINDS.get(kind, kind) for kind in losses["of"])
    pairs = ", ".join(f"{teacher}:{student}" for teacher, student in losses["layers"])
    where = f" at layers {pairs} (teacher:student)" if set(losses["of"]) != {"embedding"} else ""
    distance = {"cosine": "1 − cosine similarity", "mse": "squared error"}[losses["loss"]]
    norms = {"own": "each model's own norm", "teacher": "the teacher's norm"}[losses["norms"]]
    how = "" if set(losses["of"]) == {"attention"} else f"; {distance} of hidden states after {norms}"
    weight = losses["weight"]
    weighed = "weighted to equal the loss of the logits" if weight is None else f"weight {weight:g}"
    return f"{kinds}{where}{how}; {weighed}"


def _training_rows(step: Step) -> Rows:
    trained = TRAINS[step["trains"]] + (f", of rank {step['lora_rank']}" if step["lora_rank"] else "")
    if lisa := step.get("lisa"):  # earlier histories have no such entry
        trained += f", {lisa[0]} at a time, drawn again every {lisa[1]} steps"
    skipped = f"; {step['steps_skipped']} of them skipped" if step["steps_skipped"] else ""
    learns = "" if step["learns"] == "all tokens" else "; only the assistant's answers are learnt"
    if chats := step.get("chats"):  # earlier histories have no such entry
        learns = f"; {chats:.0%} of the blocks are chats that the teacher answered, of which the answers are learnt"
    apart = {"joined": "", "apart": ", documents kept apart", "whole": ", documents whole"}[step["documents"]]
    rate = (
        f"{step['learning_rate']:g} falling to {step['min_learning_rate']:g} ({step['schedule']}), "
        f"{step['warmup_steps']} warm-up steps, {step['optimizer']}"
    )
    noise = step.get("neftune_alpha")
    rows = [
        ["weights trained", trained],
        *([["noise on embeddings", f"NEFTune, α {noise:g}"]] if noise else []),
        *_rounding_rows(step),
        ["tokens", f"{step['tokens']:,} processed, {step['unique_tokens']:,} of them unique{learns}"],
        ["steps", f"{step['steps']:,} of {step['batch_size']} × {step['context']:,} tokens{apart}{skipped}"],
        *_series_rows(step.get("series")),
        ["learning rate", rate],
        ["data", data_in_words(step["data"]) + (f", read {step['epochs']:g} times" if "epochs" in step else "")],
        ["computed on", f"{step['device']} in {step['dtype']}"],
    ]
    if heldout := step.get("heldout"):
        change = f"{heldout['before']:,.4g} before, {heldout['after']:,.4g} after"
        rounded = f", rounded to {step['quantize']}" if step.get("quantize") else ""
        rows.append(["held-out perplexity", f"{change}, on {heldout['tokens']:,} tokens of the data{rounded}"])
    return rows


def _series_rows(series: dict[str, Any] | None) -> Rows:
    if series is None:
        return []
    weights = ", ".join(f"{name} ({weight:.0%})" for name, weight in series["weights"].items())
    shared = f"students {weights} share weights, and each step trains one; {series['steps']:,} steps trained this one"
    return [["nested series", shared]]


def _preference_rows(step: Step) -> Rows:
    before, after = step["before"], step["after"]
    ordered = f"{after['accuracies']:.0%} in the preferred order, margin of rewards {after['margins']:.3g}"
    changes = ", ".join(
        f"{words} {before[f'logps/{words}']:.4g} before, {after[f'logps/{words}']:.4g} after"
        for words in ("chosen", "rejected")
    )
    scale = step.get("reward_scale")  # earlier histories have no such entry
    loss = f"{' + '.join(step['loss'])} of trl {step['versions']['trl']}, β {step['beta']:g}"
    steps = f"{step['steps']:,} steps of {step['batch_size']}"
    return [
        ["model", model_name(step["of"])],
        ["loss", f"{loss}; the reference is the model before"],
        *(
            [["rewards", f"RPO: pairs are exchanged as their rewards, times {scale:g}, make it likely"]]
            if scale
            else []
        ),
        ["pairs", f"{step['pairs']:,} of {data_in_words(step['data'])}, in {steps}"],
        ["learning rate", f"{step['learning_rate']:g} falling to 0 (cosine)"],
        ["held-out pairs", f"{step['heldout_pairs']:,}: {ordered} (0 before, when every reward is 0)"],
        ["their log-probabilities", changes],
        ["computed on", f"{step['device']} in {step['dtype']}"],
    ]


def answers_table(step: Step) -> Rows:
    """Return what a model answered before and after a tuning; no rows where nothing was asked."""
    answers = step.get("answers", [])
    rows = [[" ".join(each[key].split()) or "(nothing)" for key in ("asked", "before", "after")] for each in answers]
    return [["asked", "before", "after"], *rows] if rows else []


def _rounding_rows(step: Step) -> Rows:
    scheme = step.get("quantize")  # earlier histories have no such entry
    if scheme is None:
        return []
    return [["rounding", f"matrices of the layers computed in {scheme}; the weights are saved as before this rounding"]]


def _common_rows(step: Step) -> Rows:
    return [["seed", str(step["seed"])], ["versions", versions_in_words(step["versions"])]]


def _spans(numbers: list[int]) -> str:
    """Return ascending numbers as spans: `0–4, 7`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in spans)
