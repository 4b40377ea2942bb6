"""Small corpora and prepared data sets for the tests of the data pipeline."""

import numpy as np
import pytest

from tttjax.data.preparation import prepare


def write_corpus(folder, sizes, seed=0):
    """One text file per size, of lines of random words; returns name -> text."""
    rng = np.random.default_rng(seed)
    words = ["alpha", "béta", "gamma", "delta", "  ", "epsilon\t", "zeta"]
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for i, size in enumerate(sizes):
        text = ""
        while len(text) < size:
            text += " ".join(rng.choice(words, 8)) + "\n"
        texts[f"doc{i:02d}.txt"] = text[:size]
        (folder / f"doc{i:02d}.txt").write_text(text[:size], encoding="utf-8", newline="")
    return texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    write_corpus(folder, [900, 40, 2500, 300, 1300, 700, 5, 1800, 260, 3300])
    return folder


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    """Bytes, several shards, about a third held out."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    return prepare([corpus], out, val_fraction=0.3, shard_tokens=2000, num_workers=0)
