"""The residual merge of query heads."""

from collections.abc import Callable

import pytest
import torch

from minitron.derivation.proof import random_importance
from minitron.model.checkpoint import Checkpoint
from minitron.pruning.cut import Cut
from minitron.pruning.head_merge import merge_partners
from minitron.pruning.selection import select


def test_heads_are_paired_across_the_cut(teachers: Callable[[str], Checkpoint]) -> None:
    arch = teachers("llama").arch.resized(num_attention_heads=12, num_key_value_heads=2)
    importance = random_importance(arch)
    importance["query"] = torch.tensor([[6.0, 5, 4, 3, 2, 1, 1, 2, 3, 4, 5, 6]]).expand(4, 12).clone()
    for count, pairs in {
        4: {0: 0, 1: 1, 2: 5, 3: 4, 8: 7, 9: 6, 10: 10, 11: 11},  # of six, the third takes up the sixth
        5: {0: 0, 1: 1, 2: 2, 3: 3, 4: 5, 7: 6, 8: 8, 9: 9, 10: 10, 11: 11},
        2: {0: 3, 1: 2, 10: 9, 11: 8},  # the two least are nobody's
    }.items():
        kept = select(importance, arch, arch.resized(num_attention_heads=2 * count))
        partners = merge_partners(importance, arch, kept)
        assert {head: int(partners[1, head]) for head in kept["query"][1].tolist()} == pairs
        dropped = set(range(12)) - pairs.keys()
        assert all(int(partners[1, head]) == head for head in dropped)


@pytest.mark.parametrize("variant", ["llama-biases", "phi3", "gpt_oss", "gpt_neox"])
def test_a_merged_head_is_twice_itself_less_the_other(teachers: Callable[[str], Checkpoint], variant: str) -> None:
    teacher = teachers(variant)
    arch = teacher.arch
    kept = select(random_importance(arch), arch, arch)
    partners = kept["query"].flip(-1)
    tensors = dict(Cut(arch, arch, kept, teacher.tensor, partners=partners))
    swapped = dict(Cut(arch, arch, {**kept, "query": partners}, teacher.tensor))
    changed = {name for name, value in tensors.items() if not torch.equal(value, teacher.tensor(name))}
    makers = {"llama-biases": ("q_proj",), "phi3": ("qkv_proj",), "gpt_oss": ("q_proj", "sinks"),
              "gpt_neox": ("query_key_value",)}[variant]  # fmt: skip
    assert changed == {name for name in tensors if any(maker in name for maker in makers)}
    for name in changed:
        torch.testing.assert_close(tensors[name], 2 * teacher.tensor(name) - swapped[name])
    if variant == "phi3":  # keys and values of the fused matrix stay
        name = "model.layers.0.self_attn.qkv_proj.weight"
        torch.testing.assert_close(tensors[name][48:], teacher.tensor(name)[48:])
