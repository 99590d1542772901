"""Dense and slim accuracy over generations as a picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdfast.analysis.records import read_text
from kdfast.errors import UserError

_RATE, _TOP1 = "Split Rate", "Current Tst Top 1"
_DENSE, _SLIM = "#0072B2", "#D55E00"


def read_generations(path: Path) -> dict[str, list[float]]:
    """Test top-1 in percent by generation, of `dense` and `slim`, from a generations.csv.

    The two published columns are enough. `slim` is empty where no generation has a slim network.

    Raises `UserError` for a file that is damaged; the message names the line.
    """
    reader = csv.DictReader(read_text(path).splitlines())
    if not {_RATE, _TOP1} <= set(reader.fieldnames or ()):
        raise UserError(f"{path}, line 1: expected columns {_RATE} and {_TOP1}")
    found: dict[str, list[float]] = {"dense": [], "slim": []}
    for row in reader:
        try:
            score = float(row[_TOP1])
        except (TypeError, ValueError):
            score = -1.0
        if not 0 <= score <= 100:
            where = f"{path}, line {reader.line_num}"
            raise UserError(f"{where}: expected {_TOP1} in [0, 100], got {row[_TOP1]!r}")
        found["slim" if row[_RATE] == "slim" else "dense"].append(score)
    if not found["dense"] or len(found["slim"]) not in (0, len(found["dense"])):
        raise UserError(f"{path}: expected a dense row a generation, and as many slim ones or none")
    if not any(found["slim"]):
        found["slim"] = []  # zeros stand for no slim network
    return found


def draw_generations(path: Path, title: str) -> bytes:
    """A PNG of test top-1 over generations, one line for dense and one for slim networks.

    From the file at `path` alone; raises `UserError` as `read_generations` does.
    """
    scores = read_generations(path)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for name, colour, marker in (("dense", _DENSE, "o"), ("slim", _SLIM, "s")):
        values = scores[name]
        if values:
            label = f"{name}  {values[-1]:.2f}"
            panel.plot(values, color=colour, marker=marker, ms=5, lw=1.8, label=label)
    panel.set_ylim(-3, 103)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("generation")
    panel.set_ylabel("test top1 (%)")
    panel.set_title(title, fontsize=10, parse_math=False, wrap=True)
    panel.grid(alpha=0.25)
    panel.legend(loc="lower right")
    picture = io.BytesIO()
    # Without the version the same file gives the same bytes.
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    return picture.getvalue()
