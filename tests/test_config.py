"""Configs read without transformers: equal to what its config classes make of them, or left to these."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from minitron.errors import UserError
from minitron.model import config as configs
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import HARMLESS, config_values, decided_values, read_config
from minitron.model.families import FAMILIES, family_of
from minitron.model.memory import attention_windows
from tests.conftest import SIZES, VARIANTS


def written(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def outcome(read: Callable[[Path], dict[str, Any]], path: Path) -> tuple[Arch, list[int]] | str:
    """Return the shape and windows, or the message of the error."""
    try:
        values = read(path)
        return Arch.from_config(values), attention_windows(values)
    except UserError as error:
        return str(error)


def is_right(path: Path) -> bool:
    """Check that a file gives what transformers gives, errors included; return whether it was read without it."""
    assert outcome(config_values, path) == outcome(lambda path: read_config(path).to_dict(), path)
    stated = json.loads(path.read_text())
    return decided_values(stated, family_of(stated["model_type"])) is not None


def variant_values(variant: str) -> dict[str, Any]:
    model_type, flags = VARIANTS[variant]
    sizes = {"vocab_size": SIZES["vocab_size"]} if model_type == "gpt2" else SIZES
    return {"model_type": model_type, **sizes, **flags}


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_config_class(name: str) -> None:
    fields = {field.name: field.default for field in dataclasses.fields(type(AutoConfig.for_model(name)))}
    for entry, default in FAMILIES[name].config_defaults.items():
        assert fields.get(entry) == default, entry
        assert type(fields.get(entry)) is type(default), entry


@pytest.mark.parametrize("name", FAMILIES)
def test_harmless_entries_decide_nothing(name: str) -> None:
    """Whatever value the config class accepts for a harmless entry, the entries that are read stay as they were."""
    family, plain = FAMILIES[name], AutoConfig.for_model(name).to_dict()
    names = set(configs._names_read(family))
    renamed = {AXES[axis] for axis in family.config_names}
    # A pattern of windows decides where they are; `test_what_the_config_class_decides_is_left_to_it` has that.
    entries = HARMLESS - names - renamed - {"model_type", *(["sliding_window_pattern"] if family.window_period else [])}
    for entry in entries:
        for value in (True, 3, 0.5, "bfloat16", [0.5, 0.5], None):
            try:
                changed = AutoConfig.for_model(name, **{entry: value}).to_dict()
            except Exception:  # of many kinds: the class refuses the value
                continue
            assert {each: changed.get(each) for each in names} == {each: plain.get(each) for each in names}, entry


HEAVY = {
    "qwen2",  # the class places windows
    "qwen3_moe",  # states num_experts, which the class keeps under another name
    "qwen3_moe-period",
    "gpt_neox",  # states sizes that the family does not have
    "gpt_neox-sequential",
    "opt",
    "mamba2",
    "falcon_h1",  # leaves mamba_d_head to the class
    "falcon_h1-biases",
}
"""Variants that only transformers can read."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_read_without_transformers_or_by_it(variant: str, tmp_path: Path) -> None:
    values = variant_values(variant)
    is_light = is_right(written(tmp_path, values))
    assert variant in HEAVY or is_light
    for name in values.keys() - {"model_type"}:
        is_right(written(tmp_path, {key: value for key, value in values.items() if key != name}))
        if name not in HARMLESS:  # which a config class may refuse to be null, though no size depends on it
            is_right(written(tmp_path, {**values, name: None}))


def test_a_config_that_transformers_wrote_is_read_without_it(teacher: Checkpoint) -> None:
    is_light = is_right(teacher.folder / "config.json")
    assert is_light or teacher.arch.model_type in HEAVY


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("llama", {"num_attention_heads": 5}),
        ("llama", {"num_attention_heads": 0}),
        ("llama", {"hidden_size": "48"}),
        ("llama", {"hidden_size": 48.0}),
        ("llama", {"attention_bias": 1}),
        ("llama", {"head_dim": 7}),
        ("llama", {"per_layer_config": {"0": {"intermediate_size": 32}}}),
        ("llama", {"text_config": {"hidden_size": 96}}),
        ("llama", {"layer_types": ["full_attention"]}),
        ("gpt2", {"hidden_size": 96}),
        ("gpt2", {"num_hidden_layers": 2}),
        ("gpt2", {"max_position_embeddings": 99}),
        ("mixtral", {"num_experts": 8}),
        ("gpt_neox", {"num_attention_heads": 5}),
        ("mamba2", {"expand": 3}),
        ("falcon_h1", {"mamba_d_ssm": None}),
        ("falcon_h1", {"mamba_d_ssm": 96}),
        ("bamba", {"mamba_d_head": "auto"}),
        ("nemotron_h", {"mamba_n_groups": 1}),
        ("nemotron_h", {"hybrid_override_pattern": "M-X"}),
        ("nemotron_h", {"layer_types": ["mamba", "mlp"]}),
        ("nemotron_h", {"sliding_window": 8}),
        ("gemma3", {"use_bidirectional_attention": True}),
        ("gemma3", {"sliding_window_pattern": 2, "layer_types": None}),
        ("qwen2", {"layer_types": ["full_attention"] * 3}),
    ],
)
def test_what_the_config_class_decides_is_left_to_it(variant: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert not is_right(written(tmp_path, {**variant_values(variant), **changes}))


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("llama", {"rope_theta": 5e5, "eos_token_id": [1, 2], "torch_dtype": "bfloat16", "_remark": 3}),
        ("llama", {"architectures": ["LlamaForCausalLM"], "auto_map": {}, "quantization_config": {"bits": 4}}),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ("llama", {"num_key_value_heads": None, "head_dim": None}),
        ("gemma2", {"layer_types": None}),
        ("gemma3", {"layer_types": None}),
        ("qwen3-tied", {"sliding_window": 16, "use_sliding_window": False}),
        ("nemotron_h", {"layers_block_type": ["mamba", "mlp", "moe", "attention"], "time_step_limit": [0.0, 1e9]}),
    ],
)  # fmt: skip
def test_what_files_usually_hold_needs_no_transformers(variant: str, changes: dict[str, Any], tmp_path: Path) -> None:
    assert is_right(written(tmp_path, {**variant_values(variant), **changes}))


def test_a_file_read_as_another_type(tmp_path: Path) -> None:
    path = written(tmp_path, {**variant_values("llama"), "model_type": "unheard-of"})
    assert Arch.from_config(config_values(path, "llama")) == Arch.from_config(read_config(path, "llama").to_dict())
    with pytest.raises(UserError, match="'unheard-of' has no table"):
        config_values(path)


@pytest.mark.parametrize(
    "lines",
    [
        "import minitron.verbs.inspect",
        "from minitron.verbs.inspect import inspect; inspect(sys.argv[1])",
        "from minitron.verbs.inspect import inspect; inspect(sys.argv[1] + '/config.json')",
        "from minitron.verbs.inspect import dry_run; dry_run(sys.argv[1], {'hidden_size': 24})",
        "sys.argv[1:] = ['prune', sys.argv[1], '--dry-run', '--hidden-size', '24']\n"
        "from minitron.cli import app; app(standalone_mode=False)",
        "sys.argv[1:] = ['inspect', sys.argv[1]]\nfrom minitron.cli import app; app(standalone_mode=False)",
    ],
)
def test_looking_at_a_config_needs_neither_torch_nor_transformers(lines: str, tmp_path: Path) -> None:
    written(tmp_path, variant_values("llama"))
    code = f"import sys\n{lines}\nassert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)


def test_a_folder_with_weights_is_opened(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llama")
    assert configs.has_weights(folder)
    assert not configs.has_weights(folder / "config.json")
