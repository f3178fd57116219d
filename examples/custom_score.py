"""Scores the neurons of a tiny random Llama by a function of your own, and cuts the model by it and by built-in scores.

python examples/custom_score.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.data.blocks import Blocks
from minitron.evaluation.perplexity import measure_perplexity
from minitron.model.checkpoint import open_checkpoint
from minitron.model.config import student_config
from minitron.model.language_model import build_model
from minitron.pruning.calibrate import calibrate
from minitron.pruning.cut import cut_to
from minitron.pruning.scores import SCORES, Readings, Score, score
from minitron.recipe import CUT_ONLY, CalibrationRecipe
from minitron.runtime import Runtime


def contribution(readings: Readings) -> torch.Tensor:
    """Score a neuron by its mean |activation| times the norm of the weights that read it, (num_layers, ffn)."""
    scores = readings.aggregate("mean", "mean")  # (num_layers, ffn)
    for layer, matrix in readings.matrices():  # (hidden, ffn)
        scores[layer] *= matrix.norm(dim=0)
    return scores


# Recipes now accept calibration.ffn_scores: contribution. The score reads means whatever calibration.sequence says.
SCORES["ffn"]["contribution"] = Score(contribution, needs=("mean",))

torch.manual_seed(0)
runtime = Runtime(torch.device("cpu"), torch.float32)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
config.initializer_range = 0.3
model = LlamaForCausalLM(config).eval()
start = torch.zeros(16, 1, dtype=torch.int64)
ids = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, min_new_tokens=63, max_new_tokens=63)
text = Blocks(ids, torch.ones_like(ids, dtype=torch.int32))
with TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    teacher = open_checkpoint(Path(folder))
    print(f"teacher: perplexity {measure_perplexity(model, text[8:]).perplexity:.2f}")
    for name in SCORES["ffn"]:
        recipe = CalibrationRecipe(ffn_scores=name)
        importance = score(calibrate(teacher, text[:8], recipe=recipe, runtime=runtime), teacher, recipe)
        cut = cut_to(teacher.arch.resized(intermediate_size=16), teacher, importance, CUT_ONLY)
        student = build_model(student_config(teacher, cut.student, cut.layers), cut, runtime.device)
        perplexity, kept = measure_perplexity(student, text[8:]).perplexity, cut.kept["ffn"][0].tolist()
        print(f"{name}: perplexity {perplexity:.2f} before training, neurons kept in layer 0: {kept}")
