"""Scores of depth against models from which layers were really taken, and the layers that are chosen by them."""

import gzip
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from minitron.data.blocks import Blocks
from minitron.derivation.proof import random_importance
from minitron.errors import UserError
from minitron.evaluation.multiple_choice import accuracy, read_items
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import student_config
from minitron.model.language_model import build_model, load_model
from minitron.pruning.cut import Cut
from minitron.pruning.depth import score_depth
from minitron.pruning.selection import LAYER_BLOCKS, ranked_depth, select
from minitron.recipe import DepthRecipe
from tests.conftest import MECHANISMS, byte_tokenizer

CPU = torch.device("cpu")


@pytest.fixture
def blocks() -> Blocks:
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    return Blocks(ids, torch.ones_like(ids, dtype=torch.int32))


@torch.no_grad()
def logits_without(teacher: Checkpoint, left_out: list[int], blocks: Blocks) -> Tensor:
    """Of a model that never had these layers, (blocks, tokens, vocab), in float64."""
    arch = teacher.arch
    kept = torch.tensor([i for i in range(arch.axis_size("layer")) if i not in left_out])
    counts = {f"num_{kind}_layers": [arch.layers[i] for i in kept].count(kind) for kind in arch.layer_counts}
    shorter = arch.resized(**(counts or {"num_hidden_layers": len(kept)}))
    chosen = {**select(random_importance(arch), arch, arch), "layer": kept}
    model = build_model(
        student_config(teacher, shorter, kept.tolist()), Cut(arch, shorter, chosen, teacher.tensor), CPU
    )
    return torch.cat([model(input_ids=ids[None]).logits for ids in blocks.ids]).double()


def damages(whole: Tensor, without: Tensor, blocks: Blocks) -> dict[str, float]:
    def loss(logits: Tensor) -> Tensor:
        return -logits[:, :-1].log_softmax(-1).gather(-1, blocks.ids[:, 1:, None]).mean()

    p, q = whole.log_softmax(-1), without.log_softmax(-1)
    return {
        "perplexity": float(loss(without) - loss(whole)),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "logits_mse": float((whole - without).square().sum() / whole.square().sum()),
    }


@pytest.mark.parametrize("teacher", MECHANISMS, indirect=True)
@pytest.mark.parametrize("score", ["perplexity", "kl", "logits_mse"])
def test_a_layer_left_out_is_a_layer_never_there(teacher: Checkpoint, blocks: Blocks, score: Any) -> None:
    model = load_model(teacher, CPU, torch.float32)
    found = score_depth(model, teacher.arch, blocks, recipe=DepthRecipe(score=score), removed=set())["layer"]
    whole = logits_without(teacher, [], blocks)
    kinds = teacher.arch.layers
    for i in range(teacher.arch.axis_size("layer")):
        if not kinds or kinds.count(kinds[i]) > 1:  # a model keeps one layer of each kind
            expected = damages(whole, logits_without(teacher, [i], blocks), blocks)[score]
            assert float(found[i]) == pytest.approx(expected, rel=2e-2, abs=2e-4)
    assert found.std() > 0
    torch.testing.assert_close(model(input_ids=blocks.ids[:1]).logits[0].double(), whole[0], rtol=1e-3, atol=1e-3)


def test_layers_go_one_by_one_each_time_the_one_that_is_missed_least(
    teachers: Callable[[str], Checkpoint], blocks: Blocks
) -> None:
    teacher = teachers("llama")
    recipe = DepthRecipe(score="logits_mse", removal="iterative")
    model = load_model(teacher, CPU, torch.float32)
    order = score_depth(model, teacher.arch, blocks, recipe=recipe, removed={1, 3})["layer"]
    whole, gone = logits_without(teacher, [], blocks), list[int]()
    for _ in range(3):
        trials = {i: damages(whole, logits_without(teacher, [*gone, i], blocks), blocks)["logits_mse"]
                  for i in range(4) if i not in gone}  # fmt: skip
        gone.append(min(trials, key=lambda i: trials[i]))
    assert order.argsort().tolist()[:3] == gone


def test_layers_that_are_left_are_in_the_order_of_their_last_trial(
    teachers: Callable[[str], Checkpoint], blocks: Blocks
) -> None:
    teacher = teachers("nemotron_h")
    recipe = DepthRecipe(score="logits_mse", removal="iterative")
    model = load_model(teacher, CPU, torch.float32)
    once, twice = (
        score_depth(model, teacher.arch, blocks, recipe=recipe, removed={count})["layer"] for count in (1, 2)
    )
    alone = score_depth(model, teacher.arch, blocks, recipe=DepthRecipe(score="logits_mse"), removed=set())["layer"]
    assert once.argsort().tolist() == alone.argsort().tolist()
    assert twice.argsort().tolist()[:1] == alone.argsort().tolist()[:1]
    assert [int((scores < len(alone)).sum()) for scores in (once, twice)] == [1, 2]


def test_layers_of_all_kinds_are_ranked_together(teachers: Callable[[str], Checkpoint]) -> None:
    arch = teachers("nemotron_h").arch  # Mamba, MLP, attention, experts, each twice
    names, seed = arch.depth_names[1:], torch.Generator().manual_seed(0)
    differing = 0
    for _ in range(30):
        importance = random_importance(arch) | {"layer": torch.rand(8, generator=seed, dtype=torch.float64)}
        scores = importance["layer"].tolist()
        for depth, given in ((4, {}), (5, {}), (7, {}), (6, {"num_attention_layers": 1}), (8, {})):
            # The best of all sets of layers that have every kind and the given numbers.
            of_kind = [f"num_{kind}_layers" for kind in arch.layers]
            sets = [
                chosen
                for chosen in combinations(range(8), depth)
                if {of_kind[i] for i in chosen} == set(names)
                and all([of_kind[i] for i in chosen].count(name) == count for name, count in given.items())
            ]
            best = max(sets, key=lambda chosen: sum(scores[i] for i in chosen))
            counts = ranked_depth(importance, arch, depth, given)
            assert sum(counts.values()) == depth
            shape = arch.resized(num_hidden_layers=depth, **counts)
            assert select(importance, arch, shape)["layer"].tolist() == list(best)
            within = select(importance, arch, arch.resized(num_hidden_layers=depth, **given))["layer"].tolist()
            differing += within != list(best)
    assert differing > 10
    with pytest.raises(UserError, match="one layer of each kind"):
        ranked_depth(importance, arch, 3, {})


@pytest.mark.parametrize("score", ["kl", "block_influence"])
def test_contiguous_layers_go_as_the_block_that_is_missed_least(
    teachers: Callable[[str], Checkpoint], blocks: Blocks, score: Any
) -> None:
    teacher, model = teachers("llama"), load_model(teachers("llama"), CPU, torch.float32)
    recipe = DepthRecipe(score=score, removal="contiguous")
    table = score_depth(model, teacher.arch, blocks, recipe=recipe, removed={0, 2})[LAYER_BLOCKS]
    whole, expected = logits_without(teacher, [], blocks), []
    with torch.no_grad():
        states = model(input_ids=blocks.ids, output_hidden_states=True).hidden_states
    for start in range(3):
        if score == "kl":
            expected.append(damages(whole, logits_without(teacher, [start, start + 1], blocks), blocks)["kl"])
        elif start < 2:  # the last of transformers' states is behind the final norm
            expected.append(float(1 - cosine_similarity(states[start], states[start + 2], dim=-1).mean()))
    torch.testing.assert_close(table[2, : len(expected)], torch.tensor(expected).double(), rtol=2e-2, atol=2e-4)
    assert torch.isinf(table[1]).all()
    importance = {**random_importance(teacher.arch), LAYER_BLOCKS: table}
    start = int(table[2].argmin())
    kept = select(importance, teacher.arch, teacher.arch.resized(num_hidden_layers=2))["layer"].tolist()
    assert kept == [i for i in range(4) if i not in (start, start + 1)]
    assert select(importance, teacher.arch, teacher.arch)["layer"].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="no score of blocks of 1 layers"):
        select(importance, teacher.arch, teacher.arch.resized(num_hidden_layers=3))


def test_what_has_no_answer_is_refused(teachers: Callable[[str], Checkpoint], blocks: Blocks) -> None:
    for variant, recipe, message in (
        ("nemotron_h", DepthRecipe(removal="contiguous"), "several kinds"),
        ("llama", DepthRecipe(removal="iterative"), "measured once"),
        ("llama", DepthRecipe(score="task"), "needs depth.task"),
        (
            "llama",
            DepthRecipe(score="loss"),
            "depth.score: unknown value 'loss'; accepted: block_influence, perplexity",
        ),
    ):
        model = load_model(teachers(variant), CPU, torch.float32)
        with pytest.raises(UserError, match=message):
            score_depth(model, teachers(variant).arch, blocks, recipe=recipe, removed={1})


ITEMS = [
    {"context": "abc", "choices": ["de", "fgh"], "gold": 1},
    {"sentence": "The _ was red.", "option1": "cat", "option2": "dog", "answer": "2"},
    {"text": "The last word is missing"},
]


def test_a_task_scores_layers_by_what_is_no_longer_solved(
    teachers: Callable[[str], Checkpoint], blocks: Blocks, tmp_path: Path
) -> None:
    teacher, file = teachers("llama"), tmp_path / "items.jsonl.gz"
    rows = [{"context": f"{n} and", "choices": ["one", "two", "three"], "gold": n % 3} for n in range(12)]
    with gzip.open(file, "wt") as out:
        out.write("\n".join(map(json.dumps, rows)))
    model, items = load_model(teacher, CPU, torch.float32), read_items(file)
    recipe = DepthRecipe(score="task", task=str(file))
    found = score_depth(model, teacher.arch, blocks, recipe=recipe, removed=set(), tokenizer=byte_tokenizer())["layer"]
    assert found.shape == (4,)
    whole = accuracy(model, byte_tokenizer(), items)
    assert all(-1 + whole <= float(score) <= whole for score in found)


@torch.no_grad()
def test_accuracy_is_the_share_of_likelier_continuations(teachers: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(map(json.dumps, ITEMS)), encoding="utf-8")
    items, model, tokenizer = read_items(file), load_model(teachers("llama"), CPU, torch.float32), byte_tokenizer()
    assert [(item.pairs, item.gold) for item in items] == [
        ((("abc", " de"), ("abc", " fgh")), 1),
        ((("The cat", " was red."), ("The dog", " was red.")), 1),
        ((("The last word is", " missing"),), 0),
    ]
    for item in items[:2]:
        scores = []
        for context, continuation in item.pairs:
            ids = tokenizer(context + continuation, return_tensors="pt").input_ids
            logits, n = model(input_ids=ids).logits[0].log_softmax(-1), len(tokenizer(context).input_ids)
            scores.append(float(sum(logits[t - 1, ids[0, t]] for t in range(n, ids.shape[1]))))
        right = scores.index(max(scores)) == item.gold
        assert accuracy(model, tokenizer, [item]) == float(right)
    assert accuracy(model, tokenizer, items[2:]) == 0.0  # a random model does not guess a word letter by letter


@pytest.mark.parametrize(
    "line", ["no json", "{}", '{"context": "a", "choices": ["b"], "gold": 3}', '{"sentence": "no gap"}']
)
def test_what_is_no_item_is_named_by_its_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text(json.dumps(ITEMS[0]) + "\n" + line, encoding="utf-8")
    with pytest.raises(UserError, match=r"items\.jsonl:2 is not an item"):
        read_items(file)
    assert len(read_items(file, limit=1)) == 1
    with pytest.raises(UserError, match="does not exist"):
        read_items(tmp_path / "none.jsonl")
