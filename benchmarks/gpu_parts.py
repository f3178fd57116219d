"""The parts of `benchmarks/on_gpu.sh`: what a GPU has to show, each a function that adds figures to a `Part`."""

import contextlib
import io
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks import kd_accuracy, kd_loss
from benchmarks.on_gpu import GPU_ALONE, ROOT, SEED, Part
from minitron import cli
from minitron.data.blocks import Blocks
from minitron.distillation.checkpoint import load_checkpoint, save_checkpoint
from minitron.distillation.fused import States
from minitron.distillation.objective import Objective
from minitron.distillation.optimizers import make_optimizer, take_step
from minitron.distillation.parallel import lighten, shard_over_ranks, whole
from minitron.distillation.teacher import Live
from minitron.errors import UserError
from minitron.evaluation.perplexity import measure_perplexity
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import Headless, load_model, require_attention
from minitron.model.source import open_teacher
from minitron.model.work import forward_flops, training_flops
from minitron.planning.machine import this_machine
from minitron.recipe import DistillRecipe

LOSS_VOCABULARIES = (128_256, 262_144)
STEPS = {
    "SmolLM2-135M": (
        {
            "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        },
        {"hidden_size": 448, "intermediate_size": 1152},
    ),
    "Llama-3.2-1B": (
        {
            "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        },
        {"hidden_size": 1536, "intermediate_size": 6144},
    ),
}  # fmt: skip
"""The teachers whose distillation steps are timed, with random weights, and the sizes of their students."""
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def teacher(part: Part) -> None:
    """Find a teacher and a text that need no network: SmolLM2 where its package is installed, else a random Llama."""
    part.text.write_text("\n\n".join(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))))
    with part.figure("teacher") as row:
        try:
            if part.is_tiny:
                raise UserError("a tiny one is asked for")
            part.teacher.symlink_to(open_teacher("smollm2").folder)
            row["teacher"] = "SmolLM2-135M"
        except UserError as error:
            row |= {"teacher": "random weights in the shape of SmolLM2-135M", "why": str(error)}
            model = random_model(part, TINY if part.is_tiny else STEPS["SmolLM2-135M"][0])
            model.to(torch.bfloat16).save_pretrained(part.teacher)
            byte_tokenizer().save_pretrained(part.teacher)
        row["num_parameters"] = open_teacher(str(part.teacher)).arch.num_parameters


def loss(part: Part) -> None:
    """Time and memory of the loss at large vocabularies: ours, a naive one and Liger's, from states in bfloat16."""
    tokens, hidden = (32, 16) if part.is_tiny else (4096, 2048)
    ways = ["naive", "minitron", "liger-1024", "liger-256", "liger-compiled"]
    for vocab in (257, 515) if part.is_tiny else LOSS_VOCABULARIES:
        for way in ways:
            with part.figure(way, vocab=vocab, tokens=tokens, hidden=hidden) as row:
                loss_of = kd_loss.WAYS[way]()
                inputs = kd_loss.random_inputs(vocab, tokens, hidden, part.device, part.dtype)
                values: list[float] = []

                def once(loss_of: Any = loss_of, inputs: Any = inputs, values: list[float] = values) -> None:
                    inputs[0].grad = inputs[1].grad = None
                    value = loss_of(*inputs)
                    value.backward()
                    values.append(float(value.detach()))

                once()  # compiles and loads the libraries
                with part.peak(row):
                    once()
                row["seconds"] = statistics.median(part.seconds(once) for _ in range(5))
                row["loss"] = values[-1]


def accuracy(part: Part) -> None:
    """Errors of the loss and its gradients in bfloat16, against float64, of a teacher and the teacher with noise."""
    model = load_model(open_checkpoint(part.teacher), part.device, torch.bfloat16)
    student = deepcopy(model)
    generator = torch.Generator(part.device).manual_seed(SEED)
    ids = random_ids(model.config.vocab_size, (1, 64 if part.is_tiny else 512)).to(part.device)
    with torch.no_grad():
        for parameter in student.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device=part.device)
            parameter.add_((0.2 * parameter.float().std() * noise).to(parameter.dtype) if parameter.ndim > 1 else 0)
        said, own = (Headless(each)(ids, States) for each in (model, student))
    for way, errors in kd_accuracy.errors(own, said).items():
        with part.figure(way, dtype="bfloat16", tokens=ids.numel()) as row:
            row["relative_errors"] = errors


def step(part: Part) -> None:
    """Time, memory and model FLOPs utilisation of distillation steps, with the planner's count of operations."""
    ways: dict[str, dict[str, Any]] = {"plain": {}}
    if part.on_gpu:
        ways |= {"compiled": {"compile": True}, "adamw8bit": {"optimizer": "adamw8bit"}}
    dtype = str(part.dtype).removeprefix("torch.")
    peak = this_machine("cuda", None, dtype).flops if part.on_gpu else None
    sizes = {"tiny": (TINY, {"hidden_size": 48})} if part.is_tiny else STEPS
    context, batch, micro = (32, 2, 1) if part.is_tiny else (1024, 16, 4)
    for name, (of_teacher, smaller) in sizes.items():
        for way, options in ways.items():
            recipe = DistillRecipe(batch_size=batch, micro_batch_size=micro, **options)
            with part.figure(name, way=way, batch_size=batch, micro_batch_size=micro, context=context) as row:
                models = distilled_pair(part, of_teacher, smaller)
                objective = Objective(models.live(), recipe, part.runtime)
                take = models.stepper(objective, random_ids(of_teacher["vocab_size"], (batch, context)))
                take()
                take()  # the optimizer has its state from the first one on
                with part.peak(row):
                    take()
                seconds = statistics.median(part.seconds(take) for _ in range(5))
                flops = models.flops(context) * batch * context
                row |= {
                    "seconds": seconds, "tokens_per_second": batch * context / seconds, "flops_per_step": flops,
                    "flops_per_second": flops / seconds, "peak_flops_per_second": peak,
                    "mfu": flops / seconds / peak if peak else None,
                }  # fmt: skip
                if not peak:
                    row["needs"] = f"{GPU_ALONE} whose data sheet is known, for mfu and extra_mb"


def attention(part: Part) -> None:
    """Perplexity and speed with each way of computing attention."""
    checkpoint = open_checkpoint(part.teacher)
    ids = random_ids(checkpoint.arch.axis_size("vocab"), (2, 32) if part.is_tiny else (16, 2048))
    blocks = Blocks(ids, ids.new_ones(ids.shape))
    for name in ("eager", "sdpa"):
        with part.figure(name) as row:
            model = load_model(checkpoint, part.device, part.dtype, name)
            measure_perplexity(model, blocks[:1])
            row |= measure_perplexity(model, blocks).to_dict()
    for name in ("flex_attention", "flash_attention_2", "flash_attention_3"):
        if not part.on_gpu:
            part.skip(name)
            continue
        with part.figure(name) as row:
            require_attention(checkpoint, replace(part.runtime, attention=name))
            model = load_model(checkpoint, part.device, part.dtype, name)
            measure_perplexity(model, blocks[:1])
            row |= measure_perplexity(model, blocks).to_dict()


def fsdp(part: Part) -> None:
    """A step sharded by FSDP2 over one rank under torchrun, with NCCL on a GPU, against the step of one process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command = [*torchrun, "-m", "benchmarks.on_gpu", "--only", "fsdp_rank", "--work", str(part.work)]
    done = subprocess.run([*command, *(["--tiny"] if part.is_tiny else [])], cwd=ROOT, capture_output=True, text=True)
    found = part.work / "fsdp_rank.json"
    if not found.exists():
        raise RuntimeError(f"torchrun ended with {done.returncode}: {done.stderr[-500:]}")
    part.figures.extend(json.loads(found.read_text()))


def fsdp_rank(part: Part) -> None:
    """What torchrun runs for `fsdp`."""
    sizes = (TINY, {"hidden_size": 48}) if part.is_tiny else STEPS["SmolLM2-135M"]
    context, batch = (32, 2) if part.is_tiny else (1024, 8)
    recipe = DistillRecipe(batch_size=batch, micro_batch_size=batch)
    ids = random_ids(sizes[0]["vocab_size"], (batch, context))
    gradients: list[dict[str, torch.Tensor]] = []
    backend = "nccl" if part.on_gpu else "gloo"
    if part.on_gpu:
        torch.cuda.set_device(part.device)
    dist.init_process_group(backend)
    try:
        for way in ("one process", f"FSDP2 over one rank, {backend}"):
            with part.figure(way, batch_size=batch, context=context) as row:
                models = distilled_pair(part, *sizes)
                live = models.live()
                if gradients:
                    shard_over_ranks(models.student, models.student_arch, part.runtime)
                    shard_over_ranks(live.headless, live.arch, part.runtime, is_teacher=True)
                objective = Objective(live, recipe, part.runtime)
                row["loss"] = float(objective.accumulate(models.student, *models.step_blocks(ids))[0])
                parameters = models.student.named_parameters()
                gradients.append({n: whole(p.grad).cpu().double() for n, p in parameters if p.grad is not None})
                models.student.zero_grad(set_to_none=True)
                take = models.stepper(objective, ids)
                take()
                with part.peak(row):
                    take()
                row["seconds"] = statistics.median(part.seconds(take) for _ in range(3))
                if len(gradients) == 2:
                    one, other = gradients
                    squares = [(float((one[n] - other[n]).square().sum()), float(one[n].square().sum())) for n in one]
                    row["gradient_error"] = (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5
                    trained = {"student": (models.student, models.optimizer)}
                    save_checkpoint(part.work, trained, 1, part.runtime.world)
                    row["checkpoint_is_read"] = load_checkpoint(part.work, trained, part.runtime.world) == 1
    finally:
        dist.destroy_process_group()


def compress(part: Part) -> None:
    """A whole run of `minitron compress` to a given shape, with its own figures."""
    tokens, context = (256, 32) if part.is_tiny else (524_288, 512)
    shape = {"hidden_size": 48} if part.is_tiny else STEPS["SmolLM2-135M"][1]
    out = part.work / "compressed"
    settings = {
        **{f"shape.{name}": size for name, size in shape.items()},
        "distill.tokens": tokens, "distill.batch_size": 2 if part.is_tiny else 16,
        "distill.micro_batch_size": 1 if part.is_tiny else 16, "distill.learning_rate": 5e-4,
        "calibration.tokens": min(tokens, 16_384), "evaluation.tokens": min(tokens, 8_192),
        "search.tokens": context,
    }  # fmt: skip
    with part.figure("compress", distilled_tokens=tokens, context=context) as row:
        with part.peak(row):
            row["seconds"] = part.seconds(lambda: run_verb(part, "compress", out, context, settings))
        row["eval"] = json.loads((out / "eval.json").read_text())
        steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [each["loss"] for each in steps if "loss" in each]
        row |= {"first_loss": losses[0], "last_loss": losses[-1]}


def search(part: Part) -> None:
    """A search for a student that reads a prompt faster than its teacher, by speeds that are measured here."""
    tokens, context = (256, 32) if part.is_tiny else (65_536, 512)
    out = part.work / "searched"
    settings: dict[str, Any] = {
        "target_params": 0.7, "budget.batch": 1 if part.is_tiny else 8, "budget.context": 64 if part.is_tiny else 2048,
        "distill.tokens": tokens,
        "distill.batch_size": 2, "calibration.tokens": min(tokens, 16_384), "search.tokens": 4 * context,
        "search.zero_shot": 3 if part.is_tiny else 16, "search.zero_shot_tokens": context, "search.shortlist": 2,
        "search.probe_tokens": 0 if part.is_tiny else 2048, "search.distill_tokens": 0 if part.is_tiny else 8192,
        "evaluation.tokens": context,
    }  # fmt: skip
    if not part.is_tiny:  # a tiny prefill takes milliseconds, and which shape is the faster one is chance
        settings["budget.throughput"] = "1.02x"
    with part.figure("search", context=context) as row:
        row["seconds"] = part.seconds(lambda: run_verb(part, "search", out, context, settings))
        row["search"] = json.loads((out / "search.json").read_text())
        row["arch"] = json.loads((out / "arch.json").read_text())


def tests(part: Part) -> None:
    """The suite's tests that run on a GPU where there is one: `tests/test_on_device.py`."""
    report = part.work / "junit.xml"
    options = ["-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider", f"--junitxml={report}"]
    chosen = ["-k", "products_of_halves"] if part.is_tiny else []
    command = [sys.executable, "-m", "pytest", "-q", *options, "tests/test_on_device.py", *chosen]
    with part.figure("tests", dtype="float32 and bfloat16") as row:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
        failed = {
            case.get("name", ""): " ".join((problem.get("message") or "").split())[:300]
            for case in cases
            for problem in (*case.findall("failure"), *case.findall("error"))
        }
        row |= {"passed": len(cases) - len(failed), "failed": failed}


@dataclass
class Pair:
    """A teacher and a student with random weights, on the device."""

    teacher: Any
    student: Any
    teacher_arch: Any
    student_arch: Any
    optimizer: Any = None

    def live(self) -> Any:
        """Return the teacher as a training has it."""
        return Live(self.teacher)

    def step_blocks(self, ids: Any) -> tuple[Any, Any]:
        """Return the blocks of ids (B, T) and their numbers."""
        return Blocks(ids, torch.ones_like(ids)), torch.arange(len(ids))

    def stepper(self, objective: Any, ids: Any) -> Callable[[], None]:
        """Return a function that takes one step on ids (B, T); layers are compiled as the recipe has it."""
        lighten(self.student, self.student_arch, objective.recipe)
        self.optimizer = make_optimizer(self.student, objective.recipe)
        blocks, numbers = self.step_blocks(ids)

        def take() -> None:
            value = float(objective.accumulate(self.student, blocks, numbers)[0])
            take_step(self.student, self.optimizer, 1e-4, 1.0, value)

        return take

    def flops(self, context: int) -> float:
        """Return the operations per token of a step: three passes of the student and one of the teacher."""
        return training_flops(self.student_arch, context) + forward_flops(self.teacher_arch, context)


def distilled_pair(part: Part, sizes: dict[str, int], smaller: dict[str, int]) -> Pair:
    """Return a teacher in the part's dtype and a student in float32, as a training holds them."""
    model = random_model(part, sizes).to(part.dtype)
    student = random_model(part, sizes | smaller)
    archs = [Arch.from_config(each.config.to_dict()) for each in (model, student)]
    return Pair(model, Headless(student), *archs)


def random_model(part: Part, sizes: dict[str, int]) -> Any:
    """Return a Llama with random weights in float32 on the device."""
    config = AutoConfig.for_model("llama", **sizes, tie_word_embeddings=True, max_position_embeddings=8192)
    torch.manual_seed(SEED)
    with part.device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def random_ids(vocab: int, shape: tuple[int, int]) -> Any:
    """Return token ids (B, T) on the CPU."""
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(SEED))


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def run_verb(part: Part, verb: str, out: Path, context: int, settings: dict[str, Any]) -> None:
    """Run `minitron VERB TEACHER OUT` in this process.

    Raises:
        RuntimeError: it ended with an error.
    """
    given = {"data": part.text, "context": context, "device": part.device, "seed": SEED, **settings}
    words = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    shown = io.StringIO()
    with (
        patch("sys.argv", ["minitron", verb, str(part.teacher), str(out), *words, "--json"]),
        contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown),
    ):  # fmt: skip
        try:
            cli.main()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(shown.getvalue().strip().splitlines()[-1]) from ended


PARTS: dict[str, Callable[[Part], None]] = {
    "teacher": teacher, "loss": loss, "accuracy": accuracy, "step": step, "attention": attention, "fsdp": fsdp,
    "fsdp_rank": fsdp_rank, "compress": compress, "search": search, "tests": tests,
}  # fmt: skip
"""The parts by name; `teacher` makes what others read, and torchrun runs `fsdp_rank`."""
