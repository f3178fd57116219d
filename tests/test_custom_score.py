"""The example of a custom importance score."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "custom_score.py"


def test_the_example_cuts_by_a_score_of_its_own() -> None:
    printed = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True).stdout
    teacher, *students = printed.splitlines()
    assert re.fullmatch(r"teacher: perplexity \d+\.\d\d", teacher)
    lines = [re.fullmatch(r"(\w+): perplexity (\d+\.\d\d) before training, .* layer 0: \[(.*)\]", s) for s in students]
    assert all(lines)
    names, perplexities, kept = zip(*(line.groups() for line in lines if line), strict=True)
    assert names == ("activation", "wanda", "contribution")
    assert len(set(kept)) == 3  # every score keeps other neurons
    assert all(len(neurons.split(", ")) == 16 for neurons in kept)
    assert all(float(perplexity) > float(teacher.split()[-1]) for perplexity in perplexities)
