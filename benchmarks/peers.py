"""Measures what other libraries reach with the shape, data and tokens of `token_efficiency.py`.

    PYTHONPATH=path/to/substill python benchmarks/peers.py WORK --wikitext valid.txt --peers ours substill trl \
        --tokens 25600 --rates 5e-4 1e-3

`ours` is `compress` by default. `trl` trains the model that we pruned with TRL's trainer for knowledge distillation at
λ = 0, β = 0: forward KL on given text. `substill` cuts and trains by its own method; it is not a package, so put a
checkout of github.com/stephenoffer/substill on PYTHONPATH. All get equal blocks of text, one per step, and calibrate on
equal tokens; the rate of each is swept. `torch-pruning` cuts by magnitude and does not train. Each result is a line of
JSON; WORK holds the caches of `token_efficiency.py`. Needs `pip install trl torch-pruning`.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from prune_quality import SHAPES
from token_efficiency import CONTEXT, Bench, Trial

from minitron.data.tokens import load_tokenizer
from minitron.files import read_jsonl
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.quantities import parse_count
from minitron.run import versions
from minitron.runtime import configure_backends

RESULTS = Path(__file__).parent / "results" / "peers.jsonl"
SHAPE = "width"
"""Hidden, ffn and whole groups of heads are cut in proportion: all that substill can cut."""


def main() -> None:
    """Add a line per peer and rate that the results do not hold yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("teacher", nargs="?", default="smollm2")
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--tokens", type=parse_count, default=25_600)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-tokens", type=parse_count, default=204_800)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    configure_backends()
    bench = Bench(options.work, options.teacher, options.wikitext, options.most_tokens, {})
    for peer in options.peers:
        for rate in options.rates if peer in TRAINED else [0.0]:
            trial = Trial("default", SHAPE, options.tokens if rate else 0, CONTEXT, rate, seed=options.seed)
            key = {"peer": peer, "tokens": trial.tokens, "rate": rate, "seed": trial.seed}
            if not any(row.items() >= key.items() for row in read_jsonl(options.results)):
                started = time.monotonic()
                figures = PEERS[peer](bench, trial)
                row = key | figures | {"seconds": round(time.monotonic() - started), **versions()}
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def ours(bench: Bench, trial: Trial) -> dict[str, Any]:
    """Our own cut, repairs and training, the teacher's outputs stored beforehand."""
    row: dict[str, Any] = bench.row(trial)
    return row


def substill(bench: Bench, trial: Trial) -> dict[str, Any]:
    """Learned restriction: the basis of the stream is trained with the weights."""
    from substill import LRDConfig, learned_restriction_distill

    session, sizes = bench.session(trial.seed), SHAPES[SHAPE]
    arch = session.teacher.arch.resized(**sizes)
    config = LRDConfig(
        arch.sizes["hidden_size"], arch.sizes["intermediate_size"], arch.sizes["num_attention_heads"],
        arch.sizes["num_key_value_heads"], steps=trial.tokens // CONTEXT, lr=trial.rate, seed=trial.seed,
        calib_batches=len(session.calibration_blocks), log_every=10,
    )  # fmt: skip
    blocks = [{"input_ids": block.ids} for block in session.splits.train[: config.steps].split(1)]
    calibration = [{"input_ids": block.ids} for block in session.calibration_blocks.split(1)]
    teacher = load_model(session.teacher, torch.device("cpu"), torch.float32)
    result = learned_restriction_distill(teacher, blocks, config=config, calib_loader=calibration)
    count = sum(parameter.numel() for parameter in result.student.parameters())
    figures: dict[str, Any] = bench.figures(result.student, trial.seed)
    return figures | {"num_parameters": count}


def trl(bench: Bench, trial: Trial) -> dict[str, Any]:
    """TRL's trainer on the model that we pruned, on the text of all other arms."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    session, device = bench.session(trial.seed), torch.device("cpu")
    student = load_model(open_checkpoint(bench.pruned(trial)), device, torch.float32)
    student.requires_grad_(True)
    ids = session.splits.train[: trial.tokens // CONTEXT].ids.tolist()
    with TemporaryDirectory() as folder:
        config = GKDConfig(
            folder, max_length=CONTEXT, lmbda=0.0, beta=0.0, per_device_train_batch_size=1, num_train_epochs=1,
            learning_rate=trial.rate, lr_scheduler_type="cosine", warmup_steps=trial.tokens // CONTEXT // 20,
            max_grad_norm=1.0, adam_beta2=0.95, seed=trial.seed, report_to=[], save_strategy="no", use_cpu=True,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False, bf16=False, logging_steps=10,
        )  # fmt: skip
        teacher = load_model(session.teacher, device, torch.float32)
        trainer = GKDTrainer(
            model=student, teacher_model=teacher, args=config, train_dataset=Dataset.from_dict({"input_ids": ids}),
            processing_class=load_tokenizer(session.teacher.folder), data_collator=_whole_blocks,
        )  # fmt: skip
        trainer.train()
    figures: dict[str, Any] = bench.figures(student.eval(), trial.seed)
    return figures


def _whole_blocks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch whose every token is predicted; a prompt of one token stands before what is answered."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "prompts": ids[:, :1]}


def torch_pruning(bench: Bench, trial: Trial) -> dict[str, Any]:
    """Torch-Pruning's cut by magnitude, without training."""
    import torch_pruning as tp

    session = bench.session(trial.seed)
    model = load_model(session.teacher, torch.device("cpu"), torch.float32)
    model.requires_grad_(True)
    arch, sizes = session.teacher.arch, SHAPES[SHAPE]
    layers, ratio = model.model.layers, {name: 1 - size / arch.sizes[name] for name, size in sizes.items()}
    pruner = tp.pruner.BasePruner(
        model, {"input_ids": session.calibration_blocks.ids[:1, :64]}, pruning_ratio=0.0,
        importance=tp.importance.GroupMagnitudeImportance(), ignored_layers=[model.lm_head],
        root_module_types=[torch.nn.Linear, torch.nn.Embedding],
        forward_fn=lambda model, inputs: model(**inputs, use_cache=False).logits,
        pruning_ratio_dict={
            **{layer.mlp.gate_proj: ratio["intermediate_size"] for layer in layers},
            model.model.embed_tokens: ratio["hidden_size"],
        },
    )  # fmt: skip
    pruner.step()
    count = sum(parameter.numel() for parameter in model.parameters())
    figures: dict[str, Any] = bench.figures(model.eval(), trial.seed)
    return figures | {"num_parameters": count}


PEERS = {"ours": ours, "substill": substill, "trl": trl, "torch-pruning": torch_pruning}
TRAINED = ("ours", "substill", "trl")

if __name__ == "__main__":
    main()
