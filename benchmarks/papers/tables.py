"""The papers' tables: which arms stand in which rows, the papers' own figures, and what each table claims.

Numbers of tables are those of arXiv 2407.14679 v2 unless another paper is named; figures beside an arm are the papers'.
"""

from dataclasses import dataclass
from typing import Literal

Figure = Literal["after", "before", "kl after"]
"""Which figure a claim compares: the loss after training or before it, or the KL to the teacher after it."""


@dataclass(frozen=True)
class Line:
    """A row of a table."""

    arm: str
    words: str
    paper: tuple[str, ...] = ()
    """The paper's figures, in the order of `Table.paper_columns`."""


@dataclass(frozen=True)
class Claim:
    """What a table says about the order of two arms: the first has the lower loss, or both are equal."""

    better: str
    worse: str
    words: str
    figure: Figure = "after"
    equal: bool = False


@dataclass(frozen=True)
class Table:
    """One of the papers' tables or figures."""

    title: str
    source: str
    lines: tuple[Line, ...]
    claims: tuple[Claim, ...]
    paper_columns: tuple[str, ...] = ()
    teacher: str = "deep"
    note: str = ""
    """What differs from the paper, apart from the size of the models and the number of tokens."""

    @property
    def arms(self) -> list[str]:
        """The names of the arms."""
        return [line.arm for line in self.lines]


WORDS = {"l2": "L2", "mean": "mean", "var": "var"}
PAPER_AGGREGATION = {
    ("l2", "l2"): ("8.73", "8.37"), ("l2", "mean"): ("7.18", "7.23"), ("l2", "var"): ("8.18", "8.61"),
    ("mean", "l2"): ("8.41", "7.84"), ("mean", "mean"): ("7.21", "6.89"), ("mean", "var"): ("7.94", "8.29"),
    ("var", "l2"): ("9.01", "9.30"), ("var", "mean"): ("8.34", "8.72"), ("var", "var"): ("10.55", "11.14"),
}  # fmt: skip


def _aggregation(batch: str, sequence: str) -> str:
    return "width" if (batch, sequence) == ("l2", "mean") else f"batch {batch}, sequence {sequence}"


def _in_words(batch: str, sequence: str) -> str:
    return f"{WORDS[batch]} and {WORDS[sequence]}"


def _worse_than_chosen(words: str) -> tuple[Claim, ...]:
    others = [pair for pair in PAPER_AGGREGATION if pair[1] != "mean"] + [("var", "mean")]
    return tuple(Claim("width", _aggregation(*pair), f"{words} {_in_words(*pair)}", figure="before") for pair in others)


TABLES = {
    "table1": Table(
        "Table 1: which axes are cut, and a random start",
        "15.6B cut to about 8B, 1.8B tokens",
        (
            Line("all axes", "depth, MLP, heads, hidden", ("5.35 → 0.38", "2.062")),
            Line("width", "MLP, heads, hidden", ("6.33 → 0.37", "2.049")),
            Line("MLP and heads", "MLP, heads", ("5.07 → 0.42", "2.101")),
            Line("depth", "depth (block influence)", ("8.35 → 0.49", "2.155")),
            Line("random", "random start", ("12.27 → 2.34", "3.953")),
        ),
        (
            Claim("width", "all axes", "width alone is better than width and depth"),
            Claim("width", "MLP and heads", "with hidden is better than without it"),
            Claim("MLP and heads", "depth", "MLP and heads are better to cut than depth"),
            Claim("depth", "random", "any pruning is better than a random start"),
            Claim("MLP and heads", "width", "before training, MLP and heads alone are better than all three", "before"),
        ),
        ("KL, before → after", "loss after"),
    ),
    "table10": Table(
        "Table 10: depth, width, or both",
        "15.6B, 1.8B tokens",
        (
            Line("depth by perplexity", "depth, by perplexity (9.39B)", ("2.155",)),
            Line("depth", "depth, by block influence (9.39B)", ("2.177",)),
            Line("width", "width (7.74B)", ("2.049",)),
            Line("all axes", "depth and width (7.91B)", ("2.062",)),
        ),
        (
            Claim("width", "depth by perplexity", "width is better than depth, with fewer parameters"),
            Claim("width", "all axes", "width is better than both"),
            Claim("all axes", "depth by perplexity", "both are better than depth"),
            Claim("depth by perplexity", "depth", "perplexity is a better score of layers than block influence"),
            Claim("all axes", "width", "before training, both are better than width", "before"),
        ),
        ("loss after",),
    ),
    "table13": Table(
        "Table 13: aggregation of activations over batch and sequence",
        "15.6B cut to the shape of Nemotron-3 8B, untrained",
        tuple(
            Line(_aggregation(*pair), f"batch {WORDS[pair[0]]}, sequence {WORDS[pair[1]]}", f)
            for pair, f in PAPER_AGGREGATION.items()
        ),
        (
            *_worse_than_chosen("L2 over the batch and mean over the sequence are better than"),
            Claim("width", "batch mean, sequence mean", "L2 and mean equal mean and mean", "before", equal=True),
            Claim("width", "batch l2, sequence l2", "after training, L2 and mean are better than L2 and L2"),
            Claim("width", "batch var, sequence var", "after training, L2 and mean are better than var and var"),
        ),
        ("8T loss, untrained", "WikiText-2 loss, untrained"),
        note="Three of the others are trained as well, which the paper shows for two (figure 5).",
    ),
    "table14": Table(
        "Table 14: importance measured once or again and again",
        "hidden 6144 → 4096 in T rounds, 1.8B tokens",
        (
            Line("embedding in 1 round", "T = 1", ("5.43", "1.92")),
            Line("embedding in 2 rounds", "T = 2", ("5.55", "1.92")),
            Line("embedding in 4 rounds", "T = 4", ("5.24", "1.92")),
        ),
        (
            Claim("embedding in 1 round", "embedding in 2 rounds", "one round equals two, trained", equal=True),
            Claim("embedding in 1 round", "embedding in 4 rounds", "one round equals four, trained", equal=True),
        ),
        ("loss before", "loss after"),
    ),
    "table15": Table(
        "Table 15: losses, width-pruned",
        "Nemotron-3 8B",
        (
            Line("label and MSE", "label + MSE", ("2.144",)),
            Line("label and reverse KL", "label + reverse KL", ("2.140",)),
            Line("label and cosine", "label + cosine", ("2.134",)),
            Line("label and KL", "label + KL", ("2.117",)),
            Line("width", "KL alone", ("2.107",)),
            Line("text alone", "label alone (conventional)", ()),
        ),
        (
            Claim("width", "label and KL", "KL alone is better than with the label"),
            Claim("label and KL", "label and MSE", "KL is better than MSE"),
            Claim("label and KL", "label and reverse KL", "KL is better than reverse KL"),
            Claim("label and KL", "label and cosine", "KL is better than cosine"),
            Claim("width", "text alone", "KL is better than conventional training (practice 5)"),
        ),
        ("loss after",),
        note="MSE and cosine are those of probabilities.",
    ),
    "table16": Table(
        "Table 16: KL or reverse KL, depth-pruned",
        "8B of 16 layers",
        (Line("depth, reverse KL", "reverse KL", ("2.665",)), Line("depth", "KL", ("2.155",))),
        (Claim("depth", "depth, reverse KL", "KL is better than reverse KL"),),
        ("loss after",),
    ),
    "table17": Table(
        "Table 17: intermediate losses, depth-pruned",
        "32 layers cut to 16; layers counted from 0",
        (
            Line("depth", "logits", ("2.155",)),
            Line("output 29:13", "+ output 29:13", ("2.145",)),
            Line("output 15:15, embedding", "+ output 15:15, embedding", ("2.240",)),
            Line("output 29:15, embedding", "+ output 29:15, embedding", ("2.203",)),
            Line("output 31:15, embedding", "+ output 31:15, embedding", ("2.180",)),
            Line("output 28:12, embedding", "+ output 28:12, embedding", ("2.141",)),
            Line("output 29:13, embedding", "+ output 29:13, embedding", ("2.141",)),
            Line("output 29:13, embedding, MLP input", "+ output 29:13, embedding, MLP input", ("2.141",)),
        ),
        (
            Claim("output 29:13", "depth", "the output of the third layer from the end helps"),
            Claim("output 29:13, embedding", "output 29:13", "the embedding helps in addition"),
            Claim("depth", "output 15:15, embedding", "a wrong mapping (15:15) is worse than none"),
            Claim("depth", "output 29:15, embedding", "the student's last layer (29:15) is worse than none"),
            Claim("output 29:13, embedding", "output 31:15, embedding", "29:13 is better than 31:15"),
            Claim("output 29:13, embedding", "output 28:12, embedding", "28:12 equals 29:13", equal=True),
            Claim(
                "output 29:13, embedding",
                "output 29:13, embedding, MLP input",
                "the MLP input adds nothing",
                equal=True,
            ),
        ),
        ("loss after",),
        note="Places are moved to the models here: 29:13 is the third layer from the end of each, 15 the layer that "
        "ends the teacher's first half.",
    ),
    "table18": Table(
        "Table 18: intermediate losses, width-pruned",
        "8B, 18.9B tokens",
        (
            Line("width", "logits", ("58.3 / 73.8",)),
            Line("width, intermediate", "logits and intermediate", ("58.0 / 73.6",)),
        ),
        (Claim("width", "width, intermediate", "intermediate losses do not help", equal=True),),
        ("MMLU / HellaSwag",),
    ),
    "figure7": Table(
        "Figure 7: half of the layers at once, or layer by layer",
        "16 of 32 layers, 30.2B tokens in all",
        (
            Line("one shot", "at once, then trained", ("better",)),
            Line("layer by layer", "one at a time, trained after each", ("worse, also with 2.9 times the tokens",)),
        ),
        (Claim("one shot", "layer by layer", "at once is better, at equal tokens in all"),),
        ("result",),
    ),
    "table11": Table(
        "Table 11: ways to the 4B",
        "100B tokens, or 150B where there is no teacher",
        (
            Line("small, random, text", "random start, conventional, 1.5 times the tokens", ("46.22 / 24.36",)),
            Line("small, text", "pruned, conventional, 1.5 times the tokens", ("50.85 / 24.57",)),
            Line("small, direct", "pruned from the 15B, distilled", ("51.04 / 37.81",)),
            Line("small, staged", "pruned from the distilled 8B, distilled", ("52.04 / 42.45",)),
            Line("small, direct, tokens of both stages", "pruned from the 15B, distilled twice as long", ()),
        ),
        (
            Claim("small, text", "small, random, text", "pruned is better than a random start"),
            Claim("small, direct", "small, text", "distilled is better than conventional, with fewer tokens"),
            Claim("small, staged", "small, direct", "staged is better than direct, at equal tokens of the last stage"),
            Claim(
                "small, staged",
                "small, direct, tokens of both stages",
                "staged is better than direct, at equal tokens in all",
            ),
        ),
        ("HellaSwag / MMLU",),
        note="The paper does not have the last row; practice 1 and 8 rest on the row before it.",
    ),
    "correction": Table(
        "Teacher correction (arXiv 2408.11796, section 2)",
        "text that the teacher was not trained on",
        (
            Line("teacher as it is", "teacher as it is", ("—",)),
            Line("corrected teacher", "corrected teacher", ("more than 6 % lower loss",)),
            Line("corrected, then pruned", "corrected, and pruned after that", ("as good",)),
            Line("corrected while teaching", "corrected while it teaches", ("as good",)),
        ),
        (
            Claim("corrected teacher", "teacher as it is", "a corrected teacher is better"),
            Claim(
                "corrected teacher",
                "corrected, then pruned",
                "correction does not matter for what is pruned",
                equal=True,
            ),
            Claim("corrected while teaching", "teacher as it is", "correction in parallel is better than none"),
            Claim("corrected teacher", "corrected while teaching", "correction can run in parallel", equal=True),
        ),
        ("result",),
        note="The text is the docstrings of Python's standard library, and the loss that on this text. "
        "A correction beforehand takes another unit of tokens, which the column of units does not count.",
    ),
    "removal": Table(
        "Contiguous against scattered layers (arXiv 2408.11796, figures 8 and 9)",
        "Llama 3.1 8B, 16 of 32 layers; Winogrande of the untrained model",
        (
            Line("depth", "scattered, by block influence"),
            Line("depth by perplexity", "scattered, by perplexity", ("0.5",)),
            Line("iterative by logits", "one by one, by logits (arXiv 2508.14444)", ()),
            Line("contiguous by block influence", "contiguous, by block influence"),
            Line("contiguous by perplexity", "contiguous, by perplexity", ("0.595",)),
        ),
        (
            Claim(
                "depth by perplexity",
                "contiguous by perplexity",
                "on the loss of the untrained model, scattered can look better",
                "before",
            ),
            Claim("contiguous by perplexity", "depth by perplexity", "after training, contiguous is better"),
        ),
        ("Winogrande",),
        note="The paper's claim is about accuracy on a task; models of this size are at chance on it, so the loss is "
        "compared.",
    ),
    "mamba": Table(
        "Mamba heads against channels (arXiv 2504.11409, figure 7)",
        "Nemotron-H 8B",
        (
            Line("fewer Mamba heads", "3/4 of the heads", ("lower loss",)),
            Line("fewer Mamba channels", "3/4 of the channels", ("higher loss",)),
            Line("Mamba heads", "half of the heads", ("lower loss",)),
            Line("Mamba channels", "half of the channels", ("higher loss",)),
        ),
        (
            Claim("fewer Mamba heads", "fewer Mamba channels", "heads are better to cut, to 3/4"),
            Claim("Mamba heads", "Mamba channels", "heads are better to cut, to half"),
            Claim("Mamba heads", "Mamba channels", "heads are better to cut, to half, untrained", "before"),
        ),
        ("result",),
        teacher="hybrid",
    ),
    "figure1": Table(
        "Figure 1: quality against training tokens",
        "94B tokens against 3.8T and 15T",
        (
            Line("pruned, distilled, 0.5 units", "pruned, distilled, 0.5 units"),
            Line("width", "pruned, distilled, 1 unit"),
            Line("pruned, distilled, 2 units", "pruned, distilled, 2 units"),
            Line("random, text, 1 unit", "random start, conventional, 1 unit"),
            Line("random, text, 2 units", "random start, conventional, 2 units"),
            Line("random, text, 4 units", "random start, conventional, 4 units"),
        ),
        (
            Claim(
                "pruned, distilled, 0.5 units",
                "random, text, 2 units",
                "pruned and distilled, a quarter of the tokens is enough",
            ),
        ),
    ),
    "figure9": Table(
        "Figure 9: when the ranks of candidates settle",
        "15 candidates of 8B, 400 steps; ranks settle after about 300",
        (
            Line("width", "hidden, MLP and heads 2/3"),
            Line("all axes", "hidden 3/4, MLP and heads 2/3, depth 5/6"),
            Line("MLP and heads", "MLP 7/24, heads 2/3"),
            Line("depth", "depth 1/2"),
            Line("candidate 3", "hidden 5/6, MLP 5/12, heads 2/3"),
            Line("candidate 4", "hidden 7/12, MLP 5/6, heads 2/3"),
            Line("candidate 5", "hidden 3/4, MLP 7/12, heads 2/3, depth 11/12"),
            Line("candidate 6", "hidden and heads 2/3, depth 3/4"),
        ),
        (),
    ),
}
"""All tables by the name of their command."""
