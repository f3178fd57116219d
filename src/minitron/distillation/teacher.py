"""Teacher outputs on blocks of text: computed whenever a block is trained on, or computed once and read from files.

Stored outputs are last hidden states, hidden × 2 bytes per token, from which the loss makes the exact logits over the
whole vocabulary; or, smaller where hidden is large, the likeliest tokens with one class for all others.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from safetensors.torch import save_file
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.data.spelling import Pieces
from minitron.distillation.fused import States, TeacherOutputs, TopTokens
from minitron.distillation.losses import classes_of_
from minitron.distillation.parameters import choose_parameters
from minitron.distillation.spelled import SpelledStates, spelled_states
from minitron.errors import UserError
from minitron.evaluation.perplexity import next_token_nll
from minitron.files import read_json, require_space, require_writable, whole_file, write_json
from minitron.model.arch import Arch
from minitron.model.language_model import Head, Headless, Readout
from minitron.model.weights import open_safetensors
from minitron.progress import Progress
from minitron.recipe import CorrectionRecipe, DistillRecipe
from minitron.runtime import World

SHARD_BYTES = 2**26
CHUNK_TOKENS = 256
STORED_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

Teacher = Callable[[Tensor, Tensor, Tensor | None], TeacherOutputs]
"""Returns the teacher outputs for token ids (B, T), the numbers of these blocks among the training blocks (B,), and
their `Blocks.positions`."""


class Live:
    """A teacher in memory, which runs over every block when the block is trained on."""

    def __init__(self, model: nn.Module) -> None:
        self.headless = Headless(model.requires_grad_(False))
        self.arch = Arch.from_config(self.headless.model.config.to_dict())  # type: ignore[operator,union-attr]

    @torch.no_grad()
    def __call__(self, ids: Tensor, numbers: Tensor, positions: Tensor | None = None) -> States:
        """Return the last hidden states."""
        states: States = self.headless(ids, States, positions)
        return states


class SpelledLive(Live):
    """A teacher in memory that reads training blocks with its own tokens."""

    def __init__(self, model: nn.Module, blocks: Blocks, pieces: Pieces) -> None:
        super().__init__(model)
        self.blocks, self.pieces = blocks, pieces

    @torch.no_grad()
    def __call__(self, ids: Tensor, numbers: Tensor, positions: Tensor | None = None) -> SpelledStates:
        """Return the last hidden states at the positions of the student's `ids`."""
        whole = self.blocks[numbers].whole
        assert whole is not None
        places = whole.blocks.positions
        places = None if places is None else places.to(ids.device)
        return spelled_states(super().__call__(whole.blocks.ids.to(ids.device), numbers, places), whole, self.pieces)


class Learning(Live):
    """A teacher that learns from the text itself while it teaches (arXiv 2408.11796, section 2)."""

    def __init__(self, model: nn.Module, recipe: CorrectionRecipe, seed: int) -> None:
        super().__init__(model)
        model.requires_grad_(True)
        choose_parameters(model, self.arch, recipe, seed)

    def learn(self, ids: Tensor, positions: Tensor | None, targets: Tensor) -> tuple[States, Tensor]:
        """Return the last hidden states, and the sum of the cross-entropy with `targets` (B, T), for its gradient."""

        def readout(hidden: Tensor, head: Head) -> tuple[States, Tensor]:
            states = States(hidden.detach(), Head(head.weight.detach(), head.softcap))
            return states, next_token_nll(hidden, head, targets)

        result: tuple[States, Tensor] = self.headless(ids, readout, positions)
        return result


@dataclass(frozen=True)
class Source:
    """The teacher whose outputs are stored."""

    identity: dict[str, str]
    """Entries that tell this teacher, text and dtype from others."""
    model: Callable[[], AbstractContextManager[nn.Module]]
    """Holds the model in memory; used only if outputs are missing."""
    head: Head
    pieces: Pieces | None = None
    """How the student writes the teacher's tokens, where it has fewer."""


def stored(folder: Path, source: Source, blocks: Blocks, recipe: DistillRecipe, world: World) -> Teacher:
    """Return a teacher whose outputs on the blocks are read from `folder`; outputs that are missing are written first.

    The folder holds `states.json`, which names teacher, text and dtype, and shards of some blocks each, complete or
    absent, with their checksum. Ranks share the work.

    Raises:
        UserError: the folder holds another teacher's outputs or something else, cannot be written, or has no space.
    """
    record = source.identity | {"context": str(blocks.context), "num_blocks": str(len(blocks))} | _kind(recipe)
    per_block = blocks.context * recipe.stored_bytes(source.head.weight.shape[1])
    shards = _Shards(folder, blocks, max(1, SHARD_BYTES // per_block), recipe, source)
    if world.is_main:
        require_space(folder, shards.num_missing * per_block)
        _claim(folder, record)
    world.barrier()
    if num_missing := shards.num_missing:
        with Progress(
            "store teacher", blocks.num_tokens, done=(len(blocks) - num_missing) * blocks.context
        ) as progress:
            progress.note(f"{decimal(len(blocks) * per_block)} in {folder}")
            with source.model() as loaded:
                teacher = Headless(loaded)
                for shard in shards.numbers[world.rank :: world.size]:
                    if not shards.path(shard).exists():
                        shards.write(shard, teacher, lambda: progress.advance(blocks.context * world.size))
    world.barrier()
    return shards


def numbered(teacher: Teacher, numbers: Tensor) -> Teacher:
    """Return a teacher of some training blocks, (n,), whose outputs are stored in the order of their numbers."""
    places = {int(number): place for place, number in enumerate(numbers)}

    def outputs(ids: Tensor, asked: Tensor, positions: Tensor | None = None) -> TeacherOutputs:
        return teacher(ids, torch.tensor([places[int(number)] for number in asked]), positions)

    return outputs


@dataclass
class _Shards:
    """The shards of a folder, read block by block."""

    folder: Path
    blocks: Blocks
    blocks_per_shard: int
    recipe: DistillRecipe
    source: Source
    opened: dict[int, Any] = field(default_factory=dict)

    def __call__(self, ids: Tensor, numbers: Tensor, _: Tensor | None = None) -> TeacherOutputs:
        rows = [self._block(int(number)) for number in numbers]
        tensors = {name: torch.cat([row[name] for row in rows]).to(ids.device) for name in rows[0]}
        if self.recipe.stored == "top_k":
            return TopTokens(tensors["indices"], tensors["classes"], len(self.source.head.weight))
        states = States(tensors["hidden"], self.source.head)
        return states if self.source.pieces is None else self._spelled(states, numbers)

    def _spelled(self, states: States, numbers: Tensor) -> States:
        whole = self.blocks[numbers].whole
        assert whole is not None
        assert self.source.pieces is not None
        return spelled_states(states, whole, self.source.pieces)

    def path(self, shard: int) -> Path:
        return self.folder / f"states-{shard:05}.safetensors"

    @property
    def numbers(self) -> range:
        """The numbers of all shards."""
        return range(-(-len(self.blocks) // self.blocks_per_shard))

    @property
    def num_missing(self) -> int:
        """The number of blocks whose shard is missing."""
        return sum(len(self.blocks_of(shard)) for shard in self.numbers if not self.path(shard).exists())

    def blocks_of(self, shard: int) -> range:
        """Return the numbers of a shard's blocks."""
        first = shard * self.blocks_per_shard
        return range(first, min(first + self.blocks_per_shard, len(self.blocks)))

    @torch.no_grad()
    def write(self, shard: int, teacher: Headless, advance: Callable[[], None]) -> None:
        """Run the teacher over a shard's blocks, one at a time."""
        blocks = self.blocks if self.blocks.whole is None else self.blocks.whole.blocks
        device, rows = next(teacher.parameters()).device, []
        readout: Readout = self._classes if self.recipe.stored == "top_k" else self._hidden
        for number in self.blocks_of(shard):
            block = blocks[number : number + 1]
            positions = None if (places := block.positions) is None else places.to(device)
            rows.append(teacher(block.ids.to(device), readout, positions))
            advance()
        tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        with whole_file(self.path(shard)) as staging:
            save_file(tensors, staging, metadata={"sha256": _checksum(tensors)})

    def _hidden(self, hidden: Tensor, _: Head) -> dict[str, Tensor]:
        return {"hidden": hidden.to("cpu", STORED_DTYPES[self.recipe.stored_dtype])}

    def _classes(self, hidden: Tensor, head: Head) -> dict[str, Tensor]:
        assert self.recipe.top_k is not None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        states, num_tokens = States(hidden, head).prepared(len(head.weight), dtype, dtype), hidden.shape[:-1].numel()
        parts = [
            classes_of_(
                states.rows(slice(start, start + CHUNK_TOKENS), self.recipe.temperature)(slice(None)), self.recipe.top_k
            )
            for start in range(0, num_tokens, CHUNK_TOKENS)
        ]
        indices, classes = (torch.cat(each).view(*hidden.shape[:-1], -1) for each in zip(*parts, strict=True))
        return {"indices": indices.to("cpu", torch.int32), "classes": classes.to("cpu", torch.float32)}

    def _block(self, number: int) -> dict[str, Tensor]:
        shard = number // self.blocks_per_shard
        if shard not in self.opened:
            file = open_safetensors(self.path(shard))
            names = list(file.keys())
            if (file.metadata() or {}).get("sha256") != _checksum({name: file.get_tensor(name) for name in names}):
                raise UserError(f"{self.path(shard)} is damaged: remove it, and it will be written again")
            self.opened[shard] = {name: file.get_slice(name) for name in names}
        row = number - self.blocks_of(shard).start
        return {name: part[row : row + 1] for name, part in self.opened[shard].items()}


def require_states_folder(folder: Path) -> None:
    """Check that a folder may hold stored teacher outputs, or holds some: it is new, empty or has their record.

    Raises:
        UserError: it holds something else.
    """
    if (folder / "states.json").exists() or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UserError(f"{folder} exists and holds no states.json: name another folder for the teacher's states")


def _claim(folder: Path, record: dict[str, str]) -> None:
    """Write the record of a new folder, or check that the folder has this record."""
    mark = folder / "states.json"
    if not mark.exists():
        require_states_folder(folder)
        require_writable(folder)
        write_json(mark, record)
    existing = read_json(mark)
    if existing != record:
        names = [name for name in record if not isinstance(existing, dict) or existing.get(name) != record[name]]
        raise UserError(f"{folder} holds states of another {' and '.join(names)}: name another folder, or remove it")


def _kind(recipe: DistillRecipe) -> dict[str, str]:
    if recipe.stored == "top_k":
        return {"stored": f"top {recipe.top_k} at temperature {recipe.temperature}"}
    return {"stored": f"hidden states in {recipe.stored_dtype}"}


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
