"""Which layers a model can do without: what happens to it when some are left out.

Every score is of the whole model in memory, with the layers in question passed over.
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
from minitron.evaluation.multiple_choice import accuracy, read_items
from minitron.evaluation.perplexity import next_token_nll
from minitron.model.arch import Arch
from minitron.model.language_model import Head, Headless, entering, leaving
from minitron.progress import Progress
from minitron.pruning.importance import LAYER_BLOCKS, Importance
from minitron.recipe import DepthRecipe

CHUNK_TOKENS = 256

Damage = Callable[[], float]
"""How far the model, as it now stands, is from the whole one; higher is worse."""


@torch.no_grad()
def score_depth(
    model: nn.Module, arch: Arch, blocks: Blocks, recipe: DepthRecipe, removed: set[int], tokenizer: Any
) -> Importance:
    """The importance of layers by the recipe's score and way of removal.

    The damage is the rise in loss, the KL to the whole model's distribution, the squared error of the logits as a
    share of their squares, or the fall in a task's accuracy. By way of removal:

    - `one_shot`: `layer`, (num_layers,), the damage of leaving each one out alone (Minitron, arXiv 2407.14679,
      section 2.2);
    - `iterative`: `layer`, the order in which they go when the one that does least damage goes first and the
      others are scored anew (Nemotron Nano 2, arXiv 2508.14444, section 4; normalised as in Nemotron Elastic,
      arXiv 2511.16664), as far as the largest of the numbers in `removed`;
    - `contiguous`: `layer_blocks`, (num_layers + 1, num_layers), the damage of leaving out n layers from s on, for
      every n in `removed`, infinite elsewhere (Minitron in practice, arXiv 2408.11796, section 2).

    Raises:
        UserError: contiguous layers of a model whose layers are of several kinds, or a task without its file.
    """
    if recipe.removal == "contiguous" and arch.layer_counts:
        raise UserError(f"the layers of a {arch.model_type} are of several kinds: they are not removed as one block")
    depth, deepest, removed = arch.axis_size("layer"), max(removed, default=0), removed - {0}
    if recipe.score == "block_influence":
        if recipe.removal == "iterative":
            raise UserError("block influence is measured once: depth.removal iterative needs another depth.score")
        return {LAYER_BLOCKS: _influence_of_blocks(model, arch, blocks, removed)}
    spans = [(start, count) for count in sorted(removed) for start in range(depth - count + 1)]
    trials = {"one_shot": depth, "iterative": sum(depth - n for n in range(deepest)), "contiguous": len(spans)}
    with Passable(model, arch) as layers, Progress("depth", trials[recipe.removal], "trials") as progress:
        damage = _damage(model, blocks, recipe, tokenizer)
        whole = damage()

        def without(left_out: list[int]) -> float:
            with layers.without(left_out):
                found = damage() - whole
            progress.advance(1)
            return found

        if recipe.removal == "one_shot":
            return {"layer": torch.tensor([without([i]) for i in range(depth)], dtype=torch.float64)}
        if recipe.removal == "iterative":
            return {"layer": _order_of_removal(depth, deepest, without)}
        table = torch.full((depth + 1, depth), torch.inf, dtype=torch.float64)
        table[0] = 0.0
        for start, count in spans:
            table[count, start] = without(list(range(start, start + count)))
        return {LAYER_BLOCKS: table}


def _influence_of_blocks(model: nn.Module, arch: Arch, blocks: Blocks, removed: set[int]) -> Tensor:
    """`layer_blocks` of 1 − cos(stream before the block, stream behind it), mean over tokens, from one pass."""
    depth, device = arch.axis_size("layer"), next(model.parameters()).device
    layers = [model.get_submodule(arch.family.layer.replace("{i}", str(i))) for i in range(depth)]
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
    """When each layer goes, counted from 0; those that stay are above all that go."""
    gone: list[int] = []
    for _ in range(deepest):
        trials = {i: without([*gone, i]) for i in range(depth) if i not in gone}
        gone.append(min(trials, key=trials.__getitem__))
    order = torch.full((depth,), float(depth), dtype=torch.float64)
    order[gone] = torch.arange(len(gone), dtype=torch.float64)
    return order


class Passable:
    """A model any of whose layers can be passed over for a while, as a context manager."""

    def __init__(self, model: nn.Module, arch: Arch) -> None:
        stack = model.get_submodule(arch.family.layer.removesuffix(".{i}"))
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
    def without(self, left_out: list[int]) -> Iterator[None]:
        """Pass over these layers."""
        layers: list[Any] = list(self.stack)
        for i in left_out:
            layers[i].is_passed_over = True
        yield
        for i in left_out:
            layers[i].is_passed_over = False


class _Layer(nn.Module):
    """A layer, or nothing in its place; what a model asks a layer about itself is answered by the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.is_passed_over, self.gives_tuple = layer, False, False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_passed_over:
            output = self.layer(*args, **kwargs)
            self.gives_tuple = isinstance(output, tuple)
            return output
        stream = entering(args, kwargs)[0]
        return (stream, None) if self.gives_tuple else stream


def _damage(model: nn.Module, blocks: Blocks, recipe: DepthRecipe, tokenizer: Any) -> Damage:
    """The score of the recipe, with what it needs of the whole model remembered."""
    headless, device = Headless(model), next(model.parameters()).device
    parts, targets = blocks.ids.to(device).split(1), blocks.targets.to(device).split(1)
    if recipe.score == "task":
        if recipe.task is None:
            raise UserError("depth.score task needs depth.task, a jsonl file of items")
        items = read_items(Path(recipe.task), recipe.items)
        return lambda: -accuracy(model, tokenizer, items)
    if recipe.score == "perplexity":
        num_predicted = max(1, int((blocks.targets >= 0).sum()))
        return lambda: (
            sum(
                float(headless(ids, partial(next_token_nll, targets=of)))
                for ids, of in zip(parts, targets, strict=True)
            )
            / num_predicted
        )

    def states(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
        return hidden, head

    reference = [headless(ids, states)[0] for ids in parts]
    compare = _kl if recipe.score == "kl" else _squared_error

    def difference(hidden: Tensor, head: Head, whole: Tensor) -> float:
        return sum(
            compare(head.logits(part), head.logits(of_whole))
            for part, of_whole in zip(hidden[0].split(CHUNK_TOKENS), whole[0].split(CHUNK_TOKENS), strict=True)
        )

    def total_difference() -> float:
        total = sum(headless(ids, partial(difference, whole=w)) for ids, w in zip(parts, reference, strict=True))
        return float(total)

    if recipe.score == "kl":
        return lambda: total_difference() / blocks.num_tokens
    squares = sum(
        float(head.logits(part).square().sum())
        for ids in parts
        for hidden, head in [headless(ids, states)]
        for part in hidden[0].split(CHUNK_TOKENS)
    )
    return lambda: total_difference() / squares


def _kl(logits: Tensor, of_whole: Tensor) -> float:
    p, q = of_whole.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return float((p.exp() * (p - q)).sum())


def _squared_error(logits: Tensor, of_whole: Tensor) -> float:
    return float((logits - of_whole).square().sum())
