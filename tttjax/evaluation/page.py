"""Results as one self-contained, responsive HTML page for light and dark mode, and as Markdown."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from tttjax.evaluation import tables


@dataclass(frozen=True)
class Section:
    """A heading with text, a table, and the name of a plot ("" for none)."""

    title: str
    text: str
    table: pd.DataFrame
    plot: str = ""


@dataclass(frozen=True)
class Page:
    """What a page shows, in its order.

    main: name of the plot at the top. highlights: the sentences below it. about: what was
    evaluated. summary: all other sentences. notes: Markdown.
    """

    title: str
    main: str
    highlights: Sequence[str]
    about: str
    warnings: Sequence[str]
    summary: Sequence[str]
    notes: str
    sections: Sequence[Section]
    baseline: str


def to_html(page: Page, images: Mapping[str, bytes]) -> str:
    """The page from templates/page.html.jinja. images: plot name -> PNG."""
    environment = Environment(
        loader=PackageLoader("tttjax.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    data = {name: base64.b64encode(image).decode() for name, image in images.items()}
    return environment.get_template("page.html.jinja").render(
        page=page, images=data, notes=_notes(page.notes)
    )


def to_markdown(page: Page) -> str:
    """The page as Markdown; plots are separate files."""
    parts = [f"# {page.title}", f"![{page.title}]({page.main}.png)"]
    parts += ["\n".join(f"- {sentence}" for sentence in page.highlights), page.about]
    parts.append("\n".join(f"- **Note:** {warning}" for warning in page.warnings))
    for section in page.sections:
        parts += [f"## {section.title}", section.text, tables.to_markdown(section.table)]
        if section.plot and section.plot != page.main:
            parts.append(f"![{section.title}]({section.plot}.png)")
    if page.summary:
        parts += ["## All comparisons", "\n".join(f"- {sentence}" for sentence in page.summary)]
    if page.notes:
        parts += ["## Notes", page.notes.strip()]
    return "\n\n".join(filter(None, parts)) + "\n"


def _notes(markdown: str) -> Markup:
    """Markdown with tables as HTML; HTML in it is shown as text."""
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    table = '<div class="scroll"><table>'
    return Markup(html.replace("<table>", table).replace("</table>", "</table></div>"))
