"""The grammar in which a family is written: one row per tensor, one axis per dimension.

    model.embed_tokens.weight                  vocab hidden
    model.layers.{i}.self_attn.q_proj.weight   (query head_dim) hidden
    model.layers.{i}.self_attn.q_proj.bias     (query head_dim)            if attention_bias
    lm_head.weight                             vocab hidden                if not tie_word_embeddings
    (phi3) …self_attn.qkv_proj.weight          (query head_dim | kv head_dim | kv head_dim) hidden
    (mixtral) ….experts.{e}.w1.weight          ffn hidden
    (nemotron_h) ….mixer.D                     mhead                       in mamba

A dimension is an axis, or in parentheses a product of axes and integers, outermost first; `|` joins products one after
the other; `a+b` stands for two axes one after the other within every entry of the axes to the left of it. The shape
`()` is a single number. `{i}` stands for the layer, `{e}` for the expert. `in` names the only kind of layer that has
the tensor, `if` a config boolean or several (`if A and not B`). `as buffer` marks a tensor that is stored and cut but
not counted. The shape `-` marks a buffer of old checkpoints that no model reads.
"""

import re

from minitron.model.anatomy import AXES, KINDS, Dimension, Factor, Norm, Row, Tap

IN_KIND = r"(?:\s+in (?P<kind>\w+))?"
IF_CONDITION = r"(?:\s+if (?P<condition>(?:not )?\w+(?: and (?:not )?\w+)*))?"


def parse_rows(table: str) -> tuple[Row, ...]:
    """Read the rows of a table, one per line.

    Raises:
        ValueError: a line is not a row, or names an unknown axis.
    """
    return tuple(_parse_row(line.strip()) for line in _lines(table))


def parse_taps(table: str) -> tuple[Tap, ...]:
    """Read taps, one per line: `axis  module  input|output|routed`.

    A line may continue with `[n]` for a stretch, then `in KIND`, `as CHOICE` and `if CONDITION`.

    Raises:
        ValueError: a line is not a tap.
    """
    return tuple(_parse_tap(line.strip()) for line in _lines(table))


def parse_norms(table: str) -> tuple[Norm, ...]:
    """Read norms, one per line: `module  reader reader …`, with `if FLAG`; a reader is a part of a row's name."""
    norms = []
    for line in _lines(table):
        body, _, condition = line.partition(" if ")
        module, *readers = body.split()
        norms.append(Norm(module, tuple(readers), condition.strip() or None))
    return tuple(norms)


def _lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.strip() and not line.strip().startswith("#")]


def _parse_row(line: str) -> Row:
    match = re.fullmatch(rf"(?P<name>\S+)\s+(?P<shape>.+?){IN_KIND}{IF_CONDITION}(?P<buffer>\s+as buffer)?", line)
    if not match or match["kind"] not in {None, *KINDS.values()}:
        raise ValueError(f"not a row: {line!r}")
    if match["shape"] == "-":
        return Row(match["name"], (), is_ignored=True)
    if match["shape"] == "()":
        return Row(match["name"], (), match["kind"], match["condition"], is_buffer=bool(match["buffer"]))
    dimensions = tuple(_parse_dimension(dim) for dim in re.findall(r"\([^)]*\)|[^\s()]+", match["shape"]))
    return Row(match["name"], dimensions, match["kind"], match["condition"], is_buffer=bool(match["buffer"]))


def _parse_dimension(text: str) -> Dimension:
    return tuple(tuple(_parse_factor(word) for word in segment.split()) for segment in text.strip("()").split("|"))


def _parse_factor(word: str) -> Factor:
    if word.isdigit():
        return int(word)
    if not set(word.split("+")) <= AXES.keys():
        raise ValueError(f"unknown axis {word!r}; known: {', '.join(AXES)}")
    return word


def _parse_tap(line: str) -> Tap:
    match = re.fullmatch(
        r"(?:\((?P<product>[^)]*)\)|(?P<axis>\w+))\s+(?P<module>\S+)\s+(?P<side>input|output|routed)"
        rf"(?:\[(?P<stretch>\d)\])?{IN_KIND}(?:\s+as (?P<choice>\w+))?{IF_CONDITION}",
        line,
    )
    axes = tuple((match["product"] or match["axis"]).split()) if match else ()
    if not match or not set(axes) <= set(AXES) or match["kind"] not in {None, *KINDS.values()}:
        raise ValueError(f"not a tap: {line!r}")
    stretch = None if match["stretch"] is None else int(match["stretch"])
    return Tap(axes, match["module"], match["side"], stretch, match["kind"], match["choice"], match["condition"])
