"""The papers' tables: one of them at tiny size, the rows that are there, and the verdicts."""

import json
import math
from pathlib import Path

import pytest

from benchmarks.papers.__main__ import run_table
from benchmarks.papers.arms import ARMS
from benchmarks.papers.page import MARK, write_page
from benchmarks.papers.runner import Row, layer_number, shape_of
from benchmarks.papers.tables import TABLES, Claim
from benchmarks.papers.verdicts import Verdict, differences, noise_of, rank_correlation
from minitron.files import read_jsonl, write_jsonl
from tests.conftest import make_model, variant_arch

CLAIM = Claim("a", "b", "a is better")


@pytest.fixture
def texts(tmp_path: Path, text_file: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("wiki", "wiki-kept-out", "docstrings", "docstrings-kept-out"):
        lines = text_file.read_text(encoding="utf-8").splitlines()[:40]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder


def test_a_table_from_rows_to_page(tmp_path: Path, texts: Path) -> None:
    teacher, out = make_model(tmp_path / "models" / "deep", "nemotron"), texts.parent

    def made(seed: int) -> list[Row]:
        run_table("table16", out, str(teacher), 1024, [seed])
        return read_jsonl(out / "deep.jsonl")

    first = made(0)
    assert [row["arm"] for row in first] == ["depth, reverse KL", "depth"]
    for row in first:
        assert row["sizes"]["num_hidden_layers"] == 2
        assert (row["seed"], row["tokens"], row["context"]) == (0, 1024, 128)
        assert {"torch", "transformers", "minitron"} <= set(row["versions"])
        assert "commit" in row
        assert row["machine"]
        assert math.isfinite(row["before"]["kl"])
        assert row["after"] != row["before"]
    assert first[0]["before"] == first[1]["before"]
    assert first[0]["after"] != first[1]["after"]
    # Rows that are there are kept; one that is missing is made again, to equal figures.
    assert made(0) == first
    write_jsonl(out / "deep.jsonl", first[:1])
    again = made(0)
    assert again[0] == first[0]
    assert [row["after"] for row in again] == [row["after"] for row in first]
    assert again[1]["before"] == first[1]["before"]
    both = made(1)
    assert len(both) == 4
    assert both[2]["after"] != both[0]["after"]

    document = tmp_path / "page.md"
    document.write_text(f"# Kept\n\n{MARK}\n\nReplaced.\n", encoding="utf-8")
    write_page(out, document)
    page = document.read_text(encoding="utf-8")
    assert page.startswith("# Kept")
    assert "Replaced" not in page
    assert f"### {TABLES['table16'].title}" in page
    assert "| KL is better than reverse KL |" in page
    assert "seeds 0, 1" in page
    write_page(out, document)
    assert document.read_text(encoding="utf-8") == page


def test_every_line_and_claim_names_an_arm() -> None:
    for table in TABLES.values():
        assert set(table.arms) <= set(ARMS)
        assert {arm for claim in table.claims for arm in (claim.better, claim.worse)} <= set(table.arms)
        assert all(len(line.paper) in {0, len(table.paper_columns)} for line in table.lines)


def rows_of(**losses: list[float]) -> list[Row]:
    return [
        {"arm": arm, "seed": seed, "after": {"loss": loss, "kl": 0.0}}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("better", "worse", "noise", "equal", "expected"),
    [
        ([3.0, 3.1], [3.2, 3.3], 0.05, False, "holds"),
        ([3.2, 3.3], [3.0, 3.1], 0.05, False, "does not hold"),
        ([3.0, 3.1], [3.01, 3.11], 0.05, False, "not beyond noise"),
        ([3.0, 3.1], [3.2, 3.0], 0.01, False, "not beyond noise"),
        ([3.0], [3.2], 0.05, False, "holds"),
        ([3.0], [3.2], math.nan, False, "not beyond noise"),
        ([3.0, 3.1], [3.005, 3.105], 0.01, True, "holds"),
        ([3.0, 3.1], [3.005, 3.105], 0.05, True, "not beyond noise"),
        ([3.0, 3.1], [3.2, 3.3], 0.05, True, "does not hold"),
        ([3.0, 3.1], [3.03, 3.13], 0.05, True, "not beyond noise"),
        ([3.0, 3.1], [], 0.05, False, "not measured"),
    ],
)
def test_verdicts(better: list[float], worse: list[float], noise: float, equal: bool, expected: str) -> None:
    claim = Claim("a", "b", "a and b", equal=equal)
    assert Verdict(claim, differences(claim, rows_of(a=better, b=worse)), noise).in_words == expected


def test_noise_is_that_of_differences_between_seeds() -> None:
    rows = rows_of(a=[3.0, 9.0], b=[3.1, 9.3], c=[3.0, 9.0])
    assert noise_of([CLAIM], rows) == pytest.approx(0.2 / math.sqrt(2))
    other = Claim("a", "c", "a and c")
    assert noise_of([CLAIM, other], rows) == pytest.approx(0.1)
    assert math.isnan(noise_of([CLAIM], [row for row in rows if row["seed"] == 0]))


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [4.0, 5.0, 9.0]) == 1
    assert rank_correlation([1.0, 2.0, 3.0], [9.0, 5.0, 4.0]) == -1
    assert rank_correlation([1.0, 2.0, 3.0], [4.0, 9.0, 5.0]) == 0.5


def test_places_are_those_of_the_paper() -> None:
    assert [layer_number(place, 32) for place in (-3, -1, 0.5, 0.75)] == [29, 31, 15, 23]
    assert [layer_number(place, 16) for place in (-3, -1, -4)] == [13, 15, 12]


def test_shapes_are_shares_in_whole_groups() -> None:
    arch = variant_arch("nemotron")
    shape = shape_of(arch, {"hidden_size": 2 / 3, "num_attention_heads": 2 / 3, "num_hidden_layers": 1 / 2})
    assert (shape.sizes["hidden_size"], shape.sizes["num_attention_heads"], shape.axis_size("layer")) == (32, 3, 2)
    assert shape.sizes["intermediate_size"] == arch.sizes["intermediate_size"]
