"""Standard errors over documents and seeds: every number against numpy by hand."""

import numpy as np
import pytest

from tttjax.evaluation.statistics import (
    Estimate,
    Sums,
    by_position,
    change_with_context,
    change_with_position,
    difference,
    difference_by_position,
    loss,
)

DOCUMENTS, LENGTH = 5, 6
rng = np.random.default_rng(0)
COUNT_DL = rng.integers(1, 4, (DOCUMENTS, LENGTH)).astype(float)


def make_sums(mean, count_DL=COUNT_DL, seed=1):
    noise_DL = np.random.default_rng(seed).normal(0, 0.3, count_DL.shape)
    return Sums((mean + noise_DL) * count_DL, count_DL, None)


A = [make_sums(2.0, seed=1), make_sums(2.1, seed=2)]
B = [make_sums(2.5, seed=3), make_sums(2.4, seed=4), make_sums(2.7, seed=5)]


def ratio_by_hand(loss_D, count_D):
    """(mean, standard error) of a ratio of sums over documents."""
    mean = loss_D.sum() / count_D.sum()
    n = len(loss_D)
    square = sum((s - mean * w) ** 2 for s, w in zip(loss_D, count_D, strict=True))
    return mean, np.sqrt(n / (n - 1) * square) / count_D.sum()


def seed_error_by_hand(seeds, columns=slice(None)):
    means = [s.loss_DL[:, columns].sum() / s.count_DL[:, columns].sum() for s in seeds]
    return np.std(means, ddof=1) / np.sqrt(len(means))


def of_document(seeds, columns=slice(None)):
    return np.mean([s.loss_DL[:, columns].sum(axis=1) for s in seeds], axis=0)


def test_a_loss_has_both_errors():
    value = loss(A)
    mean, documents = ratio_by_hand(of_document(A), COUNT_DL.sum(axis=1))
    seeds = seed_error_by_hand(A)
    np.testing.assert_allclose((value.mean, value.documents, value.seeds), (mean, documents, seeds))
    assert value.stderr == pytest.approx(np.hypot(documents, seeds))


def test_a_difference_pairs_documents_and_seeds():
    for b in (B, B[: len(A)]):
        value = difference(A, b)
        mean, documents = ratio_by_hand(of_document(A) - of_document(b), COUNT_DL.sum(axis=1))
        seeds = np.hypot(seed_error_by_hand(A), seed_error_by_hand(b))
        if len(A) == len(b):
            pairs = zip(A, b, strict=True)
            of_seeds = [float(loss([one]).mean - loss([other]).mean) for one, other in pairs]
            seeds = np.std(of_seeds, ddof=1) / np.sqrt(len(A))
        found = value.mean, value.documents, value.seeds
        np.testing.assert_allclose(found, (mean, documents, seeds))


def test_common_document_effects_cancel_in_a_difference():
    hard_D1 = np.arange(DOCUMENTS)[:, None] * 10.0
    a, b = (
        Sums(np.broadcast_to(hard_D1 + shift, COUNT_DL.shape) * COUNT_DL, COUNT_DL, None)
        for shift in (1.0, 0.25)
    )
    value = difference([a], [b])
    assert value.mean == pytest.approx(0.75)
    assert value.documents == pytest.approx(0, abs=1e-12)
    assert loss([a]).documents > 1
    assert not value.is_insignificant()


def test_bins_are_treated_like_totals():
    edges = [0, 2, 6]
    for i, columns in enumerate((slice(0, 2), slice(2, 6))):
        count_D = COUNT_DL[:, columns].sum(axis=1)
        mean, documents = ratio_by_hand(of_document(A, columns), count_D)
        value = by_position(A, edges)
        np.testing.assert_allclose((value.mean[i], value.documents[i]), (mean, documents))
        assert value.seeds[i] == pytest.approx(seed_error_by_hand(A, columns))
        paired = difference_by_position(A, B, edges)
        mean, documents = ratio_by_hand(of_document(A, columns) - of_document(B, columns), count_D)
        np.testing.assert_allclose((paired.mean[i], paired.documents[i]), (mean, documents))


def test_unknown_errors_add_nothing():
    one = loss(A[:1])
    assert np.isnan(one.seeds)
    assert one.stderr == one.documents
    mixed = difference(A, B[:1])
    assert mixed.seeds == pytest.approx(seed_error_by_hand(A))
    single = Sums(A[0].loss_DL[:1], COUNT_DL[:1], None)
    alone = loss([single])
    assert np.isnan(alone.stderr)
    assert not alone.is_insignificant()  # not known
    assert Estimate(*np.zeros((3, 1))).is_insignificant()
    assert Estimate(np.array(0.1), np.array(0.04), np.array(0.04)).is_insignificant()
    assert not Estimate(np.array(0.1), np.array(0.04)).is_insignificant()


def test_change_with_position_compares_the_same_documents():
    """Against the jackknife over documents, which knows nothing of ratios and residuals."""
    count_DL = np.random.default_rng(7).integers(20, 30, (400, LENGTH)).astype(float)
    sums = make_sums(2.0, count_DL, seed=8)
    early, late = (0, 2), (3, 6)
    value = change_with_position([sums], early, late)

    def change(keep):
        parts = [
            sums.loss_DL[keep, a:b].sum() / count_DL[keep, a:b].sum() for a, b in (late, early)
        ]
        return parts[0] - parts[1]

    n = len(count_DL)
    assert value.mean == pytest.approx(change(np.ones(n, bool)))
    left_out = [change(np.arange(n) != i) for i in range(n)]
    jackknife = np.sqrt((n - 1) * np.var(left_out))
    assert value.documents == pytest.approx(jackknife, rel=0.01)


def test_a_change_with_context_pairs_all_four():
    """The same tokens read with half the context: half as many positions, twice as many targets."""
    halves = COUNT_DL.reshape(DOCUMENTS, 2, LENGTH // 2).sum(axis=1)
    short_a, short_b = [make_sums(2.6, halves, seed=6)], [make_sums(2.8, halves, seed=7)]
    value = change_with_context((A[:1], B[:1]), (short_a, short_b))
    assert value is not None
    loss_D = of_document(A[:1]) - of_document(B[:1]) - of_document(short_a) + of_document(short_b)
    mean, documents = ratio_by_hand(loss_D, COUNT_DL.sum(axis=1))
    np.testing.assert_allclose((value.mean, value.documents), (mean, documents))
    assert np.isnan(value.seeds)
    seeds = change_with_context((A, B), (A[::-1], B)).seeds
    means = [loss([s]).mean for s in A]
    assert seeds == pytest.approx(abs(means[0] - means[1]))
    other = [make_sums(2.6, halves + 1)]
    assert change_with_context((A, B), (other, other)) is None


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match="same tokens"):
        difference(A, [make_sums(2.0, COUNT_DL + 1)])
    with pytest.raises(ValueError, match="same tokens"):
        loss([A[0], make_sums(2.0, COUNT_DL + 1)])
