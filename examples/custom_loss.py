"""Distils a tiny random Llama with a loss of your own: a skewed KL, finite where the student assigns probability 0.

python examples/custom_loss.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.distillation.fused import States, logit_loss
from minitron.distillation.losses import Comparison, differentiable, forward_kl_
from minitron.model.language_model import Headless


def skewed_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Compute KL(p ‖ 0.9 q + 0.1 p) of logits (n, vocab), a loss per token (n,) (DistiLLM, arXiv 2402.03898)."""
    log_p, q = teacher.log_softmax(dim=-1), student.softmax(dim=-1)
    p = log_p.exp()
    return (p * (log_p - (0.9 * q + 0.1 * p).clamp_min(1e-30).log())).sum(dim=-1)


def model(hidden_size: int) -> Headless:
    """Make a random Llama that hands its last hidden states to a loss."""
    sizes = {"intermediate_size": 2 * hidden_size, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Headless(LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=hidden_size, **sizes)))


torch.manual_seed(0)
teacher, student = model(32), model(16)
teacher.model.get_output_embeddings().weight.data *= 20  # a teacher that is sure of something
ids = torch.randint(0, 64, (8, 32))
outputs = teacher(ids, lambda hidden, head: States(hidden.detach(), head))
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)


def loss(comparison: Comparison) -> torch.Tensor:
    """Compare the student with the teacher on all tokens; logits exist for a few tokens at a time."""
    result: torch.Tensor = student(ids, lambda hidden, head: logit_loss(hidden, head, outputs, comparison, ids.numel()))
    return result


print(f"before: skewed KL {loss(differentiable(skewed_kl)):.3f}, forward KL {loss(forward_kl_):.3f}")
for _ in range(60):
    optimizer.zero_grad()
    loss(differentiable(skewed_kl)).backward()
    optimizer.step()
print(f"after:  skewed KL {loss(differentiable(skewed_kl)):.3f}, forward KL {loss(forward_kl_):.3f}")
