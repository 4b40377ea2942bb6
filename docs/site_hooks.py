"""Hooks of the documentation site (mkdocs.yml).

Pages are written for a code host, which shows notebooks, and where a link may lead to any file of
the repository. Here such files become pages of their own, README.md the first one, and links are
rewritten to their pages.
"""

import json
import os
import re
from pathlib import Path, PurePosixPath

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")
FILE_NAME = re.compile(r"\[[\w./]+\.md\](?=\(([^)#\s]+))")  # as the text of a link


def _target(page: PurePosixPath, link: str) -> PurePosixPath:
    """What a link of a file means, both relative to the root of the repository."""
    return PurePosixPath(os.path.normpath(page.parent / link))


def _uri(path: PurePosixPath) -> str:
    """The place in the site of a file of the repository."""
    if path == PurePosixPath("README.md"):
        return "index.md"
    if path.parts[0] == "docs":
        path = path.relative_to("docs")
        return str(path.with_suffix(".md") if path.suffix == ".ipynb" else path)
    return str(path) if path.suffix == ".md" else f"{path}.md"


def _path(uri: str) -> PurePosixPath:
    """The file of the repository that a page was made of."""
    path = PurePosixPath("README.md" if uri == "index.md" else uri)
    inside = PurePosixPath("docs") / path
    files = (inside, inside.with_suffix(".ipynb"), path)
    return next((p for p in files if (ROOT / p).is_file()), path)


def _content(path: PurePosixPath) -> str:
    text = (ROOT / path).read_text()
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        return notebook_page(json.loads(text))
    language = path.suffix.removeprefix(".") or "text"
    return f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n````{language}\n{text}````\n"


def notebook_page(notebook) -> str:
    """A notebook as Markdown: texts, code, what it printed and drew."""
    blocks = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            printed = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
            if image := "".join(data.get("image/png", "")).replace("\n", ""):
                blocks.append(
                    f'<img alt="output of the cell above" src="data:image/png;base64,{image}">'
                )
            elif printed:
                blocks.append(f"```text\n{printed}\n```")
    return "\n\n".join(blocks) + "\n"


def _notebooks(config) -> list[PurePosixPath]:
    """The notebooks that exist, in the order of mkdocs.yml, others last."""
    order = config.extra["notebooks"]
    found = (ROOT / "docs" / "notebooks").glob("*.ipynb")
    found = sorted(found, key=lambda p: (order.index(p.stem) if p.stem in order else len(order), p))
    return [PurePosixPath(path.relative_to(ROOT)) for path in found]


def on_config(config):
    """Adds the notebooks to the navigation, after the first section."""
    if notebooks := [_uri(path) for path in _notebooks(config)]:
        config.nav.insert(2, {"Notebooks": notebooks})
    return config


def on_files(files, config):
    """Adds README.md, the notebooks, and every file that a page links to."""
    pages = [PurePosixPath("docs", file.src_uri) for file in files.documentation_pages()]
    pages += [PurePosixPath("README.md"), *_notebooks(config)]
    for page in pages:
        if files.get_file_from_path(_uri(page)) is None:
            files.append(File.generated(config, _uri(page), content=_content(page)))
        if page.suffix in (".md", ".ipynb"):
            targets = {_target(page, link) for _, link in LINK.findall((ROOT / page).read_text())}
            outside = [path for path in targets if path.parts[0] not in ("..", "docs")]
            pages += [p for p in sorted(outside) if (ROOT / p).is_file() and p not in pages]
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes the links of a page those of the site: titles for file names, pages for files."""
    here = _path(page.file.src_uri)

    def rewrite(match):
        target = _target(here, match[2])
        if target == PurePosixPath("docs/notebooks"):  # a folder has no page
            target = next(iter(_notebooks(config)), target)
        if not (ROOT / target).is_file():
            return match[0]  # the build reports it
        return match[1] + os.path.relpath(_uri(target), PurePosixPath(page.file.src_uri).parent)

    def title(match):
        path = ROOT / _target(here, match[1])
        heading = path.is_file() and re.search(r"^# (.+)", path.read_text(), re.MULTILINE)
        return f"[{heading[1]}]" if heading else match[0]

    return LINK.sub(rewrite, FILE_NAME.sub(title, markdown))


class ReadableDocstrings(griffe.Extension):
    """Shows what docstrings say of parameters, and what comments say of fields, as lists."""

    def on_object(self, *, obj, **kwargs):
        if obj.is_alias or obj.docstring is None:
            return
        if obj.is_function:
            obj.docstring.value = as_list(obj.docstring.value, {p.name for p in obj.parameters})
        elif obj.is_class:
            obj.docstring.value = as_list(obj.docstring.value, {*obj.members}) + fields(obj)


def fields(obj) -> str:
    """A list of a class's fields with the comments behind them; "" if there are none."""
    items, comments = [], 0
    for name, member in obj.members.items():
        if not member.is_alias and member.is_attribute and member.docstring is None:
            _, mark, comment = "".join(member.lines[:1]).partition("  # ")
            items.append(f"\n- `{name}`{mark and ': '}{comment.strip()}")
            comments += bool(mark)
    return "\n" + "".join(items) if comments else ""


def as_list(text: str, names: set[str]) -> str:
    """Makes list items of the sentences of a docstring that begin with known names and a colon."""
    name = "|".join(map(re.escape, names)) or "$^"
    text = re.sub(rf"(?<=\.) (?=({name})(, ({name}))*: )", "\n", text)
    text = re.sub(r"(?<=\.)\s(?=Raises )", "\n\n", text)
    lines: list[str] = []
    in_list, previous = False, ""
    for line in map(str.rstrip, text.splitlines()):
        head, colon, meaning = line.strip().partition(": ")
        is_item = bool(colon) and set(head.split(", ")) <= names
        ends = not line or (line[0].isupper() and previous.endswith("."))
        if is_item:
            lines += [] if in_list else [""]
            lines.append(f"- `{head}`: {meaning}")
        elif in_list and ends:
            lines += ["", line]
        else:
            lines.append(f"  {line.strip()}" if in_list else line)
        in_list = is_item or (in_list and not ends)
        previous = line
    return "\n".join(lines)
