"""Tables that are derived from transformers: the written ones are found again, and what is wrong is not proven."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.derivation import UnderivableError, causal_types, derive
from minitron.derivation.dimensions import dimension_of, in_words, orders
from minitron.derivation.drafts import Draft
from minitron.derivation.proof import checkpoint_of, is_its_masked_teacher, moves_with, turns
from minitron.derivation.specimens import DESIGNS, Design, specimen
from minitron.derivation.tables import draft
from minitron.errors import UserError
from minitron.model.config import decided_values
from minitron.model.families import FAMILIES, family_of, table_files
from minitron.model.families.table_files import COMMITTED, in_text, parse_table
from minitron.model.family import Family
from tests.conftest import Verb, byte_tokenizer

FOUND_AGAIN = ("llama", "gpt2", "gpt_neox", "gemma2", "phi3")
"""Written families with what the shapes of tensors leave open: fused, interleaved and transposed matrices."""


def essence(family: Family) -> dict[str, Any]:
    """What two tables of one family must agree in, whatever order their lines have."""
    rows = [row for row in family.rows if not row.is_ignored]
    return {
        "rows": {(row.name, row.dimensions, row.kind, row.condition) for row in rows},
        "taps": {(tap.axes, tap.module, tap.side) for tap in family.taps},
        "norms": [
            (norm.name, {row.name for row in rows if norm.is_read_by(row) and len(row.dimensions) > 1})
            for norm in family.norms
        ],
        "numbers": (family.norm_offset, family.is_centred, family.scales_embedding, family.is_transposed),
        "logits": (family.logit_divisor, family.logit_multiplier, family.logit_softcap),
        "product": family.product,
        "layer": family.layer,
    }


@pytest.mark.parametrize("model_type", FOUND_AGAIN)
def test_a_written_table_is_found_again(model_type: str) -> None:
    found = derive(model_type)
    assert not found.failed
    assert essence(parse_table(found.table)) == essence(FAMILIES[model_type])


@pytest.mark.parametrize("model_type", ["deepseek_v3"])
def test_a_committed_table_is_what_is_derived_now(model_type: str) -> None:
    committed = (COMMITTED / f"{model_type}.yaml").read_text(encoding="utf-8")
    assert sorted(derive(model_type).in_text().splitlines()[1:]) == sorted(committed.splitlines()[1:])


def test_every_committed_table_is_of_a_family_without_a_written_one() -> None:
    names = [file.stem for file in COMMITTED.glob("*.yaml")]
    assert len(names) > 40
    assert set(names) <= set(causal_types()) - FAMILIES.keys()
    for name in names:
        assert family_of(name).taps


def proven(made: Draft, check: Callable[..., bool], *arguments: Any, **entries: Any) -> bool:
    table = {**made.text_entries(), **entries}
    with checkpoint_of(made.specimens[0], parse_table(in_text(table))) as teacher:
        return check(teacher, *arguments)


def test_a_wrong_order_in_memory_is_not_proven() -> None:
    made = draft("gpt_neox")
    verdicts = []
    for order in orders(made.rows["gpt_neox.layers.{i}.attention.query_key_value.weight"][0]):
        for leaf in ("weight", "bias"):
            made.rows[f"gpt_neox.layers.{{i}}.attention.query_key_value.{leaf}"][0] = order
        verdicts.append((in_words(order), proven(made, moves_with, "query")))
    # What order a head has within itself does not matter to heads that change places whole.
    assert verdicts == [("(3 query head_dim)", False), ("(query 3 head_dim)", True), ("(query head_dim 3)", True)]


def test_a_norm_that_is_missed_is_not_proven() -> None:
    made = draft("llama")
    norms = made.text_entries()["norms"]
    assert proven(made, turns)
    assert not proven(made, turns, norms=[norms[0], norms[2]])
    unread = [(name, readers.replace("mlp.up_proj", "")) for name, readers in norms]
    assert not proven(made, turns, norms=unread)


def test_a_segment_that_is_missed_does_not_fit_the_checkpoint() -> None:
    made = draft("phi3")
    row = "model.layers.{i}.mlp.gate_up_proj.weight"
    assert in_words(made.rows[row][0]) == "(2 ffn)"
    assert proven(made, moves_with, "ffn")
    made.rows[row][0] = (("ffn",),)
    with pytest.raises(UserError, match="gate_up_proj"):
        proven(made, moves_with, "ffn")


def test_heads_under_one_norm_are_not_offered() -> None:
    found = derive("olmo2")
    assert set(found.failed) == {"query", "kv"}
    assert not {"query", "kv"} & set(found.axes)
    made = draft("olmo2")
    assert not proven(made, is_its_masked_teacher, "query", 4)
    assert proven(made, is_its_masked_teacher, "ffn", 64)


def test_sizes_tell_sums_and_products_apart() -> None:
    sizes = [Design().sizes(seed) for seed in range(5)]

    def found(size: Callable[[dict[str, int]], int]) -> str:
        dimension = dimension_of([size(each) for each in sizes], sizes)
        return in_words(dimension) if dimension else ""

    assert found(lambda s: s["hidden"]) == "hidden"
    assert found(lambda s: s["query"] * s["head_dim"]) == "(query head_dim)"
    assert found(lambda s: (s["query"] + 2 * s["kv"]) * s["head_dim"]) == "(query head_dim | kv head_dim | kv head_dim)"
    assert found(lambda s: s["query"] * (s["unturned"] + s["value_dim"])) == "(query unturned+value_dim)"
    assert found(lambda s: s["position"] + 2) == "(position | 2)"
    assert found(lambda s: 7) == "7"
    assert not found(lambda s: s["hidden"] + 1)


@pytest.mark.parametrize(
    ("model_type", "reason"), [("bart", "encoder and a decoder"), ("xlnet", "no norm follows"), ("gptj", "has a bias")]
)
def test_what_has_no_table_states_what_stands_in_the_way(model_type: str, reason: str) -> None:
    with pytest.raises(UnderivableError, match=reason):
        derive(model_type)


def test_a_model_without_a_table_gets_one_and_is_pruned(
    tmp_path: Path, verb: Verb, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    monkeypatch.setattr(table_files, "COMMITTED", tmp_path)  # as if none had been committed
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    with torch.random.fork_rng():
        specimen("cohere", DESIGNS[0]).save(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    result = verb(
        "prune",
        tmp_path / "teacher",
        tmp_path / "out",
        "--intermediate-size",
        "64",
        "--data",
        text_file,
        "--context",
        "32",
    )
    assert result["arch"]["intermediate_size"] == 64
    assert len(list((tmp_path / "cache").rglob("cohere.yaml"))) == 1
    assert verb("families", "cohere")["cohere"]["table"] == "derived here"
    assert verb("families")["llama"] == {
        "table": "written",
        "axes": [
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "num_hidden_layers",
        ],
    }  # fmt: skip


def test_a_config_of_a_derived_family_is_read_by_transformers() -> None:
    """A derived table holds no defaults, so that a file that leaves out head_dim does not decide the sizes."""
    stated = {
        "vocab_size": 258, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "sliding_window": None, "tie_word_embeddings": False, "attention_bias": False,
        "mlp_bias": False,
    }  # fmt: skip
    assert decided_values(stated, family_of("llama")) is not None
    assert decided_values(stated, family_of("glm")) is None


def test_a_type_that_transformers_lacks_is_one_line(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="no causal language model 'nonsense'"):
        verb("families", "nonsense")
