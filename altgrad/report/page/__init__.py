"""The page of a report: one HTML file with its data, its style and its script, which asks the network for nothing."""

import json
import math
from importlib.resources import files
from pathlib import Path

from ..assign import Assignment
from ..candidates import candidate
from ..results import Report, finite, write_files


def write(report: Report, folder: str | Path, choice: Assignment | None = None) -> list[Path]:
    """Writes report.json and report.html to a folder, both or none; choice, of :func:`assign`, is marked in the page.

    Raises:
        OSError: no such folder, or one that cannot be written to.

    Example:
        >>> import tempfile
        >>> from altgrad.report import Report, write
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [path.name for path in write(Report("model.pt", [], [], []), folder)]
        ['report.json', 'report.html']
    """
    paths = [Path(folder) / "report.json", Path(folder) / "report.html"]
    write_files(dict(zip(paths, (report.to_json(), render(report, choice)))))
    return paths


def render(report: Report, choice: Assignment | None = None) -> str:
    """The page as text; choice, of :func:`assign`, is marked in it.

    Example:
        >>> from altgrad.report import Report
        >>> from altgrad.report.page import render
        >>> render(Report("model.pt", [], [], [])).splitlines()[0]
        '<!doctype html>'
    """
    parts = {name: files(__name__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")}
    parts["data"] = json.dumps(finite(_data(report, choice)), allow_nan=False).replace("<", "\\u003c")
    page = files(__name__).joinpath("page.html").read_text(encoding="utf-8")
    before, *others = page.split("{{")
    pieces = (rest.partition("}}") for rest in others)
    return before + "".join(parts[name] + after for name, _, after in pieces)


def _data(report: Report, choice: Assignment | None) -> dict[str, object]:
    """What the script draws: scores in the order of Score's fields, octaves, and what is recommended."""
    chosen = {} if choice is None else choice.choices
    formats = {name: candidate(name).format for name in report.candidates}
    return {
        "source": report.source,
        "loss": report.loss,
        "budget": None if choice is None else {"bits": choice.bits, "predicted": choice.predicted, "loss": choice.loss},
        # octaves from the smallest positive to the largest value of a format
        "candidates": [
            {"name": name, "octaves": math.log2(f.max_representable_value / f.smallest_subnormal)}
            for name, f in formats.items()
        ],
        "layers": [
            {
                "name": layer.name,
                "operand": layer.operand,
                "shape": "x".join(map(str, layer.shape)) or "scalar",
                "dtype": layer.dtype,
                "matrix": layer.is_matrix,
                "count": layer.count,
                "zeros": layer.zeros,
                "nan": layer.nan,
                "infinite": layer.infinite,
                "also": layer.also,
                "octaves": sorted(layer.octaves.items()),
                "scores": [list(layer.scores[name]) for name in report.candidates],
                "chosen": chosen.get(layer.module, {}).get(layer.operand),
            }
            for layer in report.layers
        ],
        "left_out": report.left_out,
    }
