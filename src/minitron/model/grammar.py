"""The grammar in which a family is written: one row per tensor, one axis per dimension.

    model.embed_tokens.weight                  vocab hidden
    model.layers.{i}.self_attn.q_proj.weight   (query head_dim) hidden
    model.layers.{i}.self_attn.q_proj.bias     (query head_dim)            if attention_bias
    lm_head.weight                             vocab hidden                if not tie_word_embeddings
    (phi3) …self_attn.qkv_proj.weight          (query head_dim | kv head_dim | kv head_dim) hidden
    (mixtral) ….experts.{e}.w1.weight          ffn hidden
    (nemotron_h) ….mixer.D                     mhead                       in mamba

A dimension is an axis, or in parentheses a product of axes and integers, outermost first; `|` joins
products one after the other. `{i}` stands for the layer, `{e}` for the expert. `in` names the one kind of
layer that has the tensor, `if` a boolean of the config or several (`if A and not B`). `as buffer` marks what
is stored and cut but is no parameter. The shape `-` marks a buffer that old checkpoints carry and nobody reads.
"""

import re

from minitron.model.anatomy import AXES, KINDS, Dimension, Factor, Norm, Row, Tap


def parse_rows(table: str) -> tuple[Row, ...]:
    """Read a table, a row a line; blank lines and lines starting with `#` are skipped."""
    return tuple(_parse_row(line.strip()) for line in _lines(table))


def parse_taps(table: str) -> tuple[Tap, ...]:
    """Read lines of `axis  module  input|output|routed`, with `[n]` for a stretch, `in KIND`, `as CHOICE`."""
    taps = []
    for line in _lines(table):
        found = re.fullmatch(
            r"\s*(?:\((?P<product>[^)]*)\)|(?P<axis>\w+))\s+(?P<module>\S+)\s+(?P<side>input|output|routed)"
            r"(?:\[(?P<stretch>\d)\])?(?:\s+in (?P<kind>\w+))?(?:\s+as (?P<choice>\w+))?\s*",
            line,
        )
        axes = tuple((found["product"] or found["axis"]).split()) if found else ()
        if not found or not set(axes) <= set(AXES) or found["kind"] not in {None, *KINDS.values()}:
            raise ValueError(f"not a tap: {line!r}")
        stretch = None if found["stretch"] is None else int(found["stretch"])
        taps.append(Tap(axes, found["module"], found["side"], stretch, found["kind"], found["choice"]))
    return tuple(taps)


def parse_norms(table: str) -> tuple[Norm, ...]:
    """Read lines of `module  reader reader …`, with `if FLAG`; a reader is a part of a row's name."""
    norms = []
    for line in _lines(table):
        body, _, condition = line.partition(" if ")
        module, *readers = body.split()
        norms.append(Norm(module, tuple(readers), condition.strip() or None))
    return tuple(norms)


def _lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.strip() and not line.strip().startswith("#")]


def _parse_row(line: str) -> Row:
    found = re.fullmatch(
        r"(?P<name>\S+)\s+(?P<shape>.+?)(?:\s+in (?P<kind>\w+))?"
        r"(?:\s+if (?P<condition>(?:not )?\w+(?: and (?:not )?\w+)*))?(?P<buffer>\s+as buffer)?",
        line,
    )
    if not found or found["kind"] not in {None, *KINDS.values()}:
        raise ValueError(f"not a row: {line!r}")
    if found["shape"] == "-":
        return Row(found["name"], (), is_ignored=True)
    dimensions = tuple(_parse_dimension(dim) for dim in re.findall(r"\([^)]*\)|[^\s()]+", found["shape"]))
    return Row(found["name"], dimensions, found["kind"], found["condition"], is_buffer=bool(found["buffer"]))


def _parse_dimension(text: str) -> Dimension:
    return tuple(tuple(_parse_factor(word) for word in segment.split()) for segment in text.strip("()").split("|"))


def _parse_factor(word: str) -> Factor:
    if word.isdigit():
        return int(word)
    if word not in AXES:
        raise ValueError(f"unknown axis {word!r}; known: {', '.join(AXES)}")
    return word
