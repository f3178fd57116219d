"""How far cut, untrained candidates are from the teacher."""

from dataclasses import dataclass, field

import torch
from torch import nn

from minitron.data.blocks import Blocks
from minitron.distillation.fused import logit_loss
from minitron.distillation.losses import forward_kl
from minitron.distillation.teacher import Teacher
from minitron.model.arch import Arch
from minitron.model.language_model import Headless
from minitron.nas.sorted_teacher import Sorted, decided_by, sort_teacher
from minitron.pruning.importance import Importance
from minitron.session import Session

REPAIR_TOKENS = 2_048
"""Calibration tokens on which the norms of a sorted teacher are rescaled."""


@torch.no_grad()
def divergence(model: nn.Module, blocks: Blocks, word: Teacher) -> float:
    """KL of a model's next-token distributions from the teacher's, nats a token, mean over all tokens of the blocks.

    `word` is what the teacher says of the blocks, by their numbers.
    """
    headless = model if isinstance(model, Headless) else Headless(model)
    device, total = next(headless.parameters()).device, 0.0
    for number, block in enumerate(blocks.split(1)):
        ids = block.ids.to(device)
        said = word(ids, torch.tensor([number]), None)
        total += float(headless(ids, lambda hidden, head, said=said: logit_loss(hidden, head, said, forward_kl, 1)))
    return total / blocks.num_tokens


@dataclass
class ZeroShot:
    """Measures candidates on a few blocks, as views into one sorted teacher at a time."""

    session: Session
    importance: Importance
    blocks: Blocks
    word: Teacher
    current: tuple[tuple[int, ...], Sorted] | None = field(default=None, init=False)

    def __call__(self, arch: Arch) -> float:
        """The KL of a shape, cut and with its norms rescaled, from the teacher."""
        session = self.session
        key = self.key(arch)
        if self.current is None or self.current[0] != key:
            self.current = None  # before the next one is made
            blocks = session.calibration_blocks[: max(1, REPAIR_TOKENS // session.context)]
            sizes = dict(zip(self.decisive, key, strict=True))
            self.current = key, sort_teacher(session.source, self.importance, sizes, session.recipe.prune, blocks,
                                             session.runtime.device, session.runtime.dtype)  # fmt: skip
        model = self.current[1].model(arch, session.runtime.device, session.runtime.dtype)
        return divergence(model, self.blocks, self.word)

    @property
    def decisive(self) -> tuple[str, ...]:
        """The sizes that decide which sorted teacher a shape is cut out of."""
        return decided_by(self.session.source.arch, self.session.recipe.prune)

    def key(self, arch: Arch) -> tuple[int, ...]:
        """Those of a shape; shapes are best measured in the order of these."""
        return tuple(arch.sizes[name] for name in self.decisive)
