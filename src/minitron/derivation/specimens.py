"""Specimens: tiny random models of a `model_type`, with sizes that show what every dimension is made of."""

import random
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minitron.errors import UserError
from minitron.model.config import quiet_transformers

MOST_PARAMETERS = 20_000_000
"""A specimen with more parameters than this has sizes that no entry of `ENTRIES` sets."""

ENTRIES: dict[str, tuple[str, ...]] = {
    "vocab": ("vocab_size",),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "feed_forward_size"),
    "layer": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"),
    "query": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads"),
    "kv": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "kv_channels", "attention_head_dim"),
    "query_rank": ("q_lora_rank",),
    "kv_rank": ("kv_lora_rank",),
    "turned": ("qk_rope_head_dim",),
    "unturned": ("qk_nope_head_dim",),
    "value_dim": ("v_head_dim",),
    "delta_key": ("linear_num_key_heads",),
    "delta_value": ("linear_num_value_heads",),
    "delta_key_dim": ("linear_key_head_dim",),
    "delta_value_dim": ("linear_value_head_dim",),
    "delta_conv": ("linear_conv_kernel_dim",),
    "position": ("max_position_embeddings", "n_positions", "max_seq_len"),
    "expert": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "chosen": ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"),
    "expert_ffn": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "shared_ffn": (
        "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
    ),
}  # fmt: skip
"""The config entries that state the size of an axis, in the order in which they are looked for."""

EQUAL: dict[str, tuple[str, ...]] = {"hidden": ("word_embed_proj_dim",)}
"""Further config entries that state the size of an axis."""

FIXED: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "sliding_window": 16,
    "num_nextn_predict_layers": 0,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "rotary_dim": 4,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
}
"""Entries that are set where a config has them: ids within the small vocabulary, and what must suit small sizes."""

REQUIRED: dict[str, Any] = {"n_shared_experts": 1}
"""Entries without which a model cannot be built though its config class leaves them open."""


class UnderivableError(UserError):
    """No table can be derived for a `model_type`; the message states what stands in the way."""


@dataclass(frozen=True)
class Specimen:
    """A tiny random model of a `model_type`, in evaluation mode."""

    config: Any
    model: Any
    entries: Mapping[str, str]
    """The config entry that states the size of each axis."""

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes, by axis; `head_dim` also where the config computes it."""
        sizes = {axis: getattr(self.config, entry) for axis, entry in self.entries.items()}
        if "head_dim" not in sizes and "query" in sizes:
            sizes["head_dim"] = sizes["hidden"] // sizes["query"]
        return sizes

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint of it stores, by their names in files."""
        with tempfile.TemporaryDirectory(prefix="minitron-specimen-") as folder:
            self.save(Path(folder))
            return {
                name: value
                for file in sorted(Path(folder).glob("*.safetensors"))
                for name, value in load_file(file).items()
            }

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that a checkpoint of it stores, by the names of their rows; of the first layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, value in self.stored.items():
            shapes.setdefault(in_general(name), tuple(value.shape))
        return shapes

    @cached_property
    def names_in_memory(self) -> dict[str, str]:
        """The parameter or buffer that each tensor of a file becomes, or a part of, by the name in the file.

        Names in files and in memory may differ, and experts are stacked in memory; so a tensor is found by a few of its
        numbers, since all numbers are random.
        """
        held: dict[float, set[str]] = {}
        for name, value in (*self.model.named_parameters(), *self.model.named_buffers()):
            if value.is_floating_point():
                for number in value.detach().flatten().tolist():
                    held.setdefault(number, set()).add(name)
        found = {}
        for name, value in self.stored.items():
            numbers = value.flatten()[:: max(1, value.numel() // 3)].tolist()
            if names := set.intersection(*(held.get(number, set()) for number in numbers)):
                found[name] = min(names)
        return found

    def save(self, folder: Path) -> None:
        """Write the model as a checkpoint, without a tokenizer."""
        with quiet_transformers():
            self.model.save_pretrained(folder)


@dataclass(frozen=True)
class Design:
    """How the sizes of specimens are drawn, so that a config class accepts them."""

    is_free: bool = True
    """Whether hidden may be another number than query times head_dim."""
    is_multiple: bool = True
    """Whether hidden is a multiple of query."""
    is_grouped: bool = True
    """Whether there are fewer KV heads than query heads."""
    states_head_dim: bool = False
    """Whether head_dim is stated though the config class lacks the entry, since some models read it nevertheless."""

    def sizes(self, seed: int) -> dict[str, int]:
        """Draw a size for every axis of `ENTRIES`."""
        chance = random.Random(seed)
        kv, group = chance.choice([2, 4]), chance.choice([2, 3])
        query, head_dim = kv * group, chance.choice([8, 12, 16, 20])
        channels = chance.choice([n for n in (10, 14, 18, 22) if n != head_dim]) if self.is_free else head_dim
        return {
            "vocab": chance.randrange(270, 330, 3),
            "hidden": query * channels + (0 if self.is_multiple else 2),
            "ffn": chance.randrange(72, 160, 8),
            "layer": 4,
            "query": query,
            "kv": kv if self.is_grouped else query,
            "head_dim": head_dim,
            "position": chance.randrange(64, 96),
            "expert": chance.choice([4, 5, 6, 7]),
            "chosen": 2,
            "delta_key": (delta_key := chance.choice([1, 2, 3])),
            "delta_value": delta_key * chance.choice([2, 3]),
            "delta_key_dim": chance.choice([4, 6, 10]),
            "delta_value_dim": chance.choice([4, 6, 10, 14]),
            "delta_conv": chance.choice([3, 4, 5]),
            "query_rank": chance.choice([26, 34, 46]),
            "kv_rank": chance.choice([22, 38, 58]),
            "turned": head_dim,
            "unturned": chance.choice([6, 10, 14]),
            "value_dim": chance.choice([7, 11, 13, 17]),
            "expert_ffn": chance.choice([24, 40, 56]),
            "shared_ffn": chance.choice([16, 32, 48, 64]),
        }


DESIGNS = (
    Design(states_head_dim=True),
    Design(is_free=False),
    Design(is_free=False, is_grouped=False),
)
"""The designs that are tried in turn, the most telling first."""


def causal_types() -> list[str]:
    """Return every `model_type` that the installed transformers has a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def specimen(model_type: str, design: Design, seed: int = 0, **changes: Any) -> Specimen:
    """Make a tiny random model; `changes` are config entries that differ from the design.

    Raises:
        UnderivableError: the model holds other models, lacks a size that every table needs, or does not become small.
        Exception: whatever transformers raises where it refuses the sizes.
    """
    with quiet_transformers():
        plain = AutoConfig.for_model(model_type)
        values = plain.to_dict()
        if plain.sub_configs or getattr(plain, "is_encoder_decoder", False):
            raise UnderivableError("it is an encoder and a decoder, or holds models of other types")
        sizes, entries = design.sizes(seed), {}
        for axis, names in ENTRIES.items():
            own = (plain.attribute_map.get(name, name) for name in names)
            if entry := next((name for name in own if not isinstance(values.get(name, []), list | dict)), None):
                entries[axis] = entry
        if design.states_head_dim and not isinstance(getattr(type(plain), "head_dim", None), property):
            entries.setdefault("head_dim", "head_dim")
        if missing := [axis for axis in ("vocab", "hidden", "layer") if axis not in entries]:
            raise UnderivableError(f"its config states no size of {' and '.join(missing)}")
        fixed = {name: value for name, value in FIXED.items() if values.get(name) is not None or name.endswith("_id")}
        fixed |= {name: value for name, value in REQUIRED.items() if name in values and values[name] is None}
        stated = {entry: sizes[axis] for axis, entry in entries.items()}
        stated |= {name: sizes[axis] for axis, names in EQUAL.items() for name in names if name in values}
        config = AutoConfig.for_model(model_type, **{**fixed, **stated, **changes})
        with torch.device("meta"):
            count = AutoModelForCausalLM.from_config(config).num_parameters()
        if count > MOST_PARAMETERS:
            raise UnderivableError("it has sizes that no known entry of its config sets")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config).eval()
            _randomise(model)
        return Specimen(config, model, entries)


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Make biases and the weights of norms random too, and outputs far from uniform."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if name.endswith("weight") else 0.0))
        else:
            parameter.copy_(torch.randn_like(parameter) * 0.08)
    for name, buffer in model.named_buffers():
        if name.endswith("bias") and buffer.is_floating_point():
            buffer.copy_(torch.randn_like(buffer) * 0.2)


def in_general(name: str) -> str:
    """Return the name of a tensor's row: `{i}` in place of the layer's number, `{e}` in place of the expert's."""
    name = re.sub(r"\bexperts\.\d+\.", "experts.{e}.", name)
    return re.sub(r"\.\d+\.", ".{i}.", name, count=1)
