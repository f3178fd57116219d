"""Tuning: formats of chats and pairs, documents kept whole, adapters, layers in turn, noise, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron import cli
from minitron.data.blocks import Blocks
from minitron.data.corpus import read_documents
from minitron.data.example import example_in_words
from minitron.data.packing import Packing, pack
from minitron.data.tokens import load_tokenizer
from minitron.distillation.optimizers import make_optimizer, take_step
from minitron.distillation.parameters import choose_parameters
from minitron.distillation.trainer import Trainer
from minitron.distillation.tuning import recipe_of_tuning
from minitron.errors import UserError
from minitron.history import history_of
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.recipe import DistillRecipe, Recipe
from minitron.runtime import Runtime
from tests.conftest import CHAT, Verb, byte_tokenizer, make_model

CPU = torch.device("cpu")
PAIRS = [{"input": f"What is {i} plus {i}?", "output": f" It is {2 * i}."} for i in range(60)]
FORMATS: dict[str, Any] = {
    "text2text": {"type": "text2text", "instances": PAIRS},
    "instances first": {"instances": PAIRS, "type": "text2text"},
    "text_only": {"type": "text_only", "instances": [{"text": f"{row['input']}{row['output']}"} for row in PAIRS]},
    "conversation": {
        "type": "conversation",
        "instances": [
            {
                "conversation_id": i,
                "system": "Be brief.",
                "tools": [],
                "messages": [
                    {"role": "user", "content": row["input"]},
                    {"role": "assistant", "content": row["output"]},
                ],
            }
            for i, row in enumerate(PAIRS)
        ],
    },
    "alpaca": [{"instruction": row["input"], "input": "", "output": row["output"]} for row in PAIRS],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": row["input"]}, {"from": "gpt", "value": row["output"]}]}
        for row in PAIRS
    ],
}


def written(folder: Path, name: str, indent: int | None = 1) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(FORMATS[name], indent=indent))
    return path


def with_template() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("has_template", [False, True])
def test_formats(tmp_path: Path, name: str, has_template: bool) -> None:
    data, tokenizer = str(written(tmp_path, name)), with_template() if has_template else byte_tokenizer()
    first = next(read_documents(data, 0))
    if not has_template and name in {"conversation", "sharegpt"}:
        with pytest.raises(UserError, match=r"data.json:\d+ is a chat, but the tokenizer has no chat template"):
            example_in_words(first, tokenizer)
        return
    assert len(list(read_documents(data, 0))) == len(PAIRS)
    shown = example_in_words(first, tokenizer)
    learnt = shown[shown.rindex("⟦") + 1 :].removesuffix("⟧")
    assert " is " in learnt
    assert ("What" in learnt) == (name == "text_only")
    assert learnt.endswith("</s>")
    assert "What is" in shown


def test_a_pair_without_a_template_is_plain_text() -> None:
    tokenizer = byte_tokenizer()
    for row, between in ((PAIRS[0], ""), ({"question": "What is 0 plus 0?", "answer": " It is 0."}, "\n\n")):
        from minitron.data.rows import document

        shown = example_in_words(document(row, "here:1") or "", tokenizer)
        assert shown.endswith(f"What is 0 plus 0?{between}⟦ It is 0.</s>⟧")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "a", "output": 3}, "data.json:{} *column 'output' holds a number"),
        ({"inputs": "a", "outputs": "b"}, "data.json:{} has no column that is read"),
        ({"messages": [{"role": "user"}]}, r"data.json:{}, turn 1 \(user\) has neither content nor tool_calls"),
        ({"messages": "hello"}, "data.json:{} holds a text; accepted: a list of turns"),
        ({"text": 7}, "data.json:{}: column 'text' holds a number"),
        (3, "data.json:{} is a number; accepted: a row with"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, row: Any, message: str) -> None:
    rows = [json.dumps(each) for each in (*PAIRS[:5], row, *PAIRS[:3])]
    (tmp_path / "data.json").write_text('{"type": "text2text",\n "instances": [\n' + ",\n".join(rows) + "\n]}")
    with pytest.raises(UserError, match=message.format(8).replace(" *", ": ", 1)):
        list(read_documents(str(tmp_path / "data.json"), 0))


@pytest.mark.parametrize("can_share", [True, False])
def test_documents_are_kept_whole(can_share: bool) -> None:
    texts = ["a" * n for n in (10, 12, 20, 3, 60, 5, 31, 1)]  # with EOS one more
    blocks = pack(texts, Packing(byte_tokenizer(), 258, 32, documents="whole", can_share=can_share))
    assert blocks.is_learnt is not None
    lengths = [[len(list(run)) for run in found.numpy().tobytes().split(b"\x00") if run] for found in blocks.is_learnt]
    if can_share:
        assert lengths == [[24], [25], [32], [29], [6], [32], [2]]
        assert blocks.starts is not None
    else:
        assert blocks.starts is None
        assert lengths == [[11], [13], [21], [4], [32], [29], [6], [32], [2]]
    eos = byte_tokenizer().eos_token_id
    assert (blocks.ids[~blocks.is_learnt] == eos).all()
    assert (blocks.num_bytes[~blocks.is_learnt] == 0).all()
    assert int(blocks.is_learnt.sum()) == sum(len(text) + 1 for text in texts)
    assert not blocks.leaves_text_unlearnt
    for row in range(len(blocks)):  # a block begins with a document, or with the rest of one that is longer
        begins = row > 0 and bool(blocks.is_learnt[row - 1, -1]) and int(blocks.ids[row - 1, -1]) != eos
        assert blocks.starts is None or bool(blocks.starts[row, 0]) != begins
    joined = pack(texts, Packing(byte_tokenizer(), 258, 32))
    assert joined.is_learnt is None
    assert len(joined) == 4


def blocks_of(teacher: Checkpoint) -> Blocks:
    ids = torch.randint(0, teacher.arch.axis_size("vocab"), (6, 24), generator=torch.Generator().manual_seed(0))
    return Blocks(ids, torch.ones(6, 24, dtype=torch.int32))


def trained(teacher: Checkpoint, folder: Path, recipe: DistillRecipe, **options: Any) -> dict[str, torch.Tensor]:
    blocks, work = blocks_of(teacher), folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    Trainer(None, recipe, blocks, Runtime(CPU, torch.float32), work, blocks[:2], **options).distill(
        teacher, folder / "out"
    )
    found: dict[str, torch.Tensor] = load_file(folder / "out" / "model.safetensors")
    return found


def test_a_few_layers_train_at_a_time(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    recipe = DistillRecipe(tokens=24 * 2 * 4, batch_size=2, trains="lisa", lisa_layers=1, lisa_steps=2)
    found = trained(teacher, tmp_path, recipe)
    changed = {name for name in found if not torch.equal(found[name], teacher.tensor(name))}
    layers = {name.split(".")[2] for name in changed if ".layers." in name}
    assert 1 <= len(layers) <= 2  # four steps, two draws of one layer
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= changed
    full = trained(teacher, tmp_path / "full", recipe.model_copy(update={"trains": "full"}))
    assert all(not torch.equal(full[name], teacher.tensor(name)) for name in full)


def test_moments_of_frozen_layers_are_dropped(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    headless = Headless(load_model(teacher, CPU, torch.float32))
    recipe = DistillRecipe(trains="lisa", lisa_layers=1, lisa_steps=1)
    chosen = choose_parameters(headless.model, teacher.arch, recipe, seed=0)
    optimizer = make_optimizer(headless, recipe)
    held = []
    for step in range(8):
        chosen.begin(step, optimizer)
        for parameter in headless.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        names = [name for name, parameter in headless.named_parameters() if parameter in optimizer.state]
        layers = {name.split(".")[3] for name in names if ".layers." in name}
        assert len(layers) == 1
        held.append(layers.pop())
    assert len(set(held)) > 1


@pytest.mark.parametrize("changes", [{"trains": "lisa", "lisa_layers": 1, "lisa_steps": 2}, {"neftune_alpha": 5.0}])
def test_continues_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    recipe = DistillRecipe(tokens=24 * 2 * 7, batch_size=2, checkpoint_seconds=0, **changes)
    expected = trained(teacher, tmp_path / "through", recipe)
    plain = trained(teacher, tmp_path / "plain", DistillRecipe(tokens=24 * 2 * 7, batch_size=2))
    assert not all(torch.equal(plain[name], expected[name]) for name in plain)
    place = "minitron.distillation.trainer.take_step"
    calls: list[int] = []

    def killed(*arguments: Any) -> float:
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(1)
        return take_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, killed)
        with pytest.raises(KeyboardInterrupt):
            trained(teacher, tmp_path / "killed", recipe)
    assert '"step": 5' in (tmp_path / "killed" / "work" / "checkpoint" / "state.json").read_text()
    found = trained(teacher, tmp_path / "killed", recipe)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_noise_is_for_training_alone(tmp_path: Path) -> None:
    from minitron.distillation.noise import add_noise

    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    embeddings = load_model(teacher, CPU, torch.float32).get_input_embeddings()
    ids = torch.arange(20)[None]
    plain = embeddings(ids).detach()
    add_noise(embeddings, 5.0)
    with torch.no_grad():
        assert torch.equal(embeddings(ids), plain)
    difference = (embeddings(ids) - plain).detach().abs()
    most = 5.0 / (20 * plain.shape[-1]) ** 0.5
    assert 0.9 * most < float(difference.max()) <= most + 1e-6


def test_epochs_are_tokens(tmp_path: Path) -> None:
    recipe = Recipe(teacher="x", tune={"epochs": 2.5}, distill={"batch_size": 2, "trains": "lora"})  # type: ignore[arg-type]
    blocks = Blocks(torch.zeros(8, 16, dtype=torch.int64), torch.ones(8, 16, dtype=torch.int32))
    settled = recipe_of_tuning(recipe, blocks)
    assert settled.num_steps(16) == 10
    assert settled.learning_rate == 5e-4
    assert recipe_of_tuning(recipe, blocks[:1]).num_steps(16) == 2  # all of the data, and rather more than less


def test_tune(tmp_path: Path, chatty: Path, verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path, "conversation")
    common = ["--data", data, "--context", "128", "--set", "distill.batch_size=1", "--dtype", "float32"]
    out = tmp_path / "out"
    verb("tune", chatty, out, *common, "--epochs", "2", "--method", "lora", "--keep-adapter",
         "--learning-rate", "5e-3", "--set", "distill.lora_rank=4")  # fmt: skip
    step = history_of(out).steps[-1]
    assert step["step"] == "tune"
    assert step["learns"] == "answers"
    assert step["heldout"]["after"] < 0.8 * step["heldout"]["before"]
    assert len(step["answers"]) >= 1
    assert {"asked", "before", "after"} == set(step["answers"][0])
    card = (out / "README.md").read_text()
    assert "Answers to held-out chats" in card
    assert "### Tuning" in card
    # The adapters on the model before are the merged model.
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(40)[None]
    base = AutoModelForCausalLM.from_pretrained(chatty, trust_remote_code=False)
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, out / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)(ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, merged, atol=1e-3)
    # A tuned folder is a model that other verbs take.
    figures = verb("evaluate", out, *common[:4], "--max-tokens", "512")
    assert figures["perplexity"] < verb("evaluate", chatty, *common[:4], "--max-tokens", "512")["perplexity"]
    verb("prune", out, tmp_path / "pruned", "--intermediate-size", "48", *common)
    assert [step["step"] for step in history_of(tmp_path / "pruned").steps] == ["tune", "prune"]


def test_a_teacher_says_more_than_the_answers_alone(tmp_path: Path, chatty: Path, verb: Verb) -> None:
    """The teacher's likeliest tokens, stored once, and the answers' own cross-entropy, on answers kept whole."""
    student = make_model(tmp_path / "student", "llama-tied", seed=1)
    data = written(tmp_path, "conversation")
    given = ["--data", data, "--context", "128", "--tokens", "2048", "--dtype", "float32",
             "--set", "distill.documents=whole", "--set", "distill.batch_size=1"]  # fmt: skip
    stored = ["--teacher-states", tmp_path / "states", "--set", "distill.stored=top_k", "--set", "distill.top_k=100"]
    for folder in (student, chatty):
        with_template().save_pretrained(folder)
    steps = []
    for name, more in (("kl", []), ("both", ["--set", "distill.label_weight=1"])):
        verb("distill", chatty, student, tmp_path / name, *given, *stored, *more)
        steps.append(history_of(tmp_path / name).steps[-1])
    assert [step["label_weight"] for step in steps] == [0, 1]
    assert all(step["learns"] == "answers" for step in steps)
    assert steps[1]["heldout"]["after"] < steps[0]["heldout"]["after"]  # this teacher is random


def test_the_first_example_is_shown(
    tmp_path: Path, chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path, "alpaca", indent=None)
    given = ["tune", str(chatty), str(tmp_path / "out"), "--data", str(data), "--context", "128", "--epochs", "0.1"]
    cli.app(given, standalone_mode=False)
    shown = capsys.readouterr().err
    assert "the first example: a chat of 2 turns" in shown
    assert "<assistant>⟦ It is" in shown
    assert history_of(tmp_path / "out").steps[-1]["documents"] == "whole"
    assert load_tokenizer(tmp_path / "out").chat_template


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "tune needs --data"),
        (["--data", "DATA", "--keep-adapter"], "tune.keeps_adapter needs distill.trains lora, not full"),
        (["--data", "DATA", "--set", "distill.teacher_states=s"], "distill.teacher_states needs a teacher"),
        (["--data", "DATA", "--set", "distill.quantize=int8"], "distill.quantize needs a teacher"),
        (["--data", "DATA", "--epochs", "0"], "tune.epochs"),
        (["--data", "DATA", "--set", "distill.learning_rate=1e-5"], "distill.learning_rate does not count in tune"),
        (["--data", "DATA", "--set", "distill.documents=apart"], "what does: tune.documents"),
        (["--data", "DATA", "--context", "64", "--epochs", "1", "--set", "distill.warmup_steps=50"], "takes all"),
        (["--data", "DATA", "--context", "250"], "hold nothing that the assistant answers|has one block"),
    ],
)
def test_what_is_refused(tmp_path: Path, chatty: Path, options: list[str], message: str) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(PAIRS[:4]))
    given = [str(data) if option == "DATA" else option for option in options]
    with pytest.raises(UserError, match=message):
        cli.app(["tune", str(chatty), str(tmp_path / "out"), *given], standalone_mode=False)
    assert not (tmp_path / "out").exists()
