"""Exports as ONNX: run in ONNX Runtime and compared with transformers."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

import minitron
from minitron.errors import UserError
from minitron.files import read_json
from minitron.formats.onnx import export as onnx_export
from minitron.formats.onnx.decoder import Decoder
from minitron.formats.onnx.export import TYPES, require_graph
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.verbs.export import Exported
from tests.conftest import make_model
from tests.exports import WIDE, make_served

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {**WIDE, "num_hidden_layers": 1}),
    "gemma3": ("gemma3", {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}),
}
"""A window of 16 tokens and heads wider than the residual stream; layers of two kinds.

Every further family is in benchmarks/onnx_in_onnxruntime.py: tracing a model takes seconds per layer.
"""
IDS = torch.randint(5, 300, (2, 40), generator=torch.Generator().manual_seed(2))
Exports = Callable[[str], tuple[Path, Exported]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Return the folder of a tiny model and its export, made and checked once."""

    @cache
    def make(name: str) -> tuple[Path, Exported]:
        folder = tmp_path_factory.mktemp(name)
        variant, changes = MODELS[name]
        model = make_served(folder / "model", variant, **changes)
        return model, minitron.export(model, folder / "out", format="onnx", check="onnxruntime")

    return make


@pytest.fixture
def traced_before(monkeypatch: pytest.MonkeyPatch, exported: Exports) -> None:
    """Let the graph of mistral stand in for every model's, since tracing takes seconds."""
    graph = exported("mistral")[1].file
    monkeypatch.setattr(onnx_export, "trace", lambda _: onnx_ir.load(graph))


def logits_of(folder: Path, **inputs: torch.Tensor) -> np.ndarray:
    """Return the logits of transformers on `IDS`."""
    model = load_model(open_checkpoint(folder), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return model(IDS, **inputs).logits.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_and_what_follows_are_those_of_transformers(name: str, exported: Exports) -> None:
    folder, done = exported(name)
    decoder, expected = Decoder(done.file, 1), logits_of(folder)
    at_once, _ = decoder(IDS.numpy())
    np.testing.assert_allclose(at_once, expected, atol=1e-4)
    for row, ids in zip(expected, IDS.tolist(), strict=True):
        np.testing.assert_allclose(decoder.logits(ids), row, atol=1e-4)
    other, _ = decoder(IDS.numpy()[:, ::-1].copy())
    assert np.abs(other - expected).max() > 0.1  # the control


def test_sequences_padded_on_the_left(exported: Exports) -> None:
    folder, done = exported("gemma3")
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    expected = logits_of(folder, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    decoder, seen = Decoder(done.file, 1), mask.bool().numpy()
    logits, cache = decoder(IDS.numpy()[:, :30], mask=mask.numpy()[:, :30])
    rest, _ = decoder(IDS.numpy()[:, 30:], cache, mask.numpy())
    np.testing.assert_allclose(np.concatenate([logits, rest], 1)[seen], expected[seen], atol=1e-4)
    assert np.abs(logits_of(folder) - expected)[seen].max() > 1e-2  # the control: padding matters


def test_a_folder_has_what_other_programs_read(exported: Exports) -> None:
    folder, done = exported("gemma3")
    assert done.record["file"] == "onnx/model.onnx"
    assert done.record["checked"]["kl"] < 1e-6
    graph = onnx_ir.load(done.file).graph
    state = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    assert {value.name for value in graph.inputs} == {
        "input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in state)
    }  # fmt: skip
    assert [value.name for value in graph.outputs] == ["logits", *(f"present.{name}" for name in state)]
    stored = sum(value.const_value.size for value in graph.initializers.values())
    assert stored == pytest.approx(open_checkpoint(folder).arch.num_parameters, rel=0.01)  # tied weights once
    assert [str(size) for size in graph.inputs[3].shape] == ["batch_size", "3", "past_sequence_length", "8"]
    assert b"site-packages" not in done.file.read_bytes()
    reading = {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    assert read_json(done.out / "config.json")["transformers.js_config"] == reading
    genai = read_json(done.out / "genai_config.json")["model"]
    assert (done.out / genai["decoder"]["filename"]) == done.file
    assert [genai["decoder"][name] for name in ("num_key_value_heads", "head_size")] == [3, 8]
    assert genai["eos_token_id"][0] == AutoTokenizer.from_pretrained(folder).eos_token_id
    template = (folder / "chat_template.jinja").read_text()
    assert read_json(done.out / "tokenizer_config.json")["chat_template"] == template
    assert AutoConfig.from_pretrained(done.out).to_dict().items() >= {"model_type": "gemma3_text"}.items()
    assert len(AutoTokenizer.from_pretrained(done.out)) == len(AutoTokenizer.from_pretrained(folder))


@pytest.mark.usefixtures("traced_before")
def test_matrices_of_eight_bits(tmp_path: Path, exported: Exports) -> None:
    folder, whole = exported("mistral")
    done = minitron.export(folder, tmp_path / "out", format="onnx", quantize="int8", check=["onnxruntime"])
    assert whole.record["checked"]["kl"] < done.record["checked"]["kl"] < 1e-3
    assert done.record["num_bytes"] < whole.record["num_bytes"]
    assert sorted(path.name for path in done.file.parent.iterdir()) == ["model_int8.onnx", "model_int8.onnx_data"]
    assert read_json(done.out / "config.json")["transformers.js_config"]["dtype"] == "int8"


@pytest.mark.usefixtures("traced_before")
def test_a_graph_of_another_model_is_not_published(tmp_path: Path) -> None:
    variant, changes = MODELS["mistral"]
    other = make_served(tmp_path / "other", variant, seed=1, **changes)
    with pytest.raises(UserError, match="onnxruntime computes another function of this model: KL"):
        minitron.export(other, tmp_path / "out", format="onnx", check="onnxruntime")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("variant", "changes", "type", "reason"),
    [
        ("mamba2", {}, "f32", "mamba2 models: .* Mamba have other states"),
        ("nemotron_h", {}, "f32", "nemotron_h models"),
        ("falcon_h1", {}, "f32", "falcon_h1 models"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "f32", "dynamic"),
        ("gpt2", {}, "int8", "leaves most matrices of gpt2 models"),
        ("mixtral", {}, "int8", "leaves most matrices of mixtral models"),
        ("llama", {}, "q4_0", "--quantize q4_0: "),
    ],
)
def test_what_cannot_be_represented_is_refused_before_work(
    variant: str, changes: dict[str, Any], type: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "load_model", None)
    folder = make_model(tmp_path / "model", variant, **changes)
    with pytest.raises(UserError, match=reason):
        minitron.export(folder, tmp_path / "out", format="onnx", quantize=type)
    assert not (tmp_path / "out").exists()
    require_graph(open_checkpoint(make_model(tmp_path / "taken", "opt")), type if type in TYPES else "f32")


def test_the_engine_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--check llama\.cpp: this format is checked in onnxruntime"):
        minitron.export(tmp_path, tmp_path / "out", format="onnx", check="llama.cpp")
