"""docs/configuration.md says what the schema says."""

from pathlib import Path

from tttjax.config.reference import reference
from tttjax.config.schema import all_fields

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_current():
    assert PAGE.read_text() == reference(), (
        "run: python -m tttjax.config.reference docs/configuration.md"
    )


def test_every_field_has_a_row_with_a_meaning():
    heading, rows = "", {}
    for line in reference().splitlines():
        if line.startswith("##"):
            heading = line.lstrip("# ")
        if line.startswith("| `"):
            _, name, _, _, meaning, _ = line.replace("\\|", "").split("|", 5)
            rows[f"{heading}.{name.strip(' `')}"] = meaning.strip()
    assert rows.keys() == all_fields().keys()
    assert all(len(meaning) > 10 for meaning in rows.values())
