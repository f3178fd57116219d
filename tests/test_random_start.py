"""A student's shape with random weights, the baseline of the papers' tables 1 and 11 (14 at NeurIPS)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron import cli
from minitron.data.tokens import load_tokenizer
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model
from minitron.pruning import write_random
from minitron.recipe import Recipe
from minitron.session import Session
from tests.conftest import MECHANISMS, make_model


@pytest.mark.parametrize("teacher", MECHANISMS, indirect=True)
def test_weights_are_what_transformers_initialises(teacher: Checkpoint, tmp_path: Path) -> None:
    depth = teacher.arch.axis_size("layer")
    shape = teacher.arch.resized(num_hidden_layers=depth - depth // 4)
    for seed in (3, 4):
        session = Session(Recipe(teacher=str(teacher.folder), seed=seed))
        write_random(session, shape, {}, tmp_path / str(seed))
    found, other = (open_checkpoint(tmp_path / str(seed)) for seed in (3, 4))
    assert dict(found.arch.sizes) == dict(shape.sizes)
    torch.manual_seed(3)
    expected = AutoModelForCausalLM.from_config(found.config, dtype=torch.float32).state_dict()
    loaded = load_model(found, torch.device("cpu"), torch.float32).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    # The controls: another seed, and the teacher.
    matrices = [name for name in found.tensors if len(found.shape(name)) == 2]
    for checkpoint in (other, teacher):
        assert not all(torch.equal(found.tensor(name), checkpoint.tensor(name)) for name in matrices)
    assert load_tokenizer(found.folder).get_vocab() == load_tokenizer(teacher.folder).get_vocab()


def test_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither text nor importance is read for it, and the result names the seed."""
    teacher = make_model(tmp_path / "teacher", "llama-tied")
    given = ["prune", str(teacher), str(tmp_path / "out"), "--hidden-size", "32", "--seed", "7", "--json"]
    cli.app([*given, "--random", "--data", str(tmp_path / "none.txt")], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["random_seed"] == 7
    first = load_file(tmp_path / "out" / "model.safetensors")
    assert first["model.embed_tokens.weight"].shape == (258, 32)
    (tmp_path / "text.txt").write_text("some words and some more of them. " * 400)
    options = ["--data", str(tmp_path / "text.txt"), "--context", "32", "--set", "calibration.tokens=256"]
    cli.app([*given, "--overwrite", *options, "--set", "search.tokens=64"], standalone_mode=False)
    assert "random_seed" not in json.loads(capsys.readouterr().out)
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    assert not torch.equal(pruned["model.embed_tokens.weight"], first["model.embed_tokens.weight"])
