"""The report as one self-contained, responsive HTML page, for light and dark mode."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from tttjax.evaluation.report.sections import Section


@dataclass(frozen=True)
class Page:
    """What a report shows, in its order.

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
    """The page from templates/report.html.jinja. images: plot name -> PNG."""
    environment = Environment(
        loader=PackageLoader("tttjax.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    data = {name: base64.b64encode(image).decode() for name, image in images.items()}
    return environment.get_template("report.html.jinja").render(
        page=page, images=data, notes=_notes(page.notes)
    )


def _notes(markdown: str) -> Markup:
    """Markdown with tables as HTML; HTML in it is shown as text."""
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    table = '<div class="scroll"><table>'
    return Markup(html.replace("<table>", table).replace("</table>", "</table></div>"))
