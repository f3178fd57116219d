"""What cards and reports state is what was done: by each command alone, from the folders' own history."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from huggingface_hub import ModelCard

import minitron
from minitron.errors import UserError
from minitron.history import HISTORY, History, bibtex_entries, history_of, hub_id_of
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.model.source import BUILT_IN, CARDS, _card_of_gguf, _write_card
from minitron.recipe import DistillRecipe
from minitron.reports.card import write_card
from minitron.reports.hub import require_valid_card
from minitron.reports.steps import LOSSES, loss_in_words, step_table
from minitron.reports.words import ethics_in_words
from tests.conftest import make_model, variant_arch

RELATIONS = {"adapter", "finetune", "merge", "quantized"}
"""What the hub accepts as `base_model_relation` (its documentation of model cards)."""
TEACHER_CARD = """---
license: apache-2.0
language: [en, no]
base_model: someone/tiny
---
# A teacher
```
@misc{tiny2024, title={A {T}iny model}, year={2024}}
```
"""
SETTINGS: dict[str, Any] = {"context": 32, "device": "cpu", "calibration": {"tokens": 512}, "search": {"tokens": 64},
                            "evaluation": {"tokens": 64}}  # fmt: skip
DISTILL: dict[str, Any] = {
    "tokens": 4_096, "batch_size": 8, "loss": "reverse_kl", "temperature": 2.0, "top_k": 7, "label_weight": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with a card, corrected, pruned in depth and distilled, by one command each."""
    folder = tmp_path_factory.mktemp("card")
    teacher = make_model(folder / "model", "llama-tied")
    (teacher / "README.md").write_text(TEACHER_CARD)
    (folder / "text.txt").write_text("\n".join(f"{i} times {i} is {i * i}." for i in range(110)))
    settings = {**SETTINGS, "data": str(folder / "text.txt")}
    short = {"tokens": 512, "batch_size": 2}
    minitron.correct(teacher, folder / "corrected", distill=short, **settings)
    minitron.prune(folder / "corrected", folder / "pruned", num_hidden_layers=3, prune={"refit": True}, **settings)
    minitron.distill(folder / "corrected", folder / "pruned", folder / "student", distill=DISTILL, **settings)
    minitron.prune(teacher, folder / "random", num_hidden_layers=3, random=True, **settings)
    minitron.distill(teacher, folder / "random", folder / "taught", distill=short, **settings)
    return folder


def rows_of(card: str, heading: str) -> dict[str, str]:
    """Return the table below a heading of a card."""
    table = card.split(f"### {heading}\n", 1)[1].split("#", 1)[0]
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", table, re.MULTILINE))


def test_the_card_states_the_training_that_was_done(place: Path) -> None:
    card = (place / "student" / "README.md").read_text()
    rows = rows_of(card, "Distillation")
    assert rows["loss"] == (
        "KL(student, teacher) of next-token distributions at temperature 2, over the teacher's 7 most likely tokens "
        "and all others as one class"
    )
    assert rows["label loss"] == "0.25 × cross-entropy of the text's own next tokens"
    # A quarter of the layers was cut, so that these losses came on by themselves.
    assert rows["intermediate losses"].startswith("embeddings, outputs of layers at layers 1:0 (teacher:student); ")
    step = history_of(place / "student").steps[-1]
    assert step["tokens"] == 4_096 == step["steps"] * 8 * 32
    assert step["unique_tokens"] < step["tokens"]  # the text is shorter
    rows_trained = [json.loads(line) for line in (place / "student" / "metrics.jsonl").read_text().splitlines()]
    assert step["tokens"] == rows_trained[-1]["tokens"]
    assert rows["tokens"] == f"{step['tokens']:,} processed, {step['unique_tokens']:,} of them unique"
    assert f"distilled on {step['tokens']:,} tokens" in card
    assert "has not been evaluated" in card
    # The control: another training, with other statements.
    other = rows_of((place / "taught" / "README.md").read_text(), "Distillation")
    assert "temperature 1" in other["loss"]
    assert "whole vocabulary" in other["loss"]
    assert other["label loss"] == "none"


def test_the_card_states_how_the_teacher_was_corrected_and_the_model_cut(place: Path) -> None:
    card = (place / "student" / "README.md").read_text()
    assert rows_of(card, "Correction of the teacher")["loss"] == "cross-entropy of the text itself"
    assert rows_of(card, "Distillation")["teacher"] == "corrected; trained on the text before (correction)"
    pruning, arch = rows_of(card, "Pruning"), open_checkpoint(place / "student").arch
    assert pruning["sizes cut"] == "num_hidden_layers 4 → 3"
    assert f"{arch.num_parameters:,}" in pruning["parameters"]
    assert "512 tokens" in pruning["importance"]
    assert "block_influence" in pruning["importance"]
    assert pruning["repair"] == "matrices refitted by least squares"
    assert [step["step"] for step in history_of(place / "student").steps] == ["correct", "prune", "distill"]
    assert [step["step"] for step in history_of(place / "taught").steps] == ["prune", "distill"]
    assert "Correction of the teacher" not in (place / "taught" / "README.md").read_text()


def test_a_correction_while_teaching_and_of_the_teacher_alone_are_both_shown(place: Path) -> None:
    history = history_of(place / "pruned")
    alone = History(steps=(history.steps[1], history_of(place / "student").steps[2]))
    alone.write(place / "pruned")
    try:
        write_card(place / "pruned", open_checkpoint(place / "pruned").arch)
        assert "### Correction of the teacher" in (place / "pruned" / "README.md").read_text()
    finally:
        history.write(place / "pruned")
        (place / "pruned" / "README.md").unlink()


def test_origin_licence_and_citation_pass_from_folder_to_folder(place: Path) -> None:
    for name in ("corrected", "pruned", "student"):
        history = history_of(place / name)
        assert history.base_model == "someone/tiny"
        assert history.card["license"] == "apache-2.0"
    data = require_valid_card(place / "student")
    assert (data.license, data.base_model, data.base_model_relation) == ("apache-2.0", "someone/tiny", "finetune")
    assert data.base_model_relation in RELATIONS
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"pruned", "distilled"} <= set(data.tags)
    card = (place / "student" / "README.md").read_text()
    keys = re.findall(r"@misc\{(\w+)", card)
    assert keys == ["muralidharan2024compact", "sreenivas2024llm", "tiny2024"]
    # Random weights descend from no model.
    taught = require_valid_card(place / "taught")
    assert (taught.base_model, taught.get("base_model_relation")) == (None, None)
    assert "It began with random weights" in (place / "taught" / "README.md").read_text()


def test_a_pruned_folder_has_a_history_and_no_card(place: Path) -> None:
    assert (place / "pruned" / HISTORY).exists()
    assert not (place / "pruned" / "README.md").exists()


def test_importance_from_a_file_is_described_as_it_was_measured(place: Path) -> None:
    settings: dict[str, Any] = {"data": str(place / "text.txt"), "context": 32, "device": "cpu"}
    minitron.calibrate(place / "model", place / "scores", calibration={"tokens": 256}, **settings)
    sizes: dict[str, Any] = {"intermediate_size": 32, "importance": place / "scores"}
    minitron.prune(place / "model", place / "cut", **sizes, calibration={"tokens": 512}, **settings)
    importance = dict(step_table(history_of(place / "cut").steps[-1]))["importance"]
    assert "256 tokens" in importance
    assert "512" not in importance


def a_step(**changes: Any) -> dict[str, Any]:
    """Return a distillation as `distill` records it."""
    step: dict[str, Any] = {
        "step": "distill", "teacher": "t", "teacher_steps": [], "loss": "forward_kl", "beta": None, "temperature": 1.0,
        "top_k": None, "label_weight": 0.0, "intermediate": None, "teacher_learns": None,
        "teacher_outputs": "in memory", "trains": "full", "lora_rank": None, "learning_rate": 1e-3,
        "min_learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 3, "optimizer": "adamw", "data": "wiki",
        "learns": "all tokens", "documents": "joined", "context": 32, "batch_size": 2, "steps": 4, "steps_skipped": 0,
        "tokens": 256, "unique_tokens": 128, "num_parameters": 10, "dtype": "float32", "device": "cpu", "seed": 0,
        "versions": {"torch": "2"},
    }  # fmt: skip
    return step | changes


BETWEEN = {"of": ["attention"], "layers": [[3, 1]], "loss": "cosine", "norms": "own", "weight": None}


@pytest.mark.parametrize(
    "change",
    [
        {"loss": "jsd", "beta": 0.3}, {"temperature": 2.0}, {"top_k": 5}, {"label_weight": 0.1},
        {"intermediate": BETWEEN}, {"intermediate": {**BETWEEN, "weight": 2.0}},
        {"intermediate": {**BETWEEN, "of": ["mlp_input"], "norms": "teacher"}},
        {"teacher_learns": {"trains": "norms", "learning_rate": 1e-5}}, {"teacher_steps": [{"step": "correct"}]},
        {"teacher_outputs": "stored hidden in bfloat16"}, {"trains": "lora", "lora_rank": 4}, {"learning_rate": 1e-2},
        {"min_learning_rate": 0.0}, {"schedule": "wsd"}, {"warmup_steps": 0}, {"optimizer": "adamw8bit"},
        {"data": {"a": 1.0, "b": 3.0}}, {"learns": "answers"}, {"documents": "apart"}, {"context": 64},
        {"batch_size": 4}, {"steps": 5}, {"steps_skipped": 1}, {"tokens": 512}, {"unique_tokens": 64},
        {"dtype": "bfloat16"}, {"device": "cuda"}, {"seed": 1}, {"versions": {"torch": "3"}}, {"teacher": "u"},
        {"heldout": {"tokens": 64, "before": 9.0, "after": 8.0}},
    ],
    ids=str,
)  # fmt: skip
def test_every_fact_of_a_training_is_stated(change: dict[str, Any]) -> None:
    assert step_table(a_step(**change)) != step_table(a_step())
    assert step_table(a_step()) == step_table(a_step())


def test_every_loss_has_words_of_its_own_and_a_temperature_where_it_has_one() -> None:
    names = get_args(DistillRecipe.model_fields["loss"].annotation)
    assert set(names) == set(LOSSES)
    words = {name: loss_in_words(a_step(loss=name, beta=0.5, temperature=3.0)) for name in names}
    assert len(set(words.values())) == len(names)
    assert {name for name in names if "temperature 3" not in words[name]} == {"mse", "cosine"}
    assert loss_in_words(a_step(loss="mine")).startswith("mine at temperature 1")


@pytest.mark.parametrize(("variant", "size", "is_cited"), [
    ("nemotron_h", "mamba_num_heads", True), ("nemotron_h", "hidden_size", False), ("llama", "hidden_size", False),
])  # fmt: skip
def test_the_paper_on_mamba_is_cited_where_its_heads_were_cut(
    variant: str, size: str, is_cited: bool, tmp_path: Path
) -> None:
    arch = variant_arch(variant)
    sizes = {name: [old, old - (name == size)] for name, old in arch.sizes.items()}
    step = {
        "step": "prune", "of": "org/name", "sizes": sizes,
        "num_parameters": [9, 8], "kept_layers": list(range(arch.axis_size("layer"))), "rounds": 1, "hidden": "rotated",
        "merges_heads": False, "rescales_norms": True, "refits": False, "measured": None, "seed": 0, "versions": {},
    }  # fmt: skip
    card = card_of(tmp_path, History().then(step), arch)
    assert ("2504.11409" in card) == is_cited
    assert "2407.14679" in card
    assert "does not record how it was measured" in card


def card_of(folder: Path, history: History, arch: Arch) -> str:
    """Return the card that a folder with a history gets."""
    (folder / "config.json").write_text(json.dumps({"model_type": arch.model_type, "architectures": ["X"]}))
    history.write(folder)
    write_card(folder, arch)
    return (folder / "README.md").read_text()


def test_metadata_names_data_sets_of_the_hub_without_their_configs(tmp_path: Path) -> None:
    data = {"org/name:config:train": 3.0, "org/other": 1.0, "wiki": 1.0, str(tmp_path / "text.txt"): 1.0}
    history = History("org/model", {"license": "other", "license_name": "own", "license_link": "LICENSE"})
    card = card_of(tmp_path, history.then(a_step(data=data)), variant_arch("llama"))
    found = ModelCard(card).data
    assert found.datasets == ["org/name", "org/other"]
    assert found.license_name == "own"
    assert "0.5" in card.split("## Training data")[1].split("##")[0]
    assert "CC BY-SA 4.0" in card
    assert "`own` (LICENSE), the licence of [org/model]" in card
    unknown = card_of(tmp_path, History().then(a_step()), variant_arch("llama"))
    assert "The teacher states no licence" in unknown
    assert ModelCard(unknown).data.license is None


def test_a_folder_without_a_history_gets_a_card_that_admits_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["X"]}))
    write_card(tmp_path, variant_arch("llama"))
    assert "how the model was made is not recorded" in (tmp_path / "README.md").read_text()


def test_safety_is_stated_as_measured_only_where_it_was() -> None:
    assert "not evaluated for safety" in ethics_in_words(History(), None)
    assert "not evaluated for safety" in ethics_in_words(History(), {"tasks": {"piqa": {}}})
    assert "only truthfulqa_mc2 was measured" in ethics_in_words(History(), {"tasks": {"truthfulqa_mc2": {}}})


def test_a_history_is_read_from_a_card_or_from_its_own_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert history_of(tmp_path) == History()
    (tmp_path / "README.md").write_text(TEACHER_CARD)
    history = history_of(tmp_path)
    assert history.base_model == "someone/tiny"
    assert history.card == {"license": "apache-2.0"}  # YAML reads one of the languages as false
    assert history.citation == "@misc{tiny2024, title={A {T}iny model}, year={2024}}"
    later = History("other/model", {"license": "mit"}, "", ({"step": "prune"},))
    later.write(tmp_path)
    assert history_of(tmp_path) == later
    assert not caplog.text
    (tmp_path / HISTORY).write_text('{"steps": 3}')
    assert history_of(tmp_path) == History()
    assert "the history of the model could not be made" in caplog.text
    (tmp_path / HISTORY).unlink()
    (tmp_path / "README.md").write_text("---\nThis model: a merge, see: below\n---\n")
    assert history_of(tmp_path) == History()
    assert "the licence and language of the model card could not be made" in caplog.text


def test_a_folder_of_the_hubs_cache_is_that_model(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(TEACHER_CARD)
    assert history_of(folder).base_model == "org/name"
    (tmp_path / "teacher").symlink_to(folder)
    assert history_of(tmp_path / "teacher").base_model == "org/name"
    assert hub_id_of(tmp_path / "models--org--name") is None
    assert hub_id_of(tmp_path) is None


def test_bibtex_entries_end_where_their_braces_close() -> None:
    text = "a@b.c {x}\n```bash\n@misc{one, title={{A} b}}\n```\n@article{two,\n  x={y}\n} and @misc{open, z={"
    assert bibtex_entries(text) == ["@misc{one, title={{A} b}}", "@article{two,\n  x={y}\n}"]


def test_a_gguf_file_states_its_licence_and_origin(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path, folder = tmp_path / "tiny.Q4.gguf", tmp_path / "converted"
    folder.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny 1")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/someone/base")
    write_gguf(writer)
    _write_card(path, folder, None)
    assert history_of(folder) == History("someone/base", {"language": ["en"], "license": "apache-2.0"})
    # The model that was converted is nearer than the one that it was made from; a file without facts states none.
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_source_repo_url("https://huggingface.co/someone/tiny/")
    writer.add_base_model_repo_url(0, "https://huggingface.co/someone/base")
    write_gguf(writer)
    assert "base_model: someone/tiny" in _card_of_gguf(path)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_repo_url("https://example.org/someone/tiny")
    write_gguf(writer)
    (folder / "README.md").write_text(_card_of_gguf(path))
    assert history_of(folder) == History()


def write_gguf(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("teacher", BUILT_IN)
def test_the_card_of_a_built_in_teacher_replaces_that_of_its_file(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    _write_card(tmp_path / "file.gguf", tmp_path, CARDS / f"{teacher}.md")
    history = history_of(tmp_path)
    assert history.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert history.card == {"language": ["en"], "license": "apache-2.0"}
    assert "2502.02737" in history.citation


def test_a_card_that_the_hub_cannot_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no README\.md"):
        require_valid_card(tmp_path)
