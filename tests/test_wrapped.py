"""The text model inside a multimodal one: read by itself it computes what it computed inside."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from minitron.errors import UserError
from minitron.files import read_json
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
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56,
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


IMAGE_TOKEN = 200
IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {"image_token_id": IMAGE_TOKEN},
    "mistral3": {"image_token_id": IMAGE_TOKEN},
    "qwen2_5_vl": {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": 201, "video_token_id": 202},
    "qwen3_vl": {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": 201, "video_token_id": 202},
}
"""What the configs state about images."""
IMAGE_TOKENS = 4
PROJECTORS = ("projector.linear_2.weight", "merger.mlp.2", "merger.linear_fc2", "merger_list.0.linear_fc2")
"""Parts of the names of tensors outside the text model whose rows are channels of the stream."""
DEAD = 36
"""Channels of the stream from here on are zero in the multimodal models of `make_with_dead_channels`."""


def image_prompt(model: Any) -> dict[str, Any]:
    """Return a prompt of text around one image."""
    draw = torch.Generator().manual_seed(1)
    is_qwen = model.config.model_type.startswith("qwen")
    if is_qwen:
        vision = model.config.vision_config
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        image = {
            "pixel_values": torch.randn(4 * IMAGE_TOKENS, width, generator=draw),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    else:
        image = {"pixel_values": torch.randn(1, 3, 56, 56, generator=draw)}
    if model.config.model_type == "mistral3":
        image["image_sizes"] = torch.tensor([[56, 56]])
    ids = torch.tensor([[65, 66, *([201] if is_qwen else []), *[IMAGE_TOKEN] * IMAGE_TOKENS, 67, 68, 69]])
    if model.config.model_type != "mistral3":
        image["mm_token_type_ids" if is_qwen else "token_type_ids"] = (ids == IMAGE_TOKEN).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image}


def make_with_dead_channels(folder: Path, model_type: str, **changes: Any) -> Path:
    """Save a multimodal model of which no part writes the last channels of the stream."""
    make_wrapped(folder, model_type, **IMAGES[model_type] | changes)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "mm_input_projection_weight", "projector.linear_2.weight")):
                value[:, DEAD:] = 0.0
            is_text = "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight"))
            if is_text or any(part in name for part in PROJECTORS):
                value[DEAD:] = 0.0
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("model_type", ["gemma3", "mistral3", "qwen3_vl"])
@pytest.mark.parametrize("is_tied", [False, True])
@torch.no_grad()
def test_with_a_student_inside_images_are_read_as_by_the_masked_teacher(
    tmp_path: Path, verb: Verb, text_file: Path, model_type: str, is_tied: bool
) -> None:
    source = make_with_dead_channels(tmp_path / "whole", model_type, tie_word_embeddings=is_tied)
    verb(
        "prune", source, tmp_path / "student", "--text-only", "--hidden-size", str(DEAD), "--data", text_file,
        "--context", "32", "--dtype", "float32",
    )  # fmt: skip
    found = verb("rejoin", tmp_path / "student", source, tmp_path / "smaller")
    teacher = AutoModelForImageTextToText.from_pretrained(source).eval()
    smaller = AutoModelForImageTextToText.from_pretrained(tmp_path / "smaller").eval()
    assert smaller.config.text_config.hidden_size == DEAD
    assert found["moved"]
    assert found["residual"] < 1e-6
    prompt = image_prompt(teacher)
    expected = teacher(**prompt).logits
    torch.testing.assert_close(smaller(**prompt).logits, expected, atol=2e-3, rtol=1e-2)
    without = {**prompt, "pixel_values": torch.zeros_like(prompt["pixel_values"])}
    assert not torch.allclose(teacher(**without).logits, expected, atol=1e-2)
    for name, value in smaller.named_parameters():
        if "mm_input_projection" in name or any(part in name for part in PROJECTORS):
            value.mul_(0.5)
    assert not torch.allclose(smaller(**prompt).logits, expected, atol=1e-2)


@torch.no_grad()
def test_parts_outside_stay_where_the_stream_keeps_its_width(tmp_path: Path, verb: Verb, text_file: Path) -> None:
    source = make_wrapped(tmp_path / "whole", "qwen2_5_vl", **IMAGES["qwen2_5_vl"])
    cut = ("--data", text_file, "--context", "32", "--dtype", "float32", "--text-only")
    verb("prune", source, tmp_path / "student", "--intermediate-size", "32", *cut)
    found = verb("rejoin", tmp_path / "student", source, tmp_path / "smaller")
    teacher, smaller = (
        AutoModelForImageTextToText.from_pretrained(each).eval() for each in (source, tmp_path / "smaller")
    )
    assert found["moved"] == []
    for name, value in teacher.model.visual.state_dict().items():
        assert torch.equal(smaller.model.visual.state_dict()[name], value)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    expected = student(input_ids=INPUT_IDS).logits
    torch.testing.assert_close(smaller(input_ids=INPUT_IDS).logits, expected, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(smaller(**image_prompt(smaller)).logits).all()
    # Its attention has heads of hidden / heads channels, so the config cannot state a narrower stream with all heads.
    for size, refused in (("40", "hidden_size must be divisible by num_heads"), ("36", "cannot hold this student")):
        verb("prune", source, tmp_path / size, "--hidden-size", size, *cut)
        with pytest.raises(AssertionError, match=refused):
            verb("rejoin", tmp_path / size, source, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_plain_model_and_other_tokens_are_refused(tmp_path: Path, verb: Verb, text_file: Path) -> None:
    source = make_wrapped(tmp_path / "whole", "mistral3")
    plain = text_model_of(source)
    with pytest.raises(AssertionError, match="is not a multimodal model"):
        verb("rejoin", plain, plain, tmp_path / "out")
    other = make_wrapped(tmp_path / "other", "mistral3")
    values = read_json(other / "config.json")
    values["text_config"]["vocab_size"] = 260
    AutoModelForImageTextToText.from_config(AutoConfig.for_model(**values)).save_pretrained(other)
    with pytest.raises(AssertionError, match="the student has 260 tokens"):
        verb("rejoin", text_model_of(other), source, tmp_path / "out")
