"""Measures how many tokens a pruned student needs: the papers' plain method against ways to need fewer.

    python benchmarks/token_efficiency.py train WORK --wikitext valid.txt --arms plain default --shapes hidden \
        --tokens 50k 100k --rates 5e-4 1e-3 --batches 512 1024 [--epochs 1 2] [--seeds 0] [--set distill.compile=true]
    python benchmarks/token_efficiency.py show

`train` makes a student for every combination of the options that the results do not hold yet: cut from the teacher to
the shape, distilled on its own full schedule, and measured on text of the training's kind (`near`) and on two texts far
from it (`far`: WikiText-2 validation, detokenised; `technical`: the reference of the Python language that every Python
installation holds). Each gives one line of JSON. The teacher's outputs on the training text are stored once per seed,
block length and vocabulary in WORK, and pruned models once per arm, shape and seed. The batch is given in tokens; a
batch shorter than a block shortens the blocks that are trained on. With `--epochs`, the given tokens are processed, and
the text is that number of times shorter. A shape is one of `SHAPES`, or sizes
(`vocab_size=24576,intermediate_size=1024`), or `num_parameters=89139904`: what `compress` chooses at most of that size,
in a run of the trial's tokens to which the search is added. A student with fewer tokens than the teacher is measured on
the text of the teacher's blocks, each written with the student's tokens, and its perplexity is per token of the
teacher. `show` prints what every arm reaches at its best rate and batch, and how many tokens the better of the
published methods takes for it, by seed; a chosen shape is compared with those of `SHAPES` that have as many parameters.
"""

import argparse
import json
import math
import pydoc_data.topics
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from prune_quality import SHAPES, read_wikitext

from minitron.data.blocks import Blocks
from minitron.data.packing import read_blocks
from minitron.data.tokens import load_tokenizer
from minitron.distillation import stored_teacher
from minitron.distillation.trainer import Trainer
from minitron.evaluation.perplexity import Perplexity, measure_perplexity
from minitron.files import read_jsonl
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.model.work import forward_flops, training_flops
from minitron.pipeline import compress
from minitron.pruning import Importance, over_vocabulary, prune, read_importance, write_importance, write_random
from minitron.quantities import parse_count
from minitron.recipe import BASELINES, recipe_from
from minitron.run import versions
from minitron.runtime import configure_backends
from minitron.session import Session

RESULTS = Path(__file__).parent / "results" / "token_efficiency.jsonl"
CONTEXT = 512
"""Tokens in a block of the evaluations, and of training unless the batch is shorter."""
EVALUATION_TOKENS = 8_192
"""Tokens of each text."""
BUDGET = "num_parameters"
TEXTS = ("near", "far", "technical")
PUBLISHED = ("papers", "plain", "plain-eps")
ADAMW: dict[str, Any] = {"distill.eps": 1e-8}
ARMS: dict[str, dict[str, Any]] = {
    "papers": BASELINES["papers"] | ADAMW,
    "plain": BASELINES["modelopt"] | ADAMW,
    "plain-eps": BASELINES["modelopt"],
    "random": {},
    "default": {},
    "random-tokens": {"calibration.other_text": "random"},
    "channels": {"prune.rotate": False},
    "unscaled": {"prune.rescale_norms": False},
    "eps1e-08": ADAMW,
    "refit": {"prune.refit": True},
    "searched": {"search.effort": 1.0},
}
"""Settings of each arm, laid over the defaults. `papers` and `plain` are the published methods (`--plain papers` and
`--plain modelopt`) with AdamW as published, and `plain-eps` the latter with our ε; the best at each point is the
baseline. `random` starts from random weights; `searched` takes as much work for a shape as for its training; the others
leave out one part of the default, or add one."""


@dataclass(frozen=True)
class Trial:
    """One student: what it is cut by, and how it is trained."""

    arm: str
    shape: str
    tokens: int
    """Tokens processed; 0: the model before training."""
    batch: int
    """Tokens per step."""
    rate: float
    epochs: int = 1
    seed: int = 0

    @property
    def block(self) -> int:
        """Tokens in a block of the training."""
        return min(CONTEXT, self.batch)

    @property
    def unique_tokens(self) -> int:
        """Tokens of the text that is trained on."""
        return self.tokens // self.epochs // self.block * self.block

    @property
    def start(self) -> "Trial":
        """The trial's model before training."""
        return replace(self, tokens=0, batch=0, rate=0.0, epochs=1)

    def settings(self, part: str) -> dict[str, Any]:
        """Return the arm's settings of the training (`distill`), or of everything before it (`cut`)."""
        return {
            key: value for key, value in ARMS[self.arm].items() if key.startswith("distill.") == (part == "distill")
        }


@dataclass(frozen=True)
class Bench:
    """What all trials share: the folder of caches, the teacher, the texts."""

    work: Path
    teacher: str
    wikitext: Path | None
    most_tokens: int
    """Tokens of training text whose teacher outputs are stored."""
    settings: dict[str, Any]
    """Settings that make no difference of method, such as how attention is computed."""

    def session(self, seed: int, context: int = CONTEXT, shape: str = "", **settings: Any) -> Session:
        """Return a session over the text of a seed, which is split alike for all lengths of blocks.

        It prunes the teacher narrowed to the vocabulary of a shape, if that is smaller.
        """
        size = sizes_of(shape).get("vocab_size")
        base = {
            "teacher": self.teacher, "context": context, "seed": seed,
            # The teacher's evaluation text is longer in a student's tokens, and must end before the training text.
            "search.tokens": EVALUATION_TOKENS if size else CONTEXT,
            "evaluation.tokens": EVALUATION_TOKENS, "calibration.tokens": 16_384, "distill.tokens": self.most_tokens,
        }  # fmt: skip
        session = Session(recipe_from(None, **(base | self.settings | settings)))
        return session if size is None else over_vocabulary(session, size)

    def row(self, trial: Trial) -> dict[str, Any]:
        """Make the student of a trial and return its figures."""
        if BUDGET in sizes_of(trial.shape):
            return self._recorded(trial, self._compressed(trial))
        pruned = open_checkpoint(self.pruned(trial))
        row: dict[str, Any] = {"num_parameters": pruned.arch.num_parameters}
        if trial.tokens:
            row |= self._trained(trial)
        else:
            row |= self.figures(pruned, trial.seed)
        return self._recorded(trial, row)

    def _recorded(self, trial: Trial, row: dict[str, Any]) -> dict[str, Any]:
        settings = {key: str(value) for key, value in self.settings.items()}
        return asdict(trial) | row | {"settings": settings, **_machine(), **versions()}

    def pruned(self, trial: Trial) -> Path:
        """Return the folder of the trial's model before training, made when it is first asked for."""
        settings = trial.settings("cut")
        digest = "random" if trial.arm == "random" else _digest(json.dumps(settings, sort_keys=True))
        folder = self.work / "pruned" / f"{trial.shape}-{digest}-{trial.seed}"
        if not folder.exists():
            session = self.session(trial.seed, shape=trial.shape, **settings)
            arch = session.source.arch.resized(**sizes_of(trial.shape))
            importance = self._importance(
                self.session(trial.seed, **settings), folder.parent / f"importance-{digest}-{trial.seed}"
            )
            (write_random if trial.arm == "random" else prune)(session, arch, importance, folder)
        return folder

    def _importance(self, session: Session, folder: Path) -> Importance:
        if (folder / "importance.safetensors").exists():
            return read_importance(folder, session)
        folder.mkdir(parents=True, exist_ok=True)
        return write_importance(folder, session)

    def _trained(self, trial: Trial) -> dict[str, Any]:
        """Train the student of a trial on its full schedule, and measure it."""
        training = {"distill.batch_size": trial.batch // trial.block, "distill.learning_rate": trial.rate}
        session = self.session(trial.seed, trial.block, trial.shape, **(trial.settings("distill") | training))
        recipe = session.recipe.distill.model_copy(update={"tokens": trial.tokens})
        train, pruned = session.splits.train, open_checkpoint(self.pruned(trial))
        vocab = session.source.arch.axis_size("vocab")
        states = self.work / f"states-{trial.seed}-{trial.block}-{self.most_tokens}-{vocab}"
        teacher = stored_teacher(session, states, train, recipe)
        folder = self.work / "students" / _digest(repr(trial))
        folder.mkdir(parents=True, exist_ok=True)
        blocks = train[: trial.unique_tokens // trial.block]
        started = time.monotonic()
        student = Trainer(teacher, recipe, blocks, session.runtime, folder, stage=trial.arm).trained(pruned)
        seconds = time.monotonic() - started
        losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row][-10:]
        figures = self.figures(pruned, trial.seed, student.headless)
        shutil.rmtree(folder)
        flops = trial.tokens * training_flops(pruned.arch, trial.block)
        flops += trial.unique_tokens * forward_flops(session.teacher.arch, trial.block)
        return figures | {
            "unique_tokens": trial.unique_tokens,
            "last_loss": round(sum(losses) / len(losses), 4),
            "flops": flops,
            "seconds": round(seconds, 1),
        }

    def _compressed(self, trial: Trial) -> dict[str, Any]:
        """Compress the teacher to the trial's number of parameters, in a shape that is searched for, and measure it."""
        settings = ARMS[trial.arm] | {
            "target_params": sizes_of(trial.shape)[BUDGET], "distill.tokens": trial.tokens, "search.tokens": None,
            "distill.batch_size": trial.batch // trial.block, "distill.learning_rate": trial.rate,
        }  # fmt: skip
        recipe = self.session(trial.seed, trial.block, **settings).recipe
        out = self.work / "runs" / _digest(repr(trial))
        started = time.monotonic()
        compress(recipe, out)
        seconds = time.monotonic() - started
        student, effort = open_checkpoint(out / "student"), json.loads((out / "search.json").read_text())["effort"]
        row = self.figures(student, trial.seed) | {
            "num_parameters": student.arch.num_parameters,
            "sizes": student.arch.sizes,
            "unique_tokens": trial.unique_tokens,
            "tokens_with_search": round(trial.tokens * (1 + effort["added"])),
            "flops": round(effort["distillation"] * (1 + effort["added"])),
            "seconds": round(seconds, 1),
        }
        shutil.rmtree(out)
        return row

    def figures(self, student: Checkpoint, seed: int, headless: Headless | None = None) -> dict[str, Any]:
        """Return perplexity, per token of the teacher, and bits per byte on every text; of weights on disk or given."""
        model = headless or load_model(student, torch.device("cpu"), torch.float32)
        texts = {"near": self.session(seed).splits.evaluation, **self._other_texts()}
        tokenizers = [load_tokenizer(folder) for folder in (self.session(0).teacher.folder, student.folder)]
        is_cut = len(tokenizers[1]) < len(tokenizers[0])
        found = {
            name: _over_text(model, blocks, tokenizers) if is_cut else measure_perplexity(model, blocks)
            for name, blocks in texts.items()
        }
        return {
            name: {"perplexity": round(each.perplexity, 3), "bits_per_byte": round(each.bits_per_byte, 5)}
            for name, each in found.items()
        }

    def _other_texts(self) -> dict[str, Blocks]:
        """Return the texts that are unlike the training text, in blocks."""
        session = self.session(0)
        texts = {"technical": _python_reference(self.work, session)}
        return texts | ({"far": read_wikitext(self.wikitext, session)} if self.wikitext else {})


def _over_text(model: Any, blocks: Blocks, tokenizers: list[Any]) -> Perplexity:
    """Measure a student with fewer tokens on the text of a teacher's blocks; `tokenizers` are the teacher's and its."""
    teacher, student = tokenizers
    found, nll = [], 0.0
    for text in teacher.batch_decode(blocks.ids):
        ids = torch.tensor([student(text, add_special_tokens=False)["input_ids"]])
        found.append(measure_perplexity(model, Blocks(ids, torch.ones_like(ids, dtype=torch.int32))))
        nll += math.log(found[-1].perplexity) * found[-1].num_tokens
    num_tokens, num_bytes = blocks.ids[:, 1:].numel(), int(blocks.num_bytes[:, 1:].sum())
    perplexity, bits_per_byte = math.exp(nll / num_tokens), nll / math.log(2) / num_bytes
    return replace(found[0], perplexity=perplexity, bits_per_byte=bits_per_byte, num_tokens=num_tokens)


def main() -> None:
    """Train what is missing, or show what is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--results", type=Path, default=RESULTS)
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train")
    train.add_argument("work", type=Path)
    train.add_argument("teacher", nargs="?", default="smollm2")
    train.add_argument("--wikitext", type=Path)
    train.add_argument("--arms", nargs="+", default=["plain", "default"], choices=ARMS)
    train.add_argument("--shapes", nargs="+", default=["hidden"])
    train.add_argument("--tokens", nargs="+", type=parse_count, default=[51_200])
    train.add_argument("--batches", nargs="+", type=int, default=[512])
    train.add_argument("--rates", nargs="+", type=float, default=[5e-4])
    train.add_argument("--epochs", nargs="+", type=int, default=[1])
    train.add_argument("--seeds", nargs="+", type=int, default=[0])
    train.add_argument("--most-tokens", type=parse_count, default=204_800)
    train.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    verbs.add_parser("show")
    options = parser.parse_args()
    configure_backends()
    if options.verb == "show":
        show(read_jsonl(options.results))
        return
    settings = dict(each.split("=", 1) for each in options.set)
    bench = Bench(options.work, options.teacher, options.wikitext, options.most_tokens, settings)
    for trial in _trials(options):
        for each in (trial,) if BUDGET in sizes_of(trial.shape) else (trial.start, trial):
            if asdict(each) not in [
                {name: row.get(name) for name in asdict(each)} for row in read_jsonl(options.results)
            ]:
                row = bench.row(each)
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(_in_words(row), flush=True)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the best figures of each arm by shape and tokens, and the tokens that published methods need for them."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        size = sizes_of(shape).get(BUDGET)
        own = [row for row in rows if row["shape"] == shape]
        own += [row for row in rows if row["num_parameters"] == size and row["arm"] in PUBLISHED]
        seeds = sorted({row["seed"] for row in own})
        best = {(seed, text): _best(own, seed, text) for seed in seeds for text in TEXTS}
        print(f"\n{shape}: bits per byte at the best setting, mean over seeds; × tokens of the published methods")
        for arm, tokens in sorted({(row["arm"], _cost(row)) for row in own}):
            cells = [f"{arm:14} {tokens:8,}"]
            for text in TEXTS:
                found = [best[seed, text] for seed in seeds if (arm, tokens) in best[seed, text]]
                if found:
                    mean = sum(each[arm, tokens] for each in found) / len(found)
                    cells.append(f"{text} {mean:.4f} (× {', '.join(_ratio(each, arm, tokens) for each in found)})")
            print("  ".join(cells))


def _cost(row: dict[str, Any]) -> int:
    """Return the tokens of a training, and those that its search added."""
    return int(row.get("tokens_with_search", row["tokens"]))


def _best(rows: list[dict[str, Any]], seed: int, text: str) -> dict[tuple[str, int], float]:
    """Return bits per byte by arm and tokens, of a seed, at the rate, batch and epochs that are best for it."""
    best: dict[tuple[str, int], float] = {}
    for row in rows:
        if row["seed"] == seed and text in row:
            key = row["arm"], _cost(row)
            best[key] = min(best.get(key, math.inf), row[text]["bits_per_byte"])
    return best


def _ratio(best: dict[tuple[str, int], float], arm: str, tokens: int) -> str:
    """Return the tokens that the published methods need for an arm's figure, over the arm's tokens.

    Between two lengths that were measured, bits per byte are taken as linear in the logarithm of the tokens.
    """
    lengths = sorted({n for name, n in best if name in PUBLISHED and n})
    curve = [(n, min(best[name, n] for name in PUBLISHED if (name, n) in best)) for n in lengths]
    target = best[arm, tokens]
    if not tokens or not curve:
        return "–"
    for (n, high), (m, low) in pairwise(curve):
        if low <= target <= high and high > low:
            return f"{n * (m / n) ** ((high - target) / (high - low)) / tokens:.2f}"
    return f"> {curve[-1][0] / tokens:.2g}" if target < curve[-1][1] else f"< {curve[0][0] / tokens:.2g}"


def sizes_of(shape: str) -> dict[str, int]:
    """Return the sizes of a shape, which is a name in `SHAPES` or states them; none for an empty one."""
    stated = [each.split("=") for each in shape.split(",") if "=" in each]
    return SHAPES[shape] if shape in SHAPES else {name: int(size) for name, size in stated}


def _in_words(row: dict[str, Any]) -> str:
    head = " ".join(str(row[name]) for name in ("arm", "shape", "tokens", "batch", "rate", "epochs", "seed"))
    figures = (f"{text} {row[text]['perplexity']} ({row[text]['bits_per_byte']})" for text in TEXTS if text in row)
    return f"{head}: {', '.join(figures)}"


def _trials(options: argparse.Namespace) -> Iterator[Trial]:
    axes = (options.seeds, options.tokens, options.shapes, options.epochs, options.batches, options.rates, options.arms)
    for seed, tokens, shape, epochs, batch, rate, arm in product(*axes):
        yield Trial(arm, shape, tokens // batch * batch, batch, rate, epochs, seed)


def _python_reference(work: Path, session: Session) -> Blocks:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "python-reference.txt"
    path.write_text("\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())), encoding="utf-8")
    return read_blocks(str(path), replace(session.packing(), context=CONTEXT, seed=0), EVALUATION_TOKENS)


def _machine() -> dict[str, Any]:
    if torch.cuda.is_available():
        return {"machine": torch.cuda.get_device_name()}
    return {"machine": torch.cpu.get_capabilities().get("cpu_name", "CPU"), "threads": torch.get_num_threads()}


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:10]


if __name__ == "__main__":
    main()
