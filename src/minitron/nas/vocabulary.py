"""Settles the size of the vocabulary: what a cut of it costs, against the body that it makes room for.

What a cut of the vocabulary costs is measured on the teacher: held-out text is written with the tokens that stay, and
the teacher predicts it among these. Training makes up for most of that, since it teaches how words are spelled; so one
size is trained as the probes of other axes are, and the costs of all sizes are scaled by what is left of its cost. In
nats per token of the whole vocabulary they add to the loss that is predicted of the rest of a shape.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from minitron.data.blocks import Blocks
from minitron.data.narrowing import cut_tokenizer, narrowing
from minitron.data.tokens import load_tokenizer
from minitron.evaluation.perplexity import measure_perplexity
from minitron.files import read_json, write_json
from minitron.model.anatomy import AXES
from minitron.nas.probes import WHOLE, expected_losses, probe_training
from minitron.nas.shapes import Shapes
from minitron.nas.trial import train
from minitron.nas.workspace import Workspace
from minitron.progress import Progress, announce
from minitron.pruning.vocabulary import TokenChoice, coverage, over_vocabulary
from minitron.runtime import World
from minitron.session import Session

VOCAB = AXES["vocab"]
COVERAGES = (0.95, 0.97, 0.98, 0.99, 0.995)
"""The shares of the training text's tokens that the derived sizes of a vocabulary cover."""
PRICED_TOKENS = 4_096
"""Held-out tokens on which the cost of a cut is measured."""


def vocabulary_sizes(session: Session) -> tuple[int, ...]:
    """Return the sizes of the vocabulary that a search chooses from, the teacher's own among them, ascending.

    They are those of `search.space`, or with `vocabulary.trim` those that cover `COVERAGES` of the training text and
    `vocabulary.least_coverage` of held-out text; without either none.

    Raises:
        UserError: the tokenizer cannot be cut.
    """
    whole, recipe = session.source.arch.axis_size("vocab"), session.recipe
    if VOCAB in recipe.search.space or not recipe.vocabulary.trim:
        return ()
    choice, heldout = TokenChoice.of(session), session.splits.heldout
    smaller = {size for share in COVERAGES if (size := choice.size_covering(share)) < whole}
    enough = {size for size in smaller if coverage(heldout, choice.kept(size)) >= recipe.vocabulary.least_coverage}
    return tuple(sorted({*enough, whole}))


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
    session = _with_states_of_its_own(workspace.session)
    whole = Workspace(session, workspace.importance, workspace.folder / "whole", workspace.effort)
    sizes = np.unique(shapes.sizes[VOCAB]).tolist()
    expected = expected_losses(whole, shapes)
    costs: dict[int, float] = {}
    if whole.world.is_main:
        with whole.timed("vocabulary"):
            untrained = prices(session, sizes)
            left = _share_left(whole, untrained)
            costs = {size: cost * left for size, cost in untrained.items()}
    costs = whole.world.gather(costs)[0]
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


def _with_states_of_its_own(session: Session) -> Session:
    """Return a session that stores the teacher's outputs in the search alone: other tokens may be trained on later."""
    distill = session.recipe.distill.model_copy(update={"teacher_states": None})
    own = Session(session.recipe.model_copy(update={"distill": distill}), session.larger)
    own.runtime, own.teacher, own.source = session.runtime, session.teacher, session.source
    return own


def _share_left(whole: Workspace, untrained: dict[int, float]) -> float:
    """Return the share of what a cut costs that is left after the training of a probe, 1 without such trainings.

    The probe is the teacher over a middle size of its vocabulary, and nothing else cut. What its training does by
    itself is subtracted, as from the other probes.
    """
    session, tokens = whole.session, whole.effort.probe_tokens
    cut = sorted(size for size in untrained if size < session.source.arch.axis_size("vocab"))
    size = cut[len(cut) // 2] if cut else 0
    if not tokens or not cut or untrained[size] <= 0:
        return 1.0
    alone = over_vocabulary(session, size)
    alone.runtime = replace(session.runtime, world=World())  # the other processes wait
    narrow = Workspace(alone, whole.importance, whole.folder / "narrow", whole.effort)
    folder = narrow.work / "probe"
    shutil.rmtree(folder, ignore_errors=True)  # of a search that was interrupted here
    folder.mkdir(parents=True)
    (folder / "pruned").symlink_to(alone.source.folder)
    recipe = probe_training(session.recipe.distill, tokens, session.context)
    student = train(narrow, folder, recipe, until=None, label="probe of vocab_size")
    blocks = alone.splits.heldout[: max(1, PRICED_TOKENS // session.context)]
    assert blocks.whole is not None
    with session.teacher_model() as teacher:
        before = measure_perplexity(teacher, blocks.whole.blocks)
    after = measure_perplexity(student, blocks)
    per_token = math.log(before.perplexity) / before.bits_per_byte  # nats per token for a bit per byte
    cost = (after.bits_per_byte - before.bits_per_byte) * per_token - whole.probe_losses.get(WHOLE, 0.0)
    return min(1.0, max(0.0, cost / untrained[size]))


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
