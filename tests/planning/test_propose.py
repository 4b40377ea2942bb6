"""The nearest recipe that fits: what is offered, in which order, and what never is."""

import dataclasses

import pytest
from helpers.small import small_config

from tttjax.planning.memory import Memory
from tttjax.planning.propose import candidates, find_fitting, predict

DEVICES = 8


def recipe(**sections):
    values = {"train": {"batch_size": 32, "steps": 20, "seq_len": 12}, "inner": {"remat": True}}
    values["model"] = {"remat": "block"}
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return small_config(**values)


def needs(parameters=10.0, working=120.0) -> Memory:
    return Memory(parameters, 2 * parameters, 0.0, 0.0, 0.0, working, 0.0, "compiler")


def offered(config, needed, capacity) -> list[dict[str, str]]:
    return [c.changes for c in candidates(config, DEVICES, needed, capacity)]


def test_the_prediction_of_the_same_recipe_is_what_it_needs():
    config = recipe()
    assert predict(config, config, DEVICES, needs()) == pytest.approx(150)


def test_one_small_change_comes_first():
    # state 30, gathered weights and gradient 20, 4 sequences of 25
    first = offered(recipe(), needs(), 110)[0]
    assert first == {"train.accum_steps": "2"}
    assert offered(recipe(), needs(), 80)[0] == {"train.accum_steps": "4"}
    assert offered(recipe(), needs(), 65)[0] == {"mesh.fsdp": "2", "train.accum_steps": "4"}


def test_where_the_state_is_too_large_weights_are_divided():
    needed = needs(parameters=40, working=84)  # all but 4 are gathered weights and gradient
    assert offered(recipe(mesh={"gather": "step"}), needed, 110)[0] == {"mesh.fsdp": "8"}
    # Gathered block by block there is less of them.
    assert offered(recipe(), needed, 110)[0] == {"mesh.fsdp": "4"}


def test_gathering_block_by_block_comes_before_all_that_slows_a_step():
    config = recipe(mesh={"fsdp": 8, "gather": "step"}, train={"accum_steps": 4})
    first = offered(config, needs(working=160), 182)[0]  # state 30, whole weights and gradient 160
    assert first == {"mesh.gather": "layer"}
    assert all("mesh.gather" not in c for c in offered(recipe(mesh={"fsdp": 8}), needs(), 140))


def test_recomputation_is_offered_only_where_it_is_off():
    on = offered(recipe(), needs(), 110)
    assert on
    assert not any("inner.remat" in changes for changes in on)
    off = recipe(inner={"remat": False})
    assert {"inner.remat": "true"} in offered(off, needs(), 110)


def test_a_large_trajectory_is_recomputed():
    config = recipe(train={"seq_len": 400})  # 100 chunks, of which 20 are kept at a time
    needed = dataclasses.replace(needs(), trajectory=80.0, temporary=40.0)
    assert offered(config, needed, 100)[0] == {"inner.trajectory": "recompute"}
    assert "inner.trajectory" not in offered(config, needs(), 110)[0]


def test_every_candidate_is_a_valid_recipe_with_the_same_batch():
    for candidate in candidates(recipe(), DEVICES, needs(), 110):
        config = candidate.config
        assert config.train.batch_size == 32
        assert 32 // config.train.accum_steps % (DEVICES // config.mesh.tensor) == 0


def test_a_fixed_data_axis_makes_room():
    config = recipe(mesh={"data": 8})
    assert {"mesh.fsdp": "2", "mesh.data": "-1"} in offered(config, needs(), 145)


def test_where_gathered_weights_are_too_large_layers_are_divided_instead():
    sections = {"train": {"accum_steps": 4}, "model": {"vocab_size": 12}}
    config = recipe(mesh={"fsdp": DEVICES}, **sections)
    # state 30, gathered weights and gradient 160, a sequence of 40
    changes = offered(config, needs(working=200), 190)[0]
    assert (changes["mesh.fsdp"], changes["mesh.tensor"]) == ("4", "2")
    assert not any(
        "mesh.fsdp" in c and "mesh.tensor" not in c for c in offered(config, needs(), 1e9)
    )


def test_what_is_kept_between_blocks_is_not_divided_with_the_layers():
    before, after = recipe(), recipe(mesh={"tensor": 2}, train={"accum_steps": 2})
    inside = needs()
    kept = dataclasses.replace(inside, activations=80.0, temporary=40.0)
    # Of 120 with as many sequences on a device 20 are weights, and half of them is left.
    assert predict(before, after, DEVICES, inside) == pytest.approx(75)
    assert predict(before, after, DEVICES, kept) == pytest.approx(75 + 40)
    # Without recomputation they are mostly what is inside of blocks.
    before, after = (
        dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
        for config in (before, after)
    )
    assert predict(before, after, DEVICES, kept) == pytest.approx(75)


def test_nothing_is_offered_where_nothing_fits():
    assert offered(recipe(), needs(), 5) == []


def test_predictions_are_checked_and_the_next_one_tried():
    tried = []

    def fits(config):
        tried.append(config)
        return len(tried) == 2

    found = find_fitting(recipe(), DEVICES, needs(), 110, fits)
    assert found.config is tried[1]
    first = next(candidates(recipe(), DEVICES, needs(), 110))
    assert found.predicted < 0.9 * first.predicted  # one that saves clearly more
    assert find_fitting(recipe(), DEVICES, needs(), 110, lambda config: False, tries=3) is None


def test_the_recipe_itself_is_not_offered():
    config = recipe()
    assert all(c.config != config for c in candidates(config, DEVICES, needs(), 1e9))
