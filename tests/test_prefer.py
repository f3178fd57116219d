"""Preference training: pairs of every form, the reference that stays, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron import cli
from minitron.data.preferences import Preference, read_preferences, turned_by_reward
from minitron.errors import UserError
from minitron.files import read_jsonl
from minitron.history import history_of
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from tests.conftest import Verb, byte_tokenizer

CPU = torch.device("cpu")
PAIRS = [(f"What is {i}?", f"It is {i}.", f"Who cares, {i}!") for i in range(24)]


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def forms(asked: str, good: str, bad: str) -> dict[str, Any]:
    return {
        "texts": {"prompt": asked, "chosen": good, "rejected": bad},
        "turns": {"prompt": turns(asked), "chosen": turns(asked, good)[1:], "rejected": turns(asked, bad)[1:]},
        "whole chats": {"chosen": turns(asked, good), "rejected": turns(asked, bad)},
        "LMFlow": {"chosen": {"messages": turns(asked, good)}, "rejected": {"messages": turns(asked, bad)}},
        "sharegpt": {
            name: [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
            for name, answer in (("chosen", good), ("rejected", bad))
        },
    }


def write_pairs(path: Path, form: str = "texts") -> Path:
    rows = [forms(*pair)[form] for pair in PAIRS]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"type": "paired_conversation", "instances": rows}))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("form", forms("a", "b", "c"))
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_pairs(tmp_path: Path, form: str, suffix: str) -> None:
    found = read_preferences(str(write_pairs(tmp_path / f"pairs{suffix}", form)), 0)
    assert {
        (pair.prompt[0]["content"], pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in found
    } == set(PAIRS)
    assert [pair.prompt for pair in found] != [
        pair.prompt for pair in read_preferences(str(tmp_path / f"pairs{suffix}"), 1)
    ]
    assert all(pair.chosen[0]["role"] == "assistant" for pair in found)
    plain = found[0].to_row(has_template=False)
    assert plain == {
        "prompt": f"{found[0].prompt[0]['content']}\n\n",
        "chosen": found[0].chosen[0]["content"],
        "rejected": found[0].rejected[0]["content"],
    }


def test_what_both_answers_answer(tmp_path: Path) -> None:
    rows = [
        # A column that repeats what both chats begin with.
        {"prompt": "Q", "chosen": turns("Q", "good"), "rejected": turns("Q", "bad")},
        {"system": "Be kind.", "question": "Q", "chosen": "good", "rejected": "bad"},
        {"instruction": "Translate.", "input": "Bonjour", "chosen": "good", "rejected": "bad"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = {
        tuple(turn["content"] for turn in pair.prompt) for pair in read_preferences(str(tmp_path / "pairs.jsonl"), 0)
    }
    assert prompts == {("Q",), ("Be kind.", "Q"), ("Translate.\n\nBonjour",)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "pairs.jsonl:3 must be a pair, with 'chosen' and 'rejected'; it has prompt, chosen",
        ),
        ({"chosen": "a", "rejected": "b"}, "pairs.jsonl:3: two texts need a column 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "pairs.jsonl:3: the two answers are equal"),
        ({"chosen": turns("a", "b"), "rejected": turns("c", "b")}, "pairs.jsonl:3: the two chats do not begin alike"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "pairs.jsonl:3 holds a number; accepted: a list of turns"),
        (["a"], "pairs.jsonl:3 must be a pair"),
        (
            {
                "prompt": "a",
                "chosen": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}],
                "rejected": "b",
            },
            "pairs.jsonl:3: pairs hold texts; a turn has tool_calls",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, row: Any, message: str) -> None:
    rows = [forms(*pair)["texts"] for pair in PAIRS[:2]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*rows, row])))
    with pytest.raises(UserError, match=re.escape(message)):
        read_preferences(str(tmp_path / "pairs.jsonl"), 0)


@torch.no_grad()
def log_probability(folder: Path, pair: Preference, answer: str) -> float:
    """The log-probability of an answer after its prompt, computed from the folder."""
    model, tokenizer = load_model(open_checkpoint(folder), CPU, torch.float32), byte_tokenizer()
    prompt = tokenizer(f"<user>{pair.prompt[0]['content']}</s><assistant>").input_ids
    ids = torch.tensor([prompt + tokenizer(f"{answer}</s>").input_ids])
    logits = model(ids).logits.log_softmax(-1)[0, :-1]
    return float(logits.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum())


def test_prefer(tmp_path: Path, chatty: Path, verb: Verb) -> None:
    data, out = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out"
    given = ["--data", data, "--epochs", "4", "--learning-rate", "1e-3", "--dtype", "float32", "--context", "128"]
    verb("prefer", chatty, out, *given, "--set", "prefer.batch_size=4", "--beta", "0.5")
    step = history_of(out).steps[-1]
    assert step["heldout_pairs"] == 3
    assert step["steps"] == 21
    assert step["before"]["margins"] == pytest.approx(0, abs=1e-4)
    assert step["after"]["margins"] > 0.5
    assert step["after"]["accuracies"] == 1
    # The figures are those of the two folders: the reference is the model before, which has not moved.
    heldout = read_preferences(str(data), 0)[:3]
    gains = [
        log_probability(out, pair, answer) - log_probability(chatty, pair, answer)
        for pair in heldout
        for answer in (pair.chosen[0]["content"], pair.rejected[0]["content"])
    ]
    margins = [0.5 * (gains[i] - gains[i + 1]) for i in range(0, 6, 2)]
    assert step["after"]["margins"] == pytest.approx(sum(margins) / 3, rel=1e-3)
    assert len(read_jsonl(out / "metrics.jsonl")) == 21
    card = (out / "README.md").read_text()
    assert "### Preference training" in card
    assert "100% in the preferred order" in card
    assert history_of(out).steps[-1]["versions"]["trl"]


@pytest.mark.parametrize(
    "names",
    [
        ("chosen_score", "rejected_score"),
        ("score_chosen", "score_rejected"),
        ("chosen-rating", "rejected-rating"),
        ("reward_chosen", "reward_rejected"),
    ],
)
def test_rewards_are_read(tmp_path: Path, names: tuple[str, str]) -> None:
    rows = [forms(*pair)["texts"] | dict(zip(names, (4.5, 3), strict=True)) for pair in PAIRS[:3]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [pair.gap for pair in read_preferences(str(path), 0)] == [1.5] * 3
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {names[1]: "low"}])))
    with pytest.raises(UserError, match=rf"pairs.jsonl:4: {names[1]} must be a number, not 'low'"):
        read_preferences(str(path), 0)


def test_pairs_are_exchanged_as_their_rewards_make_it_likely(tmp_path: Path) -> None:
    pair = replace(read_preferences(str(write_pairs(tmp_path / "pairs.jsonl")), 0)[0], gap=1.0)
    for scale, share in ((1e-6, 0.5), (1.0, 0.7311), (50.0, 1.0)):
        drawn = turned_by_reward([pair] * 4_000, scale, seed=0)
        assert sum(each == pair for each in drawn) / 4_000 == pytest.approx(share, abs=0.02)
        assert all(each in (pair, pair.turned) for each in drawn)
    assert turned_by_reward([pair] * 40, 1.0, seed=0) != turned_by_reward([pair] * 40, 1.0, seed=1)
    with pytest.raises(UserError, match="1 of 2 do not"):
        turned_by_reward([pair, replace(pair, gap=None)], 1.0, seed=0)


def test_rewards_decide_what_is_preferred(tmp_path: Path, chatty: Path, verb: Verb) -> None:
    given = ["--epochs", "2", "--learning-rate", "1e-3", "--dtype", "float32", "--context", "128"]
    margins = []
    for rejected in (0, 60):
        rows = [forms(*pair)["texts"] | {"chosen_score": 30, "rejected_score": rejected} for pair in PAIRS]
        data, out = tmp_path / f"{rejected}.jsonl", tmp_path / f"out-{rejected}"
        data.write_text("\n".join(map(json.dumps, rows)))
        verb("prefer", chatty, out, "--data", data, *given, "--set", "prefer.reward_scale=1")
        margins.append(history_of(out).steps[-1]["after"]["margins"])
        assert "RPO" in (out / "README.md").read_text()
    assert margins[0] > 0.02
    assert margins[1] < -0.02


def test_continues_after_a_kill(tmp_path: Path, chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback

    data = write_pairs(tmp_path / "pairs.jsonl")
    given = ["--data", str(data), "--epochs", "2", "--learning-rate", "1e-3", "--dtype", "float32", "--context", "128",
             "--set", "prefer.batch_size=4"]  # fmt: skip
    cli.app(["prefer", str(chatty), str(tmp_path / "through"), *given], standalone_mode=False)

    class Killed(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step == 6:
                raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("minitron.distillation.preference._callback", lambda _: Killed())
        with pytest.raises(RuntimeError, match="killed"):
            cli.app(["prefer", str(chatty), str(tmp_path / "killed"), *given], standalone_mode=False)
    assert list((tmp_path / "killed").glob(".minitron-prefer/checkpoint/checkpoint-*"))
    cli.app(["prefer", str(chatty), str(tmp_path / "killed"), *given], standalone_mode=False)
    one, other, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "through", tmp_path / "killed", chatty)
    )
    for name in one:
        assert torch.equal(one[name], other[name])
    assert any(not torch.equal(one[name], before[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "prefer needs --data"),
        (["--data", "DATA", "--set", "prefer.loss=[nonsense]"], "prefer.loss"),
        (["--data", "DATA", "--set", "prefer.beta=0"], "prefer.beta"),
        (["--data", "DATA", "--context", "16"], "pairs have a prompt of 16 tokens or more"),
    ],
)
def test_what_is_refused(tmp_path: Path, chatty: Path, options: list[str], message: str) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl")
    given = [str(data) if option == "DATA" else option for option in options]
    with pytest.raises(UserError, match=message):
        cli.app(["prefer", str(chatty), str(tmp_path / "out"), "--context", "64", *given], standalone_mode=False)
    assert not (tmp_path / "out" / "config.json").exists()
