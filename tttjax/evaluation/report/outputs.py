"""Report files: Markdown, an HTML page, a CSV table in long form, JSON, plots."""

import os
from pathlib import Path
from typing import Any

from tttjax.evaluation.files import to_json, write_results
from tttjax.evaluation.page import Page, to_html, to_markdown
from tttjax.evaluation.report import figures
from tttjax.evaluation.report.results import Report, SystemResult
from tttjax.evaluation.report.sections import about_errors, about_text, sections
from tttjax.evaluation.report.summary import highlights

FORMAT = 1


def write_report(report: Report, out: str | os.PathLike) -> dict[str, Path]:
    """Writes all files under `out`, each atomically; returns their paths by name."""
    images = {name: figures.image(name, report) for name in figures.PLOTS}
    page = make_page(report)
    return write_results(
        out,
        {
            **{f"{name}.png": image for name, image in images.items()},
            "report.csv": report.rows,
            "report.json": to_json(to_dict(report), report.rows),
            "report.md": to_markdown(page),
            "report.html": to_html(page, images),
        },
    )


def make_page(report: Report) -> Page:
    """What the Markdown and the HTML show."""
    first = highlights(report)
    several = len(report.lengths) > 1 and bool(report.others())
    return Page(
        title=report.title,
        main="loss_difference_by_context" if several else "loss_by_position",
        highlights=first,
        about=f"{about_text(report)} {about_errors(report)}",
        warnings=report.warnings,
        summary=[sentence for sentence in report.summary if sentence not in first],
        notes=report.notes,
        sections=sections(report),
        baseline=report.baseline.label,
    )


def to_dict(report: Report) -> dict[str, Any]:
    """All but the rows, as plain values; docs/report.md describes the keys."""
    return {
        "format": FORMAT,
        "title": report.title,
        "text": report.text,
        "baseline": report.baseline.label,
        "context_lengths": report.lengths,
        "window": report.window,
        "errors": about_errors(report),
        "warnings": report.warnings,
        "summary": report.summary,
        "notes": report.notes,
        "systems": [_system(system) for system in report.systems],
    }


def _system(system: SystemResult) -> dict[str, Any]:
    runs = {run.workdir: run for runs in system.runs.values() for run in runs}
    return {
        "label": system.label,
        "mode": system.mode,
        "inner": system.inner,
        "parameters": system.parameters,
        "runs": [vars(run) for run in runs.values()],
    }
