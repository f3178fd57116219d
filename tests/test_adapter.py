"""An adapter's folder is read as the model that it was trained on, with the adapter merged into it."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron.errors import UserError
from minitron.history import history_of
from minitron.model.checkpoint import open_checkpoint
from minitron.model.source import config_of, open_teacher
from tests.conftest import INPUT_IDS, Verb, byte_tokenizer, make_model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))


def make_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """Save a LoRA adapter of random weights for a model."""
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **changes))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_model(tmp_path / "base", "llama")


@torch.no_grad()
def test_the_merged_model_computes_what_base_and_adapter_compute(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    teacher = open_teacher(str(adapter))
    alone = AutoModelForCausalLM.from_pretrained(base).eval()
    plain = alone(input_ids=INPUT_IDS).logits
    expected = PeftModel.from_pretrained(alone, str(adapter)).eval()(input_ids=INPUT_IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(teacher.folder).eval()(input_ids=INPUT_IDS).logits
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-3)
    assert (teacher.folder / "tokenizer.json").is_file()
    assert open_teacher(str(adapter)).folder == teacher.folder
    assert history_of(teacher.folder).steps == ({"step": "merge", "adapter": "adapter", "base": str(base)},)
    assert config_of(adapter) == base


@torch.no_grad()
def test_tokens_that_the_adapter_adds_get_rows(tmp_path: Path, base: Path) -> None:
    larger = AutoModelForCausalLM.from_pretrained(base)
    rows = larger.get_input_embeddings().weight.shape[0] + 2
    larger.resize_token_embeddings(rows)
    larger.save_pretrained(tmp_path / "larger")
    adapter = make_adapter(tmp_path / "larger", tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    config = (adapter / "adapter_config.json").read_text().replace(str(tmp_path / "larger"), str(base))
    (adapter / "adapter_config.json").write_text(config)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(adapter)
    teacher = open_teacher(str(adapter))
    assert teacher.arch.axis_size("vocab") == rows
    merged = AutoModelForCausalLM.from_pretrained(teacher.folder)
    assert torch.equal(merged.get_input_embeddings().weight, larger.get_input_embeddings().weight)


def test_a_student_is_made_of_an_adapter(tmp_path: Path, base: Path, verb: Verb, text_file: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    verb("prune", adapter, tmp_path / "out", "--intermediate-size", "32", "--data", text_file, "--context", "32")
    assert open_checkpoint(tmp_path / "out").arch.sizes["intermediate_size"] == 32


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    config = (adapter / "adapter_config.json").read_text()
    save_file(
        {name.replace("q_proj", "z_proj"): value for name, value in weights.items()},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(UserError, match=r"does not fit .*_proj.* is in one of them alone"):
        open_teacher(str(adapter))
    save_file({name: value[:1] for name, value in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"cannot be merged into .*size mismatch"):
        open_teacher(str(adapter))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"pickled weights \(adapter_model.bin\)"):
        open_teacher(str(adapter))
    save_file(weights, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(config.replace(str(base), "/nowhere/at-all"))
    with pytest.raises(UserError, match="is of the base model '/nowhere/at-all': teacher"):
        open_teacher(str(adapter))
    assert not list((tmp_path / "cache").glob("*-merged-*/"))


def test_the_command_that_an_error_names_converts_pickled_weights(tmp_path: Path, base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(weights, base / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds pickled weights") as error:
        open_checkpoint(base)
    command = shlex.split(str(error.value).partition("beside them: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert open_checkpoint(base).arch.num_parameters == sum(value.numel() for value in weights.values())
