"""The search for a recipe that fits: candidates and their order."""

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
    return Memory(parameters, 2 * parameters, 0.0, 0.0, 0.0, working, 0.0)


def proposals(config, needed, capacity) -> list[dict[str, str]]:
    return [c.changes for c in candidates(config, DEVICES, needed, capacity)]


def test_the_unchanged_recipe_is_predicted_exactly():
    config = recipe()
    assert predict(config, config, DEVICES, needs()) == pytest.approx(150)


def test_one_small_change_comes_first():
    # state 30, gathered weights and gradient 20, 4 sequences of 25
    first = proposals(recipe(), needs(), 110)[0]
    assert first == {"train.accum_steps": "2"}
    assert proposals(recipe(), needs(), 80)[0] == {"train.accum_steps": "4"}
    assert proposals(recipe(), needs(), 65)[0] == {"mesh.fsdp": "2", "train.accum_steps": "4"}


def test_a_large_state_is_sharded():
    needed = needs(parameters=40, working=84)  # all but 4 are gathered weights and gradient
    assert proposals(recipe(mesh={"gather": "step"}), needed, 110)[0] == {"mesh.fsdp": "8"}
    # Gathered per layer, they are smaller.
    assert proposals(recipe(), needed, 110)[0] == {"mesh.fsdp": "4"}


def test_gathering_per_layer_comes_first():
    config = recipe(mesh={"fsdp": 8, "gather": "step"}, train={"accum_steps": 4})
    first = proposals(config, needs(working=160), 182)[
        0
    ]  # state 30, gathered weights and gradient 160
    assert first == {"mesh.gather": "layer"}
    assert all("mesh.gather" not in c for c in proposals(recipe(mesh={"fsdp": 8}), needs(), 140))


def test_recomputation_is_proposed_only_if_it_is_off():
    on = proposals(recipe(), needs(), 110)
    assert on
    assert not any("inner.remat" in changes for changes in on)
    off = recipe(inner={"remat": False})
    assert {"inner.remat": "true"} in proposals(off, needs(), 110)


def test_a_large_trajectory_is_recomputed():
    config = recipe(train={"seq_len": 400})  # 100 chunks, of which 20 are in memory at a time
    needed = dataclasses.replace(needs(), trajectory=80.0, temporary=40.0)
    assert proposals(config, needed, 100)[0] == {"inner.trajectory": "recompute"}
    assert "inner.trajectory" not in proposals(config, needs(), 110)[0]


def test_candidates_are_valid_recipes_with_the_same_batch():
    for candidate in candidates(recipe(), DEVICES, needs(), 110):
        config = candidate.config
        assert config.train.batch_size == 32
        assert 32 // config.train.accum_steps % (DEVICES // config.mesh.tensor) == 0


def test_a_fixed_data_axis_may_change():
    config = recipe(mesh={"data": 8})
    assert {"mesh.fsdp": "2", "mesh.data": "-1"} in proposals(config, needs(), 145)


def test_tensor_parallelism_replaces_fsdp_for_large_weights():
    sections = {"train": {"accum_steps": 4}, "model": {"vocab_size": 12}}
    config = recipe(mesh={"fsdp": DEVICES}, **sections)
    # state 30, gathered weights and gradient 160, a sequence of 40
    changes = proposals(config, needs(working=200), 190)[0]
    assert (changes["mesh.fsdp"], changes["mesh.tensor"]) == ("4", "2")
    assert not any(
        "mesh.fsdp" in c and "mesh.tensor" not in c for c in proposals(config, needs(), 1e9)
    )


def test_block_inputs_are_not_sharded_over_tensor():
    before, after = recipe(), recipe(mesh={"tensor": 2}, train={"accum_steps": 2})
    inside = needs()
    block_inputs = dataclasses.replace(inside, activations=80.0, temporary=40.0)
    # With as many sequences per device, 20 of the 120 are weights, which are halved.
    assert predict(before, after, DEVICES, inside) == pytest.approx(75)
    assert predict(before, after, DEVICES, block_inputs) == pytest.approx(75 + 40)
    # Without recomputation they are mostly inside blocks.
    before, after = (
        dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none"))
        for config in (before, after)
    )
    assert predict(before, after, DEVICES, block_inputs) == pytest.approx(75)


def test_nothing_is_proposed_if_nothing_fits():
    assert proposals(recipe(), needs(), 5) == []


def test_predictions_are_verified_and_the_next_one_tried():
    tried = []

    def fits(config):
        tried.append(config)
        return len(tried) == 2

    candidate = find_fitting(recipe(), DEVICES, needs(), 110, fits)
    assert candidate.config is tried[1]
    first = next(candidates(recipe(), DEVICES, needs(), 110))
    assert candidate.predicted < 0.9 * first.predicted  # one that saves clearly more
    assert find_fitting(recipe(), DEVICES, needs(), 110, lambda config: False, tries=3) is None


def test_the_recipe_itself_is_not_proposed():
    config = recipe()
    assert all(c.config != config for c in candidates(config, DEVICES, needs(), 1e9))
