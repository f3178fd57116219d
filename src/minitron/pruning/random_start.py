"""A model of a student's shape with random weights, which the papers compare pruned models with."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from minitron.files import whole_folder
from minitron.history import Step
from minitron.model.arch import Arch
from minitron.model.config import student_config
from minitron.model.writing import write_model
from minitron.progress import Progress
from minitron.pruning.record import random_step
from minitron.pruning.scores import Importance
from minitron.pruning.selection import kept_layers
from minitron.session import Session


def write_random(session: Session, arch: Arch, importance: Importance, out: Path) -> Step:
    """Write a model of a shape, initialised as transformers initialises its family, as a Hugging Face folder at `out`.

    The weights follow from the recipe's seed. Tokenizer and dtype are those of the session's model. Where layers
    differ, the order of their kinds is that of a student pruned by `importance`, or if that is empty of the first
    layers of each kind. Returns what was done, see `pruning.prune`.

    Raises:
        UserError: see `student_config` and `kept_layers`.
    """
    source = session.source
    scores = importance or {"layer": torch.zeros(source.arch.axis_size("layer"))}
    config = student_config(source, arch, kept_layers(scores, source.arch, arch).tolist())
    with Progress("initialise student"), torch.random.fork_rng():
        torch.manual_seed(session.runtime.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(source.dtype)
    with whole_folder(out) as staging:
        write_model(staging, model, model.state_dict(), replace(source, config=config))
    return random_step(session, arch)
