"""Settles the size of the vocabulary: what a cut of it costs, against the body that it makes room for.

What a cut of the vocabulary costs is measured on the teacher: held-out text is written with the tokens that stay, and
the teacher predicts it among these. In nats per token of the whole vocabulary this adds to the loss that is predicted
of the rest of a shape.
"""

import math
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from minitron.data.blocks import Blocks
from minitron.data.narrowing import cut_tokenizer, narrowing
from minitron.data.tokens import load_tokenizer
from minitron.evaluation.perplexity import measure_perplexity
from minitron.files import read_json, write_json
from minitron.model.anatomy import AXES
from minitron.nas.probes import expected_losses
from minitron.nas.shapes import Shapes
from minitron.nas.workspace import Workspace
from minitron.progress import Progress, announce
from minitron.pruning.vocabulary import TokenChoice, over_vocabulary
from minitron.session import Session

VOCAB = AXES["vocab"]
COVERAGES = (0.95, 0.97, 0.98, 0.99, 0.995)
"""The shares of the training text's tokens that the derived sizes of a vocabulary cover."""
PRICED_TOKENS = 4_096
"""Held-out tokens on which the cost of a cut is measured."""


def vocabulary_sizes(session: Session) -> tuple[int, ...]:
    """Return the sizes of the vocabulary that a search chooses from, the teacher's own among them, ascending.

    They are those of `search.space`, or with `vocabulary.trim` those that cover `COVERAGES`; without either none.

    Raises:
        UserError: the tokenizer cannot be cut.
    """
    whole, recipe = session.source.arch.axis_size("vocab"), session.recipe
    if VOCAB in recipe.search.space or not recipe.vocabulary.trim:
        return ()
    choice = TokenChoice.of(session)
    return tuple(sorted({*(size for share in COVERAGES if (size := choice.size_covering(share)) < whole), whole}))


def settle_vocabulary(workspace: Workspace, shapes: Shapes) -> tuple[Workspace, Shapes]:
    """Return the workspace over the vocabulary of the least expected loss, and the shapes that have it.

    `vocabulary.json` in the folder of the search holds what was measured. Where all shapes have the teacher's
    vocabulary, nothing is done.

    Raises:
        UserError: see `over_vocabulary`.
    """
    if VOCAB not in shapes.sizes:
        return workspace, shapes
    session, record = workspace.session, workspace.folder / "vocabulary.json"
    if not workspace.world.agree(record.exists()):
        measured = _measured(workspace, shapes)
        if workspace.world.is_main:
            write_json(record, measured)
        workspace.world.barrier()
    size = int(read_json(record)["chosen"])
    narrow = over_vocabulary(session, size)
    settled = Workspace(narrow, workspace.importance, workspace.folder, workspace.effort)
    settled.save_probe_losses(read_json(record)["probes"])
    have = shapes.at(shapes.sizes[VOCAB] == size)
    return settled, Shapes(narrow.source.arch, have.sizes, have.figures)


def _measured(workspace: Workspace, shapes: Shapes) -> dict[str, Any]:
    """Return what every vocabulary costs, what is expected of the best shape with it, and the size of the least sum."""
    whole = Workspace(workspace.session, workspace.importance, workspace.folder / "whole", workspace.effort)
    sizes = np.unique(shapes.sizes[VOCAB]).tolist()
    costs = whole.world.gather(prices(whole.session, sizes) if whole.world.is_main else {})[0]
    expected = expected_losses(whole, shapes)
    losses = {size: float(expected[shapes.sizes[VOCAB] == size].min()) for size in sizes}
    chosen = min(sizes, key=lambda size: losses[size] + costs[size])
    found = {"chosen": chosen, "costs": costs, "expected": losses, "probes": whole.probe_losses}
    announce(
        f"vocabulary of {chosen:,} tokens, for {costs[chosen]:.3f} nats; {losses[chosen]:.3f} for the rest of the shape"
    )
    whole.world.barrier()
    if whole.world.is_main:
        shutil.rmtree(whole.folder, ignore_errors=True)
    return found


def prices(session: Session, sizes: Sequence[int]) -> dict[int, float]:
    """Return what the teacher loses over each size of its vocabulary, in nats per token of the whole vocabulary."""
    source, choice = session.source, TokenChoice.of(session)
    tokenizer, whole = load_tokenizer(source.folder), source.arch.axis_size("vocab")
    half = max(1, session.context // 2)  # text that is written with fewer tokens is longer
    blocks = session.splits.heldout[: max(1, PRICED_TOKENS // session.context)]
    texts = [tokenizer.decode(part.tolist()) for ids in blocks.ids for part in ids.split(half)]
    losses: dict[int, float] = {}
    with session.source_model() as model, Progress("price vocabulary", len({*sizes, whole}), "sizes") as progress:
        for size in {*sizes, whole}:
            kept = choice.kept(size) if size < whole else list(range(whole))
            cut = cut_tokenizer(tokenizer, choice.vocabulary.cut(kept)) if size < whole else tokenizer
            with narrowing(model, torch.tensor(kept)):
                losses[size] = sum(_nats(model, cut, text) for text in texts)
            progress.advance(1)
    num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    return {size: (losses[size] - losses[whole]) / num_tokens for size in sizes}


def _nats(model: Any, tokenizer: Any, text: str) -> float:
    """Return the negative log-likelihood of a text, its first token predicted from a token that begins texts."""
    begins = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [begins or 0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    if len(ids) < 2:
        return 0.0
    found = measure_perplexity(model, Blocks(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int32)))
    return math.log(found.perplexity) * found.num_tokens
