"""Source and licence of weights: `origin.json` in work directories, and text for model cards.

tttjax is licensed under the Apache License 2.0. That does not cover weights: these stay under the
terms of their source, whatever format they are converted to.
"""

import json
import re
from pathlib import Path
from typing import Any

from tttjax.config import read_config
from tttjax.config.run_info import workdir_of
from tttjax.io.paths import storage_path

ORIGIN = "origin.json"
NOT_STATED = "not stated"
OFFICIAL = {
    "license": "none found",
    "terms": "The official TTT-E2E code and checkpoints carry no licence that we found. They are "
    "neither included in tttjax nor redistributed with it: these weights were converted on the "
    "user's machine. Ask their authors before you redistribute them.",
}
HUGGING_FACE = (
    "These weights stay under the terms of their source. They were converted on the user's "
    "machine, and tttjax grants no rights to them."
)


def huggingface_terms(folder: Path) -> dict[str, str]:
    """`license`: from the metadata of the model card, or "not stated"; `terms`: a sentence."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---[ \t]*\n(.*?)\n---", text, re.DOTALL)
    # A value, or the first of a list.
    pattern = r"^license(|_name|_link):[ \t]*(?:\n[ \t]*-[ \t]*)?(\S.*?)[ \t]*$"
    fields = dict(re.findall(pattern, head[1], re.MULTILINE)) if head else {}
    values = [fields[key].strip("\"'") for key in ("", "_name", "_link") if key in fields]
    return {"license": ", ".join(values) or NOT_STATED, "terms": HUGGING_FACE}


def find_origin(source: Path) -> tuple[dict[str, Any] | None, str]:
    """(contents of `origin.json`, path of a missing run) of a work directory or checkpoint.

    Follows `train.init_from` back to an imported run. The first is None if none was imported. The
    second is "" unless the search ended at a run whose files are missing.
    """
    visited: set[Path] = set()
    while True:
        workdir = workdir_of(source.absolute())
        if (origin := _read(workdir / ORIGIN)) is not None:
            return origin, ""
        config = read_config(workdir)
        if config is None or workdir in visited:
            return None, str(source)
        if not config.train.init_from:
            return None, ""
        visited.add(workdir)
        source = storage_path(config.train.init_from)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


# --- in model cards -------------------------------------------------------------------------------


def card_metadata(origin: dict[str, Any] | None) -> str:
    """The licence lines of a model card's metadata; "" if the licence is not known."""
    license = str((origin or {}).get("license", ""))
    if not license:
        return ""
    if re.fullmatch(r"[a-z0-9.+-]+", license):
        return f"license: {license}\n"
    name = re.sub(r"[^a-z0-9.+-]+", "-", license.lower()).strip("-")
    return f"license: other\nlicense_name: {name}\n"


def card_section(origin: dict[str, Any] | None, missing_run: str) -> str:
    """The Markdown section of a model card on source, licence and terms.

    origin, missing_run: from `find_origin`.
    """
    if origin is not None:
        source = str(origin.get("source", "not known"))
        if "://" not in source:  # a folder: only the parts that name the model
            source = "/".join(Path(source).parts[-2:]).lstrip("/")
        return (
            f"- Source of the weights: {origin.get('kind', 'not known')}, `{source}`\n"
            f"- Licence of the source: {origin.get('license', NOT_STATED)}\n"
            f"- Terms: {origin.get('terms', HUGGING_FACE)}\n"
        )
    if missing_run:
        return (
            "The weights were trained with tttjax from those of another run, which was not found "
            "when they were exported: find out where these are from before you redistribute them.\n"
        )
    return (
        "The weights were trained with tttjax from random ones. Whoever trained them decides on "
        "their licence; state it here and in `license:` above.\n"
    )
