"""Tests that the tables and transformers read one model from a folder, in whatever form it was stored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitron.errors import UserError
from minitron.model import checkpoint as checkpoints
from minitron.model import crosscheck
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.crosscheck import require_one_reading
from minitron.model.language_model import build_model
from tests.conftest import VARIANTS, make_model

Tensors = dict[str, Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / SINGLE)), folder / SINGLE, {"format": "pt"})


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


def shard(folder: Path, shards: dict[str, Tensors], listed: dict[str, str] | None = None) -> None:
    """Write shards and an index of their tensors, or of those that are `listed`."""
    for name, tensors in shards.items():
        save_file(tensors, folder / name, {"format": "pt"})
    weight_map = listed or {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def listed(folder: Path) -> dict[str, str]:
    """Return the files of tensors as the index of a folder lists them."""
    return dict(json.loads((folder / INDEX).read_text())["weight_map"])


def another(tensors: Tensors) -> Tensors:
    return {name: torch.randn_like(tensor) * 0.1 for name, tensor in tensors.items()}


def with_own_head(folder: Path) -> None:
    rewrite(folder, lambda tensors: {**tensors, HEAD: another(tensors)[EMBEDDING]})


def with_equal_head(folder: Path) -> None:
    rewrite(folder, lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].clone()})


def with_head_alone(folder: Path) -> None:
    def move(tensors: Tensors) -> Tensors:
        return {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()}

    rewrite(folder, move)


def with_stale_index(folder: Path) -> None:
    shard(folder, {"model-00001-of-00001.safetensors": another(load_file(folder / SINGLE))})


def with_index_of_missing_shards(folder: Path) -> None:
    names = load_file(folder / SINGLE)
    shard(folder, {}, dict.fromkeys(names, "model-00001-of-00002.safetensors"))


def in_shards_that_overlap(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    first = {name: another(tensors)[name] for name in tensors if "layers.0" in name}
    shard(folder, {"a.safetensors": first, "b.safetensors": tensors})


def in_shards_that_the_index_lists_in_part(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    shard(folder, {"a.safetensors": tensors}, {EMBEDDING: "a.safetensors"})


def in_a_file_that_the_config_names(folder: Path) -> None:
    save_file(load_file(folder / SINGLE), folder / "true.safetensors", {"format": "pt"})
    rewrite(folder, another)
    edit(folder, transformers_weights="true.safetensors")


def without_prefix(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name.split(".", 1)[1]: tensor for name, tensor in tensors.items()})


def without_prefix_and_with_own_head(folder: Path) -> None:
    with_own_head(folder)
    rewrite(folder, lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})


ACCEPTED = [
    with_own_head,
    with_equal_head,
    with_head_alone,
    with_stale_index,
    with_index_of_missing_shards,
    in_shards_that_overlap,
    in_shards_that_the_index_lists_in_part,
    in_a_file_that_the_config_names,
    without_prefix,
    without_prefix_and_with_own_head,
]


def logits(model: Any, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids).logits
    return output


def as_the_tables_read_it(checkpoint: Checkpoint) -> Any:
    tensors = ((name, checkpoint.tensor(name)) for name, _ in checkpoints.expected_shapes(checkpoint.arch))
    return build_model(checkpoint.config, tensors, torch.device("cpu"))


@pytest.mark.parametrize("change", ACCEPTED)
def test_both_readers_read_one_model_from_odd_folders(
    tmp_path: Path, input_ids: Tensor, change: Callable[[Path], None]
) -> None:
    folder = make_model(tmp_path / "model", "llama-tied")
    change(folder)
    checkpoint = open_checkpoint(folder)
    require_one_reading(checkpoint)
    stock = logits(AutoModelForCausalLM.from_pretrained(folder).eval(), input_ids)
    torch.testing.assert_close(logits(as_the_tables_read_it(checkpoint), input_ids), stock, atol=0, rtol=0)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_names_without_their_prefix_are_read_in_every_family(tmp_path: Path, variant: str) -> None:
    """As models are stored that were saved without their output matrix (Qwen3-Embedding)."""
    folder = make_model(tmp_path / "model", variant)
    prefix = open_checkpoint(folder).arch.family.prefix
    rewrite(folder, lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    assert not any(name.startswith(prefix) for name in load_file(folder / SINGLE))
    require_one_reading(open_checkpoint(folder))


@pytest.mark.parametrize("compared", [10**9, 1])
@pytest.mark.parametrize("variant", ["llama", "gemma2", "gpt2", "nemotron_h", "bamba", "gpt_oss"])
def test_stock_folders_agree_in_all_layers_and_in_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, compared: int
) -> None:
    monkeypatch.setattr(crosscheck, "COMPARED_PARAMETERS", compared)
    require_one_reading(open_checkpoint(make_model(tmp_path / "model", variant)))


@pytest.mark.parametrize("compared", [10**9, 1])
@pytest.mark.parametrize(
    ("broken", "change", "first"),
    [
        ("_with_its_own_head", with_own_head, r"tensor lm_head.weight"),
        ("locate_tensors", with_stale_index, r"tensor model.embed_tokens.weight"),
    ],
)
def test_a_reader_that_decides_otherwise_is_caught(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    change: Callable[[Path], None],
    first: str,
    compared: int,
) -> None:
    """Controls: what the reader did before it decided as transformers does."""
    folder = make_model(tmp_path / "model", "llama-tied")
    change(folder)
    decisions: dict[str, Any] = {
        "_with_its_own_head": lambda checkpoint: checkpoint,
        "locate_tensors": lambda folder, _: (
            json.loads((folder / INDEX).read_text())["weight_map"]
            and {name: folder / file for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()}
        ),
    }
    monkeypatch.setattr(checkpoints, broken, decisions[broken])
    monkeypatch.setattr(crosscheck, "COMPARED_PARAMETERS", compared)
    with pytest.raises(UserError, match=f"transformers reads another model from it than the llama table: {first}"):
        require_one_reading(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("variant", "family", "difference"),
    [
        ("granite", "llama", "the outputs of layer 0 differ"),
        ("smollm3", "llama", "the outputs of layer 2 differ"),
        ("mistral", "llama", "the outputs of layer 0 differ"),
    ],
)
def test_a_family_that_is_another_network_is_refused(
    tmp_path: Path, variant: str, family: str, difference: str
) -> None:
    """The tables of these families are alike; what differs are multipliers, rotary layers and windows."""
    folder = make_model(tmp_path / "model", variant)
    require_one_reading(open_checkpoint(folder))
    with pytest.raises(UserError, match=difference):
        require_one_reading(open_checkpoint(folder, family))


def test_a_family_that_is_an_equal_network_is_accepted(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    with pytest.raises(
        UserError, match="the outputs of layer 0 differ"
    ):  # Mistral has a window unless the config has none
        require_one_reading(open_checkpoint(folder, "mistral"))
    edit(folder, sliding_window=None)
    require_one_reading(open_checkpoint(folder, "mistral"))
    edit(folder, model_type="their_own", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    require_one_reading(open_checkpoint(folder, "llama"))


def test_weights_that_transformers_would_invent_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != HEAD})
    with pytest.raises(UserError, match="saved without its output matrix, which the config unties"):
        open_checkpoint(folder)


def in_a_wrapper(beginning: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(
        folder, lambda tensors: {beginning + name: tensor for name, tensor in tensors.items()}
    )


def as_pointer(name: str) -> Callable[[Path], object]:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    return lambda folder: (folder / name).write_text(pointer)


def with_fewer_layers(folder: Path) -> None:
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name})


def in_float8(folder: Path) -> None:
    def narrow(tensors: Tensors) -> Tensors:
        return {
            name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()
        }

    rewrite(folder, narrow)


def as_adapter(folder: Path) -> None:
    for name in ("config.json", SINGLE):
        (folder / name).unlink()
    edit(folder, "adapter_config.json", base_model_name_or_path="org/base")


def renamed(name: str, old: str = SINGLE) -> Callable[[Path], object]:
    return lambda folder: (folder / old).rename(folder / name)


def in_a_cache(folder: Path) -> None:
    place = folder / "snapshots" / "abc"
    place.mkdir(parents=True)
    for path in folder.glob("*.*"):
        path.rename(place / path.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_a_wrapper("_orig_mod."), "torch.compile wraps: save the model inside it"),
        (in_a_wrapper("module."), "DataParallel wraps"),
        (in_a_wrapper("base_model.model."), r"merge its adapter \(`merge_and_unload`\)"),
        (in_a_wrapper("language_model."), "multimodal model: --text-only reads its text model"),
        (lambda folder: edit(folder, model_type="x", text_config={"model_type": "llama"}), "around a text model"),
        (lambda folder: edit(folder, "hf_quant_config.json"), "quantised by NVIDIA Model Optimizer"),
        (lambda folder: edit(folder, "quantize_config.json"), "quantised by GPTQ"),
        (lambda folder: edit(folder, quantization={"bits": 4}), r"quantised weights \(4 bits\)"),
        (in_float8, "is stored as F8_E4M3: quantised weights, which the config does not state"),
        (as_adapter, "a LoRA adapter .* of org/base: merge it into its base model"),
        (lambda folder: edit(folder, "adapter_config.json"), "a LoRA adapter"),
        (as_pointer(SINGLE), "is a Git LFS pointer, not the file itself: run git lfs pull there"),
        (as_pointer("config.json"), "is a Git LFS pointer"),
        (with_fewer_layers, "the config states 4 layers, the weights hold the first 3"),
        (lambda folder: edit(folder, num_hidden_layers=3), "beyond the 3 layers that the config states"),
        (renamed("model-00001-of-00002.safetensors"), "without which transformers loads no shards"),
        (renamed("consolidated.safetensors"), "consolidated.safetensors is weights under names"),
        (renamed("model.gguf"), "model.gguf is a GGUF file: pass the path of the file itself"),
        (renamed("params.json", "config.json"), "take its Hugging Face release"),
        (in_a_cache, "did you mean .*snapshots/abc"),
    ],
)  # fmt: skip
def test_folders_of_another_form_are_refused_with_the_reason(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = make_model(tmp_path / "model", "llama-tied")
    open_checkpoint(folder)
    change(folder)
    with pytest.raises(UserError, match=message):
        open_checkpoint(folder)
