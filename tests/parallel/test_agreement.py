"""What differs between processes is named with both values."""

import pytest

from tttjax.parallel.agreement import describe_differences, differences

FACTS = {"optim.peak_lr": "0.01", "train.steps": "12", "XLA_FLAGS": "''"}


def test_equal_facts_agree():
    assert describe_differences(FACTS, dict(FACTS), "process 0 on a") is None


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        (FACTS | {"train.steps": "13"}, ["train.steps"]),
        ({"optim.peak_lr": "0.01", "train.steps": "12"}, ["XLA_FLAGS"]),
        (FACTS | {"JAX_ENABLE_X64": "'1'"}, ["JAX_ENABLE_X64"]),
        ({}, list(FACTS)),
    ],
)
def test_differences_are_those_of_either_side(facts, names):
    assert differences(facts, FACTS) == names
    assert all(name in describe_differences(facts, FACTS, "process 0 on a") for name in names)


def test_a_long_list_is_cut():
    sentence = describe_differences({}, {str(i): "x" for i in range(9)}, "process 0 on a")
    assert "0 is missing here and x in process 0 on a" in sentence
    assert "and 6 more" in sentence
