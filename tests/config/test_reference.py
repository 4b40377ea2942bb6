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
    page = reference()
    for name in all_fields():
        rows = [row for row in page.splitlines() if row.startswith(f"| `{name.partition('.')[2]}`")]
        assert rows, name
        assert all(len(row.split("|")[4].strip()) > 10 for row in rows)
