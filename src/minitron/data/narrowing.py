"""Narrows a model to some of its tokens: fewer rows of embeddings and output matrix, and a tokenizer cut to them.

A narrowed model gives each of its tokens the probability that the whole model gives it among these tokens, exactly: its
other tensors stay as they are. It is a stock checkpoint, which is calibrated, searched and pruned as any other. It does
not teach: what the whole model expects to be a token that is missing, it does not expect to be spelled with others. See
`data.spelling`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from minitron.data.tokens import load_tokenizer
from minitron.data.vocabulary import Vocabulary
from minitron.files import cache_folder, read_json, require_space, require_writable, whole_folder, write_json
from minitron.history import Step, record_step
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.config import student_config
from minitron.model.writing import write_checkpoint
from minitron.progress import Progress

SLOW_FILES = ("vocab*", "merges.txt", "tokenizer.model", "*.tiktoken", "added_tokens.json", "special_tokens_map.json")
"""Files of a tokenizer that `tokenizer.json` replaces, and that would still list all tokens."""
VOCAB = (("vocab",),)
"""The dimension of a tensor along the vocabulary."""


@dataclass(frozen=True)
class RowMeans:
    """The rows of a narrowed model: means of the whole model's rows, by weight."""

    first: Tensor  # (whole model's tokens,): the narrowed model's token in whose mean the row of each token is
    weights: Tensor  # (whole model's tokens,)

    def of(self, value: Tensor, dim: int, size: int) -> Tensor:
        """Return the means along a dimension, with `size` entries; a mean of no weight is 0."""
        rows, weights = value.movedim(dim, 0).float(), self.weights.float().view(-1, *[1] * (value.ndim - 1))
        totals = rows.new_zeros(size, *rows.shape[1:]).index_add_(0, self.first, rows * weights)
        shares = weights.new_zeros(size, *weights.shape[1:]).index_add_(0, self.first, weights)
        return (totals / shares.clamp_min(1e-30)).movedim(0, dim).to(value.dtype)


def narrowed(
    source: Checkpoint, kept: Sequence[int], described: Step | None = None, means: RowMeans | None = None
) -> Checkpoint:
    """Return a model narrowed to the tokens `kept`, from the cache, where it is written when it is first asked for.

    Its history records `described`, what the cut means for the text. See `write_narrowed` for `means`.

    Raises:
        UserError: the tokenizer cannot be cut, or the cache has no space.
    """
    weights = None if means is None else means.weights.tolist()
    name = sha256(f"{source.identity()} {list(kept)} {weights}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{source.folder.name}-{len(kept)}-tokens-{name}"
    require_writable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have written it
            require_space(folder, source.num_bytes)
            write_narrowed(source, kept, folder, described, means)
    return open_checkpoint(folder)


def write_narrowed(
    source: Checkpoint,
    kept: Sequence[int],
    out: Path,
    described: Step | None = None,
    means: RowMeans | None = None,
) -> None:
    """Write a model narrowed to the tokens `kept` as a Hugging Face folder at `out`; token i is `kept[i]` of `source`.

    Its rows along the vocabulary are those of these tokens, or `means`.

    Raises:
        UserError: the tokenizer cannot be cut.
    """
    arch, tokenizer = source.arch.resized(vocab_size=len(kept)), load_tokenizer(source.folder)
    cut = Vocabulary.of(tokenizer, source.arch.axis_size("vocab")).cut(kept)
    new = {old: number for number, old in enumerate(kept)}
    with whole_folder(out) as staging, Progress("cut vocabulary", arch.num_parameters, "parameters") as progress:
        config = student_config(source, arch, list(range(arch.axis_size("layer"))))
        write_checkpoint(
            staging, config, _tensors(source, torch.tensor(kept), means, progress), companions_from=source.folder
        )
        for path in [path for pattern in SLOW_FILES for path in staging.glob(pattern)]:
            path.unlink()
        cut_tokenizer(tokenizer, cut).save_pretrained(staging)
        for name in ("config.json", "generation_config.json"):
            if (path := staging / name).exists():
                write_json(path, renumbered(read_json(path), new))
        sizes = {"vocab_size": [source.arch.axis_size("vocab"), len(kept)]}
        counts = [source.arch.num_parameters, arch.num_parameters]
        step = {
            "step": "narrow",
            "of": str(source.folder),
            "sizes": sizes,
            "num_parameters": counts,
            **(described or {}),
        }
        record_step(staging, source.folder, step)


def _tensors(
    source: Checkpoint, kept: Tensor, means: RowMeans | None, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors, those along the vocabulary with the rows of the tokens that stay, or means."""
    for row, layer, expert in source.arch.places():
        name = row.tensor_name(layer, expert)
        value = source.checked_tensor(name)
        if VOCAB in row.dimensions:
            dim = row.dimensions.index(VOCAB)
            value = value.index_select(dim, kept) if means is None else means.of(value, dim, len(kept))
        yield name, value
        progress.advance(value.numel())


@contextmanager
def narrowing(model: Any, kept: Tensor) -> Iterator[None]:
    """Narrow a model in memory to the tokens `kept` while the block runs; its config stays as it is."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    whole = [(module, name, value) for module in modules for name, value in module.named_parameters(recurse=False)]
    for module, name, value in whole:
        setattr(module, name, nn.Parameter(value.detach()[kept.to(value.device)], requires_grad=False))
    try:
        yield
    finally:
        for module, name, value in whole:
            setattr(module, name, value)


def cut_tokenizer(tokenizer: Any, content: dict[str, Any]) -> Any:
    """Return a tokenizer of transformers with another `tokenizer.json`."""
    from tokenizers import Tokenizer

    cut = deepcopy(tokenizer)
    cut._tokenizer = Tokenizer.from_str(json.dumps(content))
    return cut


def stated_tokens(source: Checkpoint) -> list[int]:
    """Return the numbers of the tokens that the config and the generation config of a model name."""
    values = source.config.to_dict()
    if (path := source.folder / "generation_config.json").exists():
        values = {**values, **read_json(path)}
    return [number for name in values if _names_tokens(name) for number in _numbers(values[name])]


def renumbered(values: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return the entries of a config with the tokens that they name under their new numbers."""

    def follow(value: Any) -> Any:
        if isinstance(value, list):
            return [follow(each) for each in value]
        return new.get(value, value) if type(value) is int else value

    return {name: follow(value) if _names_tokens(name) else value for name, value in values.items()}


def _names_tokens(entry: str) -> bool:
    """Return whether an entry of a config names tokens by their numbers."""
    return entry.endswith(("_token_id", "_token_ids", "_token_index", "suppress_tokens"))


def _numbers(value: Any) -> list[int]:
    if isinstance(value, list):
        return [number for each in value for number in _numbers(each)]
    return [value] if type(value) is int and value >= 0 else []
