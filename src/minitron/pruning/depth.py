"""Scores layers by the damage that their removal does.

Every score is measured on the whole model in memory, with the removed layers passed over.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.evaluation.multiple_choice import Item, accuracy, read_items
from minitron.evaluation.perplexity import next_token_nll
from minitron.model.arch import Arch
from minitron.model.language_model import Head, Headless, entering, leaving
from minitron.progress import Progress
from minitron.pruning.scores import Importance
from minitron.pruning.selection import LAYER_BLOCKS
from minitron.recipe import DepthRecipe

CHUNK_TOKENS = 256

Damage = Callable[[], float]
"""Measures how far the model, with some layers passed over, is from the whole model; higher is worse."""


@torch.no_grad()
def score_depth(
    model: nn.Module, arch: Arch, blocks: Blocks, *, recipe: DepthRecipe, removed: set[int], tokenizer: Any = None
) -> Importance:
    """Return the importance of layers by the recipe's score and way of removal.

    The damage is the rise in loss (`perplexity`), the KL from the whole model's distribution (`kl`), the squared error
    of the logits as a share of their squares (`logits_mse`), or the fall in a task's accuracy (`task`, which needs the
    tokenizer). Ways of removal:

    - `one_shot`: `layer`, (num_layers,), the damage of removing each layer alone (Minitron, arXiv 2407.14679,
      section 2.2);
    - `iterative`: `layer`, (num_layers,), the order of removal when the layer that does least damage is removed first
      and the others are scored again (Nemotron Nano 2, arXiv 2508.14444, section 4; normalised as in Nemotron
      Elastic, arXiv 2511.16664), up to the largest number in `removed`; the layers that are left then are above these,
      in the order of their damage in the last trial;
    - `contiguous`: `layer_blocks`, (num_layers + 1, num_layers), at [n, s] the damage of removing n layers from layer
      s on, for every n in `removed`, infinite elsewhere (Minitron in practice, arXiv 2408.11796, section 2).

    Raises:
        UserError: the score does not exist, `contiguous` removal of layers of several kinds, `iterative` removal by
            block influence, or a task without its file.
    """
    require_depth_score(recipe)
    require_removable(arch, recipe)
    depth, deepest, removed = arch.axis_size("layer"), max(removed, default=0), removed - {0}
    if recipe.score == "block_influence":
        return {LAYER_BLOCKS: _influence_of_blocks(model, arch, blocks, removed)}
    spans = [(start, count) for count in sorted(removed) for start in range(depth - count + 1)]
    trials = {"one_shot": depth, "iterative": sum(depth - n for n in range(deepest)), "contiguous": len(spans)}
    with Passable(model, arch) as layers, Progress("depth", trials[recipe.removal], "trials") as progress:
        damage = DAMAGES[recipe.score](model, blocks, recipe, tokenizer)
        whole = damage()

        def without(numbers: list[int]) -> float:
            with layers.without(numbers):
                rise = damage() - whole
            progress.advance(1)
            return rise

        if recipe.removal == "one_shot":
            return {"layer": torch.tensor([without([i]) for i in range(depth)], dtype=torch.float64)}
        if recipe.removal == "iterative":
            return {"layer": _order_of_removal(depth, deepest, without)}
        table = torch.full((depth + 1, depth), torch.inf, dtype=torch.float64)
        table[0] = 0.0
        for start, count in spans:
            table[count, start] = without(list(range(start, start + count)))
        return {LAYER_BLOCKS: table}


def require_depth_score(recipe: DepthRecipe) -> None:
    """Check that the score of depth that a recipe names exists, suits its removal, and has its file.

    Raises:
        UserError: it does not; the message lists the scores that exist, or says what is missing.
    """
    accepted = ["block_influence", *DAMAGES]
    if recipe.score not in accepted:
        raise UserError(f"depth.score: unknown value '{recipe.score}'; accepted: {', '.join(accepted)}")
    if recipe.score == "block_influence" and recipe.removal == "iterative":
        raise UserError("block influence is measured once: depth.removal iterative needs another depth.score")
    if recipe.score == "task":
        _items(recipe)


def require_removable(arch: Arch, recipe: DepthRecipe) -> None:
    """Check that layers of a model can be removed as a recipe says.

    Raises:
        UserError: they are of several kinds, and the recipe removes them as one block.
    """
    if recipe.removal == "contiguous" and arch.layer_counts:
        raise UserError(f"the layers of a {arch.model_type} are of several kinds: they cannot be removed as one block")


def _influence_of_blocks(model: nn.Module, arch: Arch, blocks: Blocks, removed: set[int]) -> Tensor:
    """Return `layer_blocks` of 1 − cos(stream before the block, stream after it), mean over tokens, from one pass."""
    depth, device = arch.axis_size("layer"), next(model.parameters()).device
    layers = [model.get_submodule(arch.family.layer_module(i)) for i in range(depth)]
    streams: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        streams.append(entering(args, kwargs)[0].float())

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        streams.append(leaving(output).float())

    handles = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(leave))
    table = torch.full((depth + 1, depth), torch.inf, dtype=torch.float64)
    with Progress("depth", blocks.num_tokens) as progress:
        for count in {0, *removed}:
            table[count, : depth - count + 1] = 0.0
        for ids in blocks.ids.split(1):
            streams.clear()
            Headless(model)(ids.to(device), lambda hidden, head: None)
            for count in removed:
                for start in range(depth - count + 1):
                    cosine = nn.functional.cosine_similarity(streams[start], streams[start + count], dim=-1)
                    table[count, start] += float((1 - cosine).sum()) / blocks.num_tokens
            progress.advance(ids.numel())
    for handle in handles:
        handle.remove()
    return table


def _order_of_removal(depth: int, deepest: int, without: Callable[[list[int]], float]) -> Tensor:
    """Return each layer's place in the order of removal, counted from 0; those that are left are from `depth` up.

    Of the layers that are left, the one with the most damage in the last trial is highest.
    """
    removed: list[int] = []
    damages: dict[int, float] = {}
    for _ in range(deepest):
        damages = {i: without([*removed, i]) for i in range(depth) if i not in removed}
        removed.append(min(damages, key=damages.__getitem__))
    order = torch.full((depth,), float(depth), dtype=torch.float64)
    order[removed] = torch.arange(len(removed), dtype=torch.float64)
    left = sorted(damages.keys() - set(removed), key=damages.__getitem__)
    order[left] += torch.arange(len(left), dtype=torch.float64) / depth
    return order


class Passable:
    """A model whose layers can be passed over while a block runs; itself a context manager."""

    def __init__(self, model: nn.Module, arch: Arch) -> None:
        stack = model.get_submodule(arch.family.layer_list)
        assert isinstance(stack, nn.ModuleList)
        self.stack, self.whole = stack, list(stack)

    def __enter__(self) -> "Passable":
        for i, layer in enumerate(self.whole):
            self.stack[i] = _Layer(layer)
        return self

    def __exit__(self, *_: object) -> None:
        for i, layer in enumerate(self.whole):
            self.stack[i] = layer

    @contextmanager
    def without(self, numbers: list[int]) -> Iterator[None]:
        """Pass over the layers of these numbers while the block runs."""
        layers: list[Any] = list(self.stack)
        for i in numbers:
            layers[i].is_passed_over = True
        yield
        for i in numbers:
            layers[i].is_passed_over = False


class _Layer(nn.Module):
    """A layer that can be passed over; its attributes are those of the layer that it wraps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.is_passed_over, self.returns_tuple = layer, False, False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_passed_over:
            output = self.layer(*args, **kwargs)
            self.returns_tuple = isinstance(output, tuple)
            return output
        stream = entering(args, kwargs)[0]
        return (stream, None) if self.returns_tuple else stream


def _loss(model: nn.Module, blocks: Blocks, *_: Any) -> Damage:
    headless, device = Headless(model), next(model.parameters()).device
    batches = list(zip(blocks.ids.to(device).split(1), blocks.targets.to(device).split(1), strict=True))
    blocks.require_targets("calibration.depth.tokens")
    num_predicted = int((blocks.targets >= 0).sum())
    return lambda: (
        sum(float(headless(ids, partial(next_token_nll, targets=targets))) for ids, targets in batches) / num_predicted
    )


def _kl(model: nn.Module, blocks: Blocks, *_: Any) -> Damage:
    whole = _Whole(model, blocks)
    return lambda: whole.difference(_kl_of_logits) / blocks.num_tokens


def _logits_mse(model: nn.Module, blocks: Blocks, *_: Any) -> Damage:
    whole = _Whole(model, blocks)
    squares = whole.squares()
    return lambda: whole.difference(_squared_error) / squares


def _task(model: nn.Module, _: Blocks, recipe: DepthRecipe, tokenizer: Any) -> Damage:
    items = _items(recipe)
    return lambda: -accuracy(model, tokenizer, items)


def _items(recipe: DepthRecipe) -> list[Item]:
    if recipe.task is None:
        raise UserError("depth.score task needs depth.task, a jsonl file of items")
    return read_items(Path(recipe.task), recipe.items)


DAMAGES: dict[str, Callable[[nn.Module, Blocks, DepthRecipe, Any], Damage]] = {
    "perplexity": _loss,
    "kl": _kl,
    "logits_mse": _logits_mse,
    "task": _task,
}
"""The scores of depth by the values of `depth.score`; block influence is measured by `calibrate` instead.

Each takes the whole model, blocks, the recipe and a tokenizer."""


class _Whole:
    """The last hidden states of the whole model on some blocks, to compare with what the model becomes."""

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self.headless = Headless(model)
        self.ids = blocks.ids.to(next(model.parameters()).device).split(1)
        self.states = [self.headless(ids, _states_and_head)[0] for ids in self.ids]

    def difference(self, compare: Callable[[Tensor, Tensor], float]) -> float:
        """Return the sum over tokens of `compare(logits of the model as it is, logits of the whole model)`."""

        def of_block(hidden: Tensor, head: Head, whole: Tensor) -> float:
            parts = zip(hidden[0].split(CHUNK_TOKENS), whole[0].split(CHUNK_TOKENS), strict=True)
            return sum(compare(head.logits(part), head.logits(whole_part)) for part, whole_part in parts)

        blocks = zip(self.ids, self.states, strict=True)
        return float(sum(self.headless(ids, partial(of_block, whole=whole)) for ids, whole in blocks))

    def squares(self) -> float:
        """Return the sum of the squared logits of the whole model."""
        return sum(
            float(head.logits(part).square().sum())
            for ids in self.ids
            for hidden, head in [self.headless(ids, _states_and_head)]
            for part in hidden[0].split(CHUNK_TOKENS)
        )


def _states_and_head(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    return hidden, head


def _kl_of_logits(logits: Tensor, whole: Tensor) -> float:
    p, q = whole.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return float((p.exp() * (p - q)).sum())


def _squared_error(logits: Tensor, whole: Tensor) -> float:
    return float((logits - whole).square().sum())
