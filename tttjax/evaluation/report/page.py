"""The report as one self-contained, responsive HTML page, for light and dark mode."""

import base64
import re
from collections.abc import Iterator, Mapping
from html import escape

from tttjax.evaluation.report.results import Report
from tttjax.evaluation.report.tables import Section, Table, about_errors, about_text, sections

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1d2125; --faint: #5d6770;
  --line: #d9dee2; --mark: #f3f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171a; --text: #d5d9dc; --faint: #98a2aa; --line: #343b41; --mark: #1d2226; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 62rem; background: var(--ground);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin-top: 2.4rem; }
p.about, .section > p { color: var(--faint); font-size: .92rem; }
ul { padding-left: 1.2rem; }
li { margin: .35rem 0; }
.warnings { border-left: 4px solid #d55e00; padding: .1rem 0 .1rem .8rem; background: var(--mark); }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--ground); }
tbody tr.baseline td { background: var(--mark); }
img { display: block; width: 100%; max-width: 46rem; height: auto; margin: 1rem 0;
  padding: .5rem; border: 1px solid var(--line); background: #fff; }
pre { overflow-x: auto; background: var(--mark); padding: .7rem; font-size: .86rem; }
code { background: var(--mark); }
"""


def to_html(report: Report, images: Mapping[str, bytes]) -> str:
    """The page. images: plot name -> PNG."""
    title = escape(report.title)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style></head>",
            f"<body><h1>{title}</h1>",
            f'<p class="about">{escape(about_text(report))} {escape(about_errors(report))}</p>',
            *_body(report, images),
            "</body></html>\n",
        ]
    )


def _body(report: Report, images: Mapping[str, bytes]) -> Iterator[str]:
    if report.warnings:
        yield f'<div class="warnings">{_list(report.warnings)}</div>'
    yield "<h2>Summary</h2>"
    yield _list(report.summary)
    yield from _notes(report.notes)
    for section in sections(report):
        yield _section(section, images.get(section.plot), report.baseline.label)


def _list(sentences: tuple[str, ...]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _section(section: Section, image: bytes | None, baseline: str) -> str:
    title = escape(section.title)
    parts = [f'<div class="section"><h2>{title}</h2>', f"<p>{escape(section.text)}</p>"]
    if image:
        data = base64.b64encode(image).decode()
        parts.append(f'<img src="data:image/png;base64,{data}" alt="{title}">')
    return "\n".join([*parts, _table(section.table, baseline), "</div>"])


def _table(table: Table, baseline: str) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = []
    for row in table.rows:
        kind = ' class="baseline"' if row[0] == baseline else ""
        rows.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


# Notes -------------------------------------------------------------------------------------------


def _notes(markdown: str) -> Iterator[str]:
    """Renders the Markdown subset of notes: headings, lists, fenced code, `code`, **bold**."""
    for block in _blocks(markdown):
        lines = block.splitlines()
        if block.startswith("```"):
            yield f"<pre>{escape(chr(10).join(lines[1:-1]))}</pre>"
        elif block.startswith("#"):
            yield f"<h2>{_inline(block.lstrip('# '))}</h2>"
        elif all(line.startswith(("- ", "  ")) for line in lines):
            items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
            yield "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        else:
            yield f"<p>{_inline(block)}</p>"


def _blocks(markdown: str) -> Iterator[str]:
    """Splits at empty lines, except within fenced code."""
    for part in re.split(r"(^```.*?^```[^\n]*$)", markdown, flags=re.MULTILINE | re.DOTALL):
        if part.startswith("```"):
            yield part
        else:
            yield from (block.strip("\n") for block in re.split(r"\n\s*\n", part) if block.strip())


def _inline(text: str) -> str:
    text = escape(text.strip())
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
