"""Exports in the layout of compressed-tensors: read back by transformers and by this project, to equal values."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import minitron
from minitron.errors import UserError
from minitron.formats.compressed import export as compressed
from minitron.formats.compressed.inputs import largest_inputs
from minitron.model import schemes
from minitron.model.checkpoint import open_checkpoint
from minitron.model.quantised import open_quantised
from minitron.model.schemes import scheme_for
from minitron.model.source import resolve_teacher
from minitron.recipe import recipe_from
from minitron.reports.figures import exports_table
from minitron.reports.run_files import RunFiles
from minitron.session import Session
from tests.conftest import VARIANTS, make_model

quantization = pytest.importorskip("compressed_tensors.quantization")

WIDE = {"hidden_size": 96, "head_dim": 16}
"""Sizes of which groups of 32 are a part, in a model that has them; those of `FURTHER` in addition."""
FURTHER: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 96},
    "qwen3_moe": {"moe_intermediate_size": 32},
    "nemotron_h": {"mamba_head_dim": 16, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64},
    "bamba": {"mamba_d_head": 16},
    "falcon_h1": {"mamba_d_ssm": 96},
    "nemotron_h-latent": {"moe_latent_size": 32},
}
FAMILIES = {model_type: variant for variant, (model_type, _) in reversed(VARIANTS.items())}
"""A variant of every family."""
REFUSED = ("gpt2", "gpt_oss")
TEXT = {"context": 16, "calibration": {"tokens": 64}, "evaluation": {"tokens": 64}}
IDS = torch.randint(0, 258, (1, 24), generator=torch.Generator().manual_seed(2))


def wide_model(folder: Path, variant: str) -> Path:
    model_type = VARIANTS[variant][0]
    return make_model(folder, variant, **{**WIDE, **FURTHER.get(model_type, {}), **FURTHER.get(variant, {})})


def read(folder: Path, **options: Any) -> Any:
    """Return transformers' model of a folder, dequantised by its first pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **options)
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.fixture
def made(tmp_path: Path, text_file: Path) -> Callable[..., Any]:
    """Export a wide tiny model into `out` of the test's folder."""

    def make(variant: str = "llama-tied", format: str = "fp8", **options: Any) -> Any:
        if not (tmp_path / "model").exists():
            wide_model(tmp_path / "model", variant)
        options = {"out": tmp_path / "out", "data": str(text_file), **TEXT, **options}
        return minitron.export(tmp_path / "model", format=format, **options)

    return make


@pytest.mark.parametrize("format", compressed.SCHEME_OF)
@pytest.mark.parametrize("variant", [FAMILIES[name] for name in FAMILIES if name not in REFUSED])
def test_both_readers_hold_the_rounded_values(
    variant: str, format: str, tmp_path: Path, made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = open_checkpoint(wide_model(tmp_path / "model", variant)).arch
    experts = any(row.is_per_expert for row in schemes.quantised_rows(arch))
    if (format == "w8a8" and experts) or (format == "w4a16" and variant == "mamba2"):
        with pytest.raises(UserError, match=f"--format {format}: transformers loads no .*; take fp8"):
            made(variant, format)
        return
    record = made(variant, format, check="transformers").record
    checkpoint, scheme = open_checkpoint(tmp_path / "model"), scheme_for(compressed.SCHEME_OF[format], arch)
    quantised, opened = set(schemes.quantised_tensors(arch)), open_quantised(tmp_path / "out")
    assert opened is not None
    ours = dict(opened.tensors())
    assert ours.keys() == checkpoint.tensors.keys()
    for name, value in ours.items():
        weight = checkpoint.tensor(name)
        rounded = schemes.rounded(weight, schemes.scales(weight, scheme), scheme) if name in quantised else weight
        assert torch.equal(value, rounded.to(value.dtype)), name
        assert name not in quantised or not torch.equal(value.float(), weight), name
    assert record["checked"]["matrices_equal"] == len(quantised) - sum(".experts." in name for name in quantised)
    assert record["checked"]["kl"] > 0
    # Experts, which transformers joins, and everything else, against the dequantised folder.
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    theirs = read(tmp_path / "out")
    logits_of(theirs)
    expected = read(resolve_teacher(str(tmp_path / "out"))).state_dict()
    held = theirs.state_dict()
    for name, value in expected.items():
        assert torch.equal(held[name].bfloat16(), value.bfloat16()), name


def test_input_scales_are_the_largest_inputs_of_calibration(tmp_path: Path, text_file: Path) -> None:
    folder = wide_model(tmp_path / "model", "falcon_h1")
    session = Session(recipe_from(None, teacher=str(folder), data=str(text_file), **TEXT))
    measured = largest_inputs(session)
    model, seen = read(folder), dict[str, float]()
    for name, module in model.base_model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.update({name: max(seen.get(name, 0.0), inputs[0].abs().max().item())})
            )
    for block in session.calibration_blocks.ids.split(1):
        model(block)
    assert {
        row.tensor_name(layer).removeprefix("model.layers.").removesuffix(".weight"): pytest.approx(value, rel=1e-4)
        for (row, layer), value in measured.items()
    } == seen
    assert len(set(measured.values())) > len(measured) / 2
    joined = [value for (row, layer), value in measured.items() if layer == 0 and row.module[-6:-5] in "qkv"]
    assert len(joined) == 3
    assert len(set(joined)) == 1


def test_transformers_rounds_inputs_with_the_scales_that_are_stored(tmp_path: Path, made: Callable[..., Any]) -> None:
    made("llama-tied", "fp8")
    file = tmp_path / "out" / "model.safetensors"
    before, stored = logits_of(read(tmp_path / "out")), load_file(file)
    scales = {name: value * 0.1 for name, value in stored.items() if name.endswith("input_scale")}
    assert len(scales) == 28
    save_file({**stored, **scales}, file, {"format": "pt"})  # inputs are clipped now
    assert not torch.allclose(logits_of(read(tmp_path / "out")), before, atol=0.01)


@pytest.mark.parametrize("format", compressed.SCHEME_OF)
def test_the_config_states_what_is_stored(format: str, tmp_path: Path, made: Callable[..., Any]) -> None:
    record = made("qwen3_moe", format).record if format != "w8a8" else made("llama", format).record
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stated = quantization.QuantizationConfig.model_validate(config["quantization_config"])
    [group] = stated.config_groups.values()
    scheme = schemes.SCHEMES[compressed.SCHEME_OF[format]]
    assert (group.weights.num_bits, group.weights.symmetric, group.weights.dynamic) == (scheme.bits, True, False)
    assert group.weights.group_size == record["group"] == (32 if format == "w4a16" else None)
    assert group.targets == ["Linear"]
    routers = [] if format == "w8a8" else [r"re:.*layers\.\d+\.mlp\.gate$"]
    assert stated.ignore == ["lm_head", *routers]
    assert config["dtype"] == "bfloat16"
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names if name.endswith("_scale")} == {torch.bfloat16}
    assert any(name.endswith("weight_packed") for name in names) == (format == "w4a16")
    assert not any(name.endswith("input_scale") for name in names)  # experts have a scale for each token
    assert record["num_bytes"] < record["num_bytes_before"] / 2
    assert record["activations"] == (None if format == "w4a16" else "token")


def test_card_and_record_state_what_was_checked(tmp_path: Path, made: Callable[..., Any]) -> None:
    assert made(out=tmp_path / "unchecked").record["checked"] is None
    card = (tmp_path / "unchecked" / "README.md").read_text()
    assert "| matrices of the layers | FP8 (E4M3), a scale for each row |" in card
    assert "has not been evaluated" in card
    checked = made(check="transformers").record["checked"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| perplexity | {checked['perplexity_before']:,.4g} | {checked['perplexity']:,.4g} |" in card
    assert "has not been evaluated" not in card
    assert "with the package `compressed-tensors`" in card
    assert "vllm serve" in card
    assert "llama.cpp" not in card
    [step] = json.loads((tmp_path / "out" / "minitron.json").read_text())["steps"]
    assert step["library"].keys() == {"compressed-tensors"}
    assert step["calibration"]["tokens"] == 64


def test_the_page_of_a_run_lists_its_exports(tmp_path: Path, text_file: Path) -> None:
    run = tmp_path / "run"
    wide_model(run / "student", "llama")
    recipe = {"teacher": str(tmp_path / "teacher"), "data": str(text_file), **TEXT}
    (run / "run.json").write_text(json.dumps({"recipe": recipe, "stages": {}, "sources": {}, "seed": 0}))
    checked = minitron.export(run, format="w8a8", check="transformers")
    minitron.export(run, format="fp8")
    assert checked.out == run / "w8a8"
    head, *rows = exports_table(RunFiles(run).exports)
    assert [row[:2] for row in rows] == [["fp8", "fp8"], ["w8a8", "int8"]]
    assert rows[0][3:] == ["", "", ""]
    assert rows[1][3] == f"{checked.record['checked']['kl']:.4g}"
    assert len(head) == len(rows[0])
    assert "Exports" in minitron.report(run).report.read_text()


def test_other_values_in_transformers_fail_the_check_and_nothing_remains(
    tmp_path: Path, made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wide_model(tmp_path / "model", "llama")
    stored = compressed.stored_tensors

    def doubled(name: str, *rest: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for part, value in stored(name, *rest):
            yield part, (value * 2 if part.endswith("up_proj.weight_scale") else value)

    monkeypatch.setattr(compressed, "stored_tensors", doubled)
    with pytest.raises(UserError, match=r"reads other values of model.layers.0.mlp.up_proj.weight than were written"):
        made(check="transformers")
    assert not (tmp_path / "out").exists()


def test_nothing_remains_of_an_export_that_fails(
    tmp_path: Path, made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = made("llama", "w8a8").file.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compressed, "record_step", fail)  # all tensors are written
    for name in ("new", "out"):
        with pytest.raises(OSError, match="No space left"):
            made(format="w8a8", out=tmp_path / name, overwrite=True)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("gpt2", {}, "a gpt2 model stores its matrices transposed"),
        ("gpt_oss", {}, "stores the experts of a layer in one tensor"),
        ("llama", {"format": "w4a16"}, "needs matrices whose inputs are a multiple of 32, and"),
        ("llama", {"quantize": "q8_0"}, "--quantize q8_0 is for --format gguf: fp8 has one type of matrices"),
        ("llama", {"check": "vllm"}, "--check vllm: this format is checked in transformers"),
        ("llama", {"data": "missing.txt"}, "missing.txt"),
    ],
)
def test_what_cannot_be_represented_is_refused_in_one_line(
    variant: str, options: dict[str, Any], message: str, tmp_path: Path, made: Callable[..., Any]
) -> None:
    make_model(tmp_path / "model", variant)
    with pytest.raises(UserError, match=message) as refused:
        made(**options)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_broken_weights_are_named(tmp_path: Path, made: Callable[..., Any]) -> None:
    wide_model(tmp_path / "model", "llama")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    for format, message in (("fp8", "down_proj.weight are not finite"), ("w4a16", "up_proj.weight holds NaN")):
        with pytest.raises(UserError, match=message):
            made(format=format)
    assert not (tmp_path / "out").exists()
