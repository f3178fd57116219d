"""Draw the pictures of the README from a finished run: `python examples/pictures.py runs/demo` writes them to docs/."""

import sys
from pathlib import Path

from minitron.reports.charts import draw_curves, draw_shape
from minitron.reports.run_files import RunFiles
from minitron.reports.svg import side_by_side

run = RunFiles(Path(sys.argv[1]))
if run.archs is None:
    sys.exit(f"{run.folder} holds no shape yet")
Path("docs/shape.svg").write_text(draw_shape(*run.archs, run.kept_layers).svg() + "\n")
Path("docs/curve.svg").write_text(side_by_side(draw_curves({"student": run.metrics}, width=280)).svg() + "\n")
