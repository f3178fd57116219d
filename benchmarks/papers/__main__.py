"""One command per table of the papers.

    python -m benchmarks.papers table13 --out FOLDER [--teacher deep] [--tokens 60k] [--seeds 3]
    python -m benchmarks.papers all --out FOLDER
    python -m benchmarks.papers page --out FOLDER [--document docs/papers.md]

The first command with a folder writes two texts into it and trains a teacher, in a quarter of an hour on one core; a
folder of one's own may be named as the teacher. Each student adds a row to `FOLDER/TEACHER.jsonl`. A command that is
started again continues after the last row. `page` writes the tables and their verdicts at the end of a document; rows
that were measured for docs/papers.md lie in benchmarks/papers/results.
"""

import argparse
from pathlib import Path

import minitron
from benchmarks.papers.arms import ARMS
from benchmarks.papers.page import write_page
from benchmarks.papers.runner import Bench, run
from benchmarks.papers.tables import TABLES
from benchmarks.papers.teachers import TEACHERS, train_teacher, write_texts
from minitron.quantities import parse_count

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run a table, all tables, or write their page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=[*TABLES, "all", "page"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--teacher", help=f"{', '.join(TEACHERS)}, or a folder; by default the table's own")
    parser.add_argument("--tokens", type=parse_count, default=60_000, help="tokens in a unit of training")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, counted from 0")
    parser.add_argument("--document", type=Path, default=Path("docs/papers.md"))
    options = parser.parse_args()
    if options.table == "page":
        write_page(options.out, options.document)
        return
    minitron.configure_backends()
    minitron.disable_progress()
    names = list(TABLES) if options.table == "all" else [options.table]
    for seed in range(options.seeds):
        for name in names:
            run_table(name, options.out, options.teacher or TABLES[name].teacher, options.tokens, [seed])


def run_table(name: str, out: Path, teacher: str, tokens: int, seeds: list[int]) -> None:
    """Run the arms of a table that have no row yet; texts and teacher are made first where they are missing."""
    texts = out / "texts"
    write_texts(texts)
    folder = train_teacher(teacher, out / "teachers", texts) if teacher in TEACHERS else Path(teacher)
    run(Bench(out, folder, texts, tokens), {arm: ARMS[arm] for arm in TABLES[name].arms}, seeds)


if __name__ == "__main__":
    main()
