"""Measures how far cut, untrained candidates are from the teacher."""

import torch
from torch import nn

from minitron.data.blocks import Blocks
from minitron.distillation.fused import logit_loss
from minitron.distillation.losses import forward_kl_
from minitron.distillation.teacher import Teacher
from minitron.model.arch import Arch
from minitron.model.language_model import Headless
from minitron.nas.candidates import Candidate
from minitron.nas.sorted_teacher import SortedTeacher, deciding_sizes, sort_teacher
from minitron.nas.workspace import Workspace
from minitron.progress import Progress


def compare_untrained(workspace: Workspace, candidates: list[Candidate]) -> None:
    """Fill in the `zero_shot_kl` of candidates that have none, one sorted teacher after the other.

    Where there are no more candidates than places on the short list, there is nothing to choose and nothing is done.
    """
    if len(candidates) <= workspace.effort.shortlist:
        return
    missing = [candidate.number for candidate in candidates if candidate.zero_shot_kl is None]
    if not missing:
        return
    zero_shot = ZeroShot(workspace)
    missing.sort(key=lambda number: zero_shot.key(candidates[number].arch))
    with (
        Progress("zero-shot", len(candidates), "candidates", done=len(candidates) - len(missing)) as progress,
        workspace.timed("zero_shot"),
    ):
        for results in workspace.world.map_in_rounds(lambda number: zero_shot(candidates[number].arch), missing):
            for number, kl in results:
                candidates[number].zero_shot_kl = kl
            workspace.save(candidates)
            progress.advance(len(results))
            least = min(candidate.zero_shot_kl for candidate in candidates if candidate.zero_shot_kl is not None)
            progress.note(f"least KL {least:.3f}")


@torch.no_grad()
def divergence(model: nn.Module, blocks: Blocks, teacher_outputs: Teacher) -> float:
    """Return the KL of a model's next-token distributions from the teacher's, nats per token, mean over all tokens.

    `teacher_outputs` returns the teacher's outputs on a block by the block's number.
    """
    headless = model if isinstance(model, Headless) else Headless(model)
    device, total = next(headless.parameters()).device, 0.0
    for number, block in enumerate(blocks.split(1)):
        ids = block.ids.to(device)
        outputs = teacher_outputs(ids, torch.tensor([number]), None)
        total += float(headless(ids, lambda hidden, head, of=outputs: logit_loss(hidden, head, of, forward_kl_, 1)))
    return total / blocks.num_tokens


class ZeroShot:
    """Measures candidates on a few held-out blocks, as views into one sorted teacher at a time."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.session = workspace, workspace.session
        self.blocks, self.teacher_outputs = workspace.zero_shot_blocks, workspace.heldout_outputs
        self._key: tuple[int, ...] | None = None
        self._sorted: SortedTeacher | None = None

    def __call__(self, arch: Arch) -> float:
        """Return the KL of a shape from the teacher, cut and with its norms rescaled."""
        model = self._sorted_teacher(arch).model(arch, self.session.runtime)
        return divergence(model, self.blocks, self.teacher_outputs)

    def key(self, arch: Arch) -> tuple[int, ...]:
        """Return the sizes that decide which sorted teacher a shape is cut out of; measure shapes in their order."""
        return tuple(arch.sizes[name] for name in self._deciding_sizes)

    @property
    def _deciding_sizes(self) -> tuple[str, ...]:
        return deciding_sizes(self.session.source.arch, self.session.recipe.prune)

    def _sorted_teacher(self, arch: Arch) -> SortedTeacher:
        if self._sorted is None or self._key != self.key(arch):
            self._key, self._sorted = self.key(arch), None  # release one sorted teacher before the next is made
            self._sorted = sort_teacher(
                self.session.source,
                self.workspace.importance,
                dict(zip(self._deciding_sizes, self._key, strict=True)),
                recipe=self.session.recipe.prune,
                blocks=self.session.calibration_blocks,
                runtime=self.session.runtime,
            )
        return self._sorted
