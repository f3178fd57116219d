"""The example of a custom importance score."""

import re
import runpy
from pathlib import Path

from tests.processes import exit_code, start

EXAMPLE = Path(__file__).parent.parent / "examples" / "custom_score.py"


def test_the_example_cuts_by_a_score_of_its_own(tmp_path: Path) -> None:
    # In a process of its own, since it adds to a table.
    process = start(runpy.run_path, str(EXAMPLE), None, "__main__", log=tmp_path / "log")
    assert exit_code(process) == 0, (tmp_path / "log").read_text()[-2000:]
    printed = [line for line in (tmp_path / "log").read_text().splitlines() if ": perplexity " in line]
    teacher, *students = printed
    assert re.fullmatch(r"teacher: perplexity \d+\.\d\d", teacher)
    lines = [re.fullmatch(r"(\w+): perplexity (\d+\.\d\d) before training, .* layer 0: \[(.*)\]", s) for s in students]
    assert all(lines)
    names, perplexities, kept = zip(*(line.groups() for line in lines if line), strict=True)
    assert names == ("input_of_second", "first_linear", "wanda", "contribution")
    assert len(set(kept)) == 4  # every score keeps other neurons
    assert all(len(neurons.split(", ")) == 16 for neurons in kept)
    assert all(float(perplexity) > float(teacher.split()[-1]) for perplexity in perplexities)
