"""Perplexity and bits per byte against transformers' own loss."""

import math

import pytest
import torch

from minitron.data.blocks import Blocks, pack
from minitron.measure.perplexity import measure_perplexity, next_token_nll
from minitron.model.causal import Head, load_model
from minitron.model.checkpoint import Checkpoint
from tests.conftest import byte_tokenizer


def test_perplexity_is_the_exponential_of_the_mean_loss(teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.measure.perplexity.CHUNK_TOKENS", 10)
    model = load_model(teacher, torch.device("cpu"), torch.float32)
    blocks = pack(["some words, naïvely joined " * 20], byte_tokenizer(), 33, None)
    with torch.no_grad():
        losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in blocks.ids]
    mean = sum(losses) / len(losses)
    figures = measure_perplexity(model, blocks)
    assert figures.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    assert figures.num_tokens == 32 * len(blocks)
    assert figures.context == 33
    num_bytes = int(blocks.num_bytes[:, 1:].sum())
    assert figures.bits_per_byte == pytest.approx(mean * figures.num_tokens / math.log(2) / num_bytes, rel=1e-4)
    assert num_bytes < int(blocks.num_bytes.sum())


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradient_is_that_of_the_whole_logits(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.measure.perplexity.CHUNK_TOKENS", 3)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 11, (2, 8), generator=generator)
    next_token_nll(hidden, Head(weight, softcap), Blocks(ids, ids).targets).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    torch.testing.assert_close(found, (hidden.grad, weight.grad))
