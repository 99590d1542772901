"""A table as CSV, Markdown and one self-contained HTML page, written file by file, each whole."""

from __future__ import annotations

import base64
import csv
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdfast.analysis.curves import draw_curves
from kdfast.analysis.pivot import pivot
from kdfast.analysis.runs import Unfinished
from kdfast.analysis.table import Block, Row, Spread, Table
from kdfast.errors import UserError

Cell = tuple[str, bool]  # text, and whether it is bold

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: .3rem .8rem; text-align: right }
th { background: #f5f5f5 } th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
"""


def write_report(
    folder: Path, table: Table, unfinished: Sequence[Unfinished] = (), title: str = "Report"
) -> list[Path]:
    """Write `report.csv`, `report.md`, `curves.png` and `report.html` into `folder`.

    Returns their paths; raises `UserError` when one cannot be written.
    """
    picture = draw_curves(table)
    files: dict[str, str | bytes] = {
        "report.csv": as_csv(table),
        "report.md": as_markdown(table, unfinished, title, picture="curves.png"),
        "curves.png": picture,
        "report.html": as_html(table, unfinished, title, picture),
    }
    return write_files(folder, files)


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> list[Path]:
    """Write files into `folder`, made if need be; a reader sees an old file or the new one.

    Raises `UserError` when one cannot be written.
    """
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            path, temporary = folder / name, folder / f".{name}.{os.getpid()}.tmp"
            try:
                data = content if isinstance(content, bytes) else content.encode()
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            paths.append(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {error.filename or folder}: {reason}") from None
    return paths


def as_csv(table: Table) -> str:
    """A line a row of every block; numbers in full, `*_by_seed` in the order of `seeds`."""
    lines = []
    for block in table.blocks:
        for row in block.rows:
            line = {
                "dataset": block.dataset,
                "teacher": block.teacher or "-",
                "student": block.student,
                "method": row.label,
                "metric": table.metric,
                "runs": len(row.runs),
                "seeds": " ".join(map(str, row.seeds)),
                "epochs": row.runs[0].epochs,
                "parameters": row.runs[0].parameters,
                "leads": int(row.leads),
            }
            for name, spread in (
                ("last", row.last),
                ("best", row.best),
                ("teacher_top1", row.teacher_top1),
                ("gain", row.gain),
            ):
                line[f"{name}_mean"] = spread.mean if spread else ""
                line[f"{name}_std"] = spread.std if spread and spread.std is not None else ""
            line["gain_kind"] = _kind(row)
            for which in ("last", "best"):
                scores = (str(getattr(run, which)[table.metric]) for run in row.runs)
                line[f"{which}_by_seed"] = " ".join(scores)
            lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_markdown(
    table: Table,
    unfinished: Sequence[Unfinished] = (),
    title: str = "Report",
    *,
    picture: str,
    more: Sequence[str] = (),
) -> str:
    """The page as Markdown; `picture` is the link to the curves, `more` are lines for its end."""
    lines = [f"# {_plain(title)}", ""]
    for heading, cells in _tables(table):
        lines += [f"## {_plain(heading)}", "", *_markdown_table(cells), ""]
    lines += [f"![{table.metric} over epochs]({picture})", ""]
    for heading, items in _lists(table, unfinished):
        lines += [f"## {heading}", "", *(f"* {_plain(item)}" for item in items), ""]
    return "\n".join([*lines, *more]).rstrip("\n") + "\n"


def as_html(table: Table, unfinished: Sequence[Unfinished], title: str, picture: bytes) -> str:
    """The page as HTML that asks nothing of the net, `picture` (PNG) inside."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for heading, cells in _tables(table):
        parts += [f"<h2>{html.escape(heading)}</h2>", *_html_table(cells)]
    data = base64.b64encode(picture).decode()
    parts.append(f'<img alt="{table.metric} over epochs" src="data:image/png;base64,{data}">')
    for heading, items in _lists(table, unfinished):
        inner = "".join(f"<li>{html.escape(item)}</li>" for item in items)
        parts.append(f"<h2>{heading}</h2><ul>{inner}</ul>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _tables(table: Table) -> list[tuple[str, list[list[Cell]]]]:
    """Headings with tables as lines of cells, the first line the head: overview, then blocks."""
    found = [(f"{b.dataset}: {b.networks}", _block(b, table.metric)) for b in table.blocks]
    overview = pivot(table)
    head = f"{table.metric}, last epoch (gain over the student alone)"
    return [(head, overview), *found] if overview else found


def _block(block: Block, metric: str) -> list[list[Cell]]:
    names = ["method", "seeds", f"last {metric}", f"best {metric}", "gain", "teacher top1"]
    head = [(name, False) for name in (*names, "parameters", "epochs")]
    if block.teacher is None:
        head = [cell for cell in head if cell[0] not in ("gain", "teacher top1")]
    lines = [head]
    for row in block.rows:
        texts = {
            "method": row.label,
            "seeds": f"{len(row.runs)}: {_ranges(row.seeds)}",
            f"last {metric}": row.last.text(),
            f"best {metric}": row.best.text(),
            "gain": f"{_text(row.gain, sign=True)} {_kind(row)}".strip(),
            "teacher top1": _text(row.teacher_top1),
            "parameters": f"{row.runs[0].parameters:,}",
            "epochs": str(row.runs[0].epochs),
        }
        bold = ("method", f"last {metric}") if row.leads else ()
        lines.append([(texts[name], name in bold) for name, _ in head])
    return lines


def _lists(table: Table, unfinished: Sequence[Unfinished]) -> list[tuple[str, list[str]]]:
    reading = [
        "Mean +- sample standard deviation over seeds; a single run shows none.",
        "last: the last epoch. best: the epoch of the highest top1, whose weights are "
        "best.safetensors.",
        "gain: last less that of the student alone with the same options. paired: over equal "
        "seeds, the spread that of the differences; unpaired: the difference of the means.",
        "Bold: the highest mean of the last epoch.",
    ]
    found = [("How to read it", reading)]
    if table.notes:
        found.append(("Notes", list(table.notes)))
    if unfinished:
        states = [f"{u.path}: {u.done} of {u.epochs} epochs" for u in unfinished]
        found.append(("Unfinished", states))
    return [*found, ("Made with", made_with(table))]


def made_with(table: Table) -> list[str]:
    """The versions, commits and devices of the runs, each combination once."""
    found = {}
    for run in table.runs():
        of = run.environment
        commit = str(of.get("commit") or "unknown")[:8]
        devices = [str(v) for k, v in of.items() if k in ("cpu", "device") or k.startswith("cuda:")]
        words = [
            f"kdfast {of.get('kdfast')} (commit {commit})",
            f"torch {of.get('torch')}",
            *devices,
        ]
        found[", ".join(words)] = None
    return list(found)


def _kind(row: Row) -> str:
    return {True: "paired", False: "unpaired", None: ""}[row.paired]


def _text(spread: Spread | None, *, sign: bool = False) -> str:
    return spread.text(sign=sign) if spread else ""


def _ranges(numbers: Sequence[int]) -> str:
    """`0-2, 5` of 0, 1, 2, 5."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans)


def _markdown_table(lines: list[list[Cell]]) -> list[str]:
    def render(line: list[Cell]) -> str:
        cells = (f"**{_plain(text)}**" if bold else _plain(text) for text, bold in line)
        return f"| {' | '.join(cells)} |"

    rule = "|" + "|".join(["---"] + ["---:"] * (len(lines[0]) - 1)) + "|"
    return [render(lines[0]), rule, *map(render, lines[1:])]


def _html_table(lines: list[list[Cell]]) -> list[str]:
    def render(line: list[Cell], tag: str) -> str:
        texts = (f"<b>{html.escape(t)}</b>" if bold else html.escape(t) for t, bold in line)
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    return [
        "<table>",
        render(lines[0], "th"),
        *(render(line, "td") for line in lines[1:]),
        "</table>",
    ]


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\|*`[]"} | {"<": "&lt;", "&": "&amp;"})


def _plain(text: str) -> str:
    """`text` as Markdown that means nothing but itself, on one line."""
    return " ".join(text.split()).translate(_MARKDOWN)
