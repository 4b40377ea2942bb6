"""Origin, licence and terms of imported weights, and the model card of an export."""

import json

import pytest

from tttjax.interop.huggingface import export as exporting
from tttjax.runs import origin
from tttjax.runs.origin import ORIGIN, find_origin, huggingface_terms

CARDS = {
    "---\nlanguage: en\nlicense: llama3.2\n---\n# A model\n": "llama3.2",
    "---\nlicense: other\nlicense_name: mine\nlicense_link: 'L'\n---\n": "other, mine, L",
    "---\nlicense:\n- mit\n---\n": "mit",
    "# A model\nlicense: mit\n": "not stated",
    "---\ntags: [x]\n---\nlicense: mit\n": "not stated",
}


@pytest.mark.parametrize("card", CARDS)
def test_the_licence_is_that_of_the_model_card(card, tmp_path):
    assert huggingface_terms(tmp_path)["license"] == "not stated"
    (tmp_path / "README.md").write_text(card)
    assert huggingface_terms(tmp_path)["license"] == CARDS[card]


@pytest.fixture(scope="module")
def runs(make_run):
    """An imported run, one trained from it, one from scratch, one whose initial run is missing."""
    first = make_run("origin-imported")
    contents = {
        "kind": "official TTT-E2E checkpoint",
        "source": "/home/me/125m/4800",
        **origin.OFFICIAL,
    }
    (first / ORIGIN).write_text(json.dumps(contents))
    later = make_run("origin-later", init_from=first)
    return (
        first,
        later,
        make_run("origin-none"),
        make_run("origin-lost", init_from=first.parent / "gone"),
    )


def test_trained_run_has_origin_it_started_from(runs):
    imported, later, scratch, orphan = runs
    assert find_origin(imported)[0]["license"] == "none found"
    assert find_origin(later) == find_origin(imported)
    assert find_origin(next((later / "checkpoints").iterdir())) == find_origin(imported)
    assert find_origin(scratch) == (None, "")
    assert find_origin(orphan) == (None, str(imported.parent / "gone"))


def test_model_cards_say_source_licence_and_terms(runs):
    _, later, scratch, orphan = (exporting._card(exporting.plan_export(run)) for run in runs)
    assert "\nlicense: other\nlicense_name: none-found\n---\n" in later
    assert "`125m/4800`" in later
    assert "/home/me" not in later
    assert "carry no licence that we found" in later
    assert "license:" not in scratch.split("---")[1]
    assert "Whoever trained them decides" in scratch
    assert "which was not found" in orphan


def test_exported_code_is_under_our_licence(runs):
    card = exporting._card(exporting.plan_export(runs[0], own_code=True))
    assert "`modeling_tttjax.py` are part of tttjax, under the Apache License 2.0" in card
    assert "Apache" not in exporting._card(exporting.plan_export(runs[0]))
