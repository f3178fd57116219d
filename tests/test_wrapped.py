"""The text model inside a multimodal one: read by itself it computes what it computed inside."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from minitron.errors import UserError
from minitron.model.checkpoint import open_checkpoint
from minitron.model.source import open_teacher, text_model_of
from tests.conftest import INPUT_IDS, Verb, byte_tokenizer

TEXT = {
    "vocab_size": 258, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 256,
    "eos_token_id": 257,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 48}
WRAPPED: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "query_pre_attn_scalar": 8, "sliding_window": 16},
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "pixtral", **VISION},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "hidden_size": 48, "head_dim": 8, "rope_parameters": ROPE},
        "vision_config": QWEN_VISION,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": ROPE},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
}


def make_wrapped(folder: Path, model_type: str, **changes: Any) -> Path:
    """Save a tiny random multimodal model with a byte tokenizer."""
    config = AutoConfig.for_model(model_type, **WRAPPED[model_type], **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("model_type", WRAPPED)
@pytest.mark.parametrize("is_tied", [False, True])
@torch.no_grad()
def test_the_text_model_computes_what_it_computed_inside(tmp_path: Path, model_type: str, is_tied: bool) -> None:
    source = make_wrapped(tmp_path / "whole", model_type, tie_word_embeddings=is_tied)
    teacher = open_teacher(str(source), text_only=True)
    assert (tmp_path / "cache") in teacher.folder.parents
    whole = AutoModelForImageTextToText.from_pretrained(source).eval()
    text = AutoModelForCausalLM.from_pretrained(teacher.folder).eval()
    expected = whole(input_ids=INPUT_IDS).logits
    torch.testing.assert_close(text(input_ids=INPUT_IDS).logits, expected, atol=1e-5, rtol=1e-4)
    text.get_input_embeddings().weight[:, 0] += 1.0
    assert not torch.allclose(text(input_ids=INPUT_IDS).logits, expected, atol=1e-3)
    assert teacher.arch.num_parameters == sum(parameter.numel() for parameter in text.parameters())


def test_without_the_option_a_multimodal_model_is_refused(tmp_path: Path) -> None:
    source = make_wrapped(tmp_path / "whole", "mistral3")
    with pytest.raises(UserError, match="--text-only reads the text model alone"):
        open_teacher(str(source))


def test_a_plain_model_is_its_own_text_model(tmp_path: Path) -> None:
    source = make_wrapped(tmp_path / "whole", "mistral3")
    plain = text_model_of(source)
    assert text_model_of(plain) == plain
    assert open_checkpoint(plain).arch.model_type == "mistral"


def test_the_student_of_a_multimodal_teacher_is_a_text_model(tmp_path: Path, verb: Verb, text_file: Path) -> None:
    source = make_wrapped(tmp_path / "whole", "gemma3")
    out = tmp_path / "out"
    verb(
        "prune", source, out, "--text-only", "--intermediate-size", "32", "--data", text_file, "--context", "32"
    )  # fmt: skip
    assert open_checkpoint(out).arch.model_type == "gemma3_text"
    assert open_checkpoint(out).arch.sizes["intermediate_size"] == 32
