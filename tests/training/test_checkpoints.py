"""Checkpoints: exact round trips, damage, differences, full disks."""

import contextlib
import functools
import resource
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tttjax.errors import UserError
from tttjax.training import checkpoint_format, checkpoint_integrity, checkpoints, saved_weights
from tttjax.types import Params

pytestmark = pytest.mark.slow


def mesh(*shape):
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def shardings(tree, on):
    """Matrices are sharded over fsdp, the rest is replicated."""

    def one(x):
        return NamedSharding(on, PartitionSpec("fsdp") if x.ndim == 2 else PartitionSpec())

    return jax.tree.map(one, tree)


def make_state(on, seed=0, width=16):
    rng = np.random.default_rng(seed)
    params = Params(
        slow={
            "embedding": rng.normal(size=(32, width)).astype(np.float32),
            "norm": {"scale": np.ones(width, np.float32)},
        },
        fast={"mlp": rng.normal(size=(width, 8)).astype(jnp.bfloat16)},
    )
    opt_state = optax.chain(optax.identity(), optax.adam(0.1)).init(params)
    state = {"step": np.int32(seed), "params": params, "opt_state": opt_state}
    return jax.device_put(state, shardings(state, on))


def abstract(state, on=None):
    target_shardings = shardings(state, on) if on else jax.tree.map(lambda x: x.sharding, state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, target_shardings
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@functools.cache
def state_of(step):
    return make_state(mesh(4, 2), seed=step)


def save_steps(path, steps, keep=5, **options):
    """Saves one state per step under path/checkpoints and returns them by step."""
    states = {n: state_of(n) for n in steps}
    saver = checkpoints.Checkpointer(path / "checkpoints", keep=keep, **options)
    for n, state in states.items():
        saver.save(n, state, data_state={"next": n}, extra={"tokens": 10 * n}, config={"a": {}})
    saver.close()
    return states


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints of `save_steps` 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")
    save_steps(folder, [1, 2])
    return folder / "checkpoints"


@pytest.fixture
def copy_steps(saved):
    """copy_steps(path, steps): as `save_steps`, of steps 1 and 2, without saving again."""

    def copy(path, steps):
        for step in map(str, steps):
            shutil.copytree(saved / step, path / "checkpoints" / step)
        return {n: state_of(n) for n in steps}

    return copy


def restore(path, target, from_step=None):
    saver = checkpoints.Checkpointer(path / "checkpoints", keep=5)
    try:
        restored = saver.restore(target, from_step)
        if restored is not None and restored.step == from_step:
            saver.go_back_to(from_step)
        return restored
    finally:
        saver.close()


def steps_in(path):
    return sorted(p.name for p in (path / "checkpoints").iterdir() if p.name.isdigit())


def arrays_of(path, step, item="train"):
    folder = path / "checkpoints" / str(step) / item / "ocdbt.process_0" / "d"
    return sorted(folder.iterdir(), key=lambda f: f.stat().st_size)


def test_round_trip_is_exact_and_old_steps_go(tmp_path):
    states = save_steps(tmp_path, [1, 2, 3], keep=2)
    restored = restore(tmp_path, abstract(states[3]))
    assert (restored.step, restored.data_state, restored.extra) == (3, {"next": 3}, {"tokens": 30})
    assert_same_bits(restored.state, states[3])
    for x, y in zip(jax.tree.leaves(restored.state), jax.tree.leaves(states[3]), strict=True):
        assert x.sharding == y.sharding
    assert steps_in(tmp_path) == ["2", "3"]


def test_multiples_of_keep_every_stay(tmp_path):
    save_steps(tmp_path, [2, 3, 4, 5], keep=1, keep_every=2)
    assert steps_in(tmp_path) == ["2", "4", "5"]


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = save_steps(Path("run"), [1])
    assert_same_bits(restore(Path("run"), abstract(states[1])).state, states[1])
    assert saved_weights.find_checkpoint("run") == tmp_path / "run" / "checkpoints" / "1"


def test_restore_from_empty_directory_is_none(tmp_path):
    assert restore(tmp_path, abstract(make_state(mesh(4, 2)))) is None


def test_saved_state_may_be_donated(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = {"params": {"w": jnp.zeros((256, 256))}, "step": jnp.int32(0)}
    saver = checkpoints.Checkpointer(tmp_path / "checkpoints", keep=9)
    for n in range(1, 6):
        state = step(state)
        saver.save(n, state)
    saver.close()
    for n in range(1, 6):
        w = checkpoint_format.read_item(
            checkpoints.epath.Path(tmp_path) / "checkpoints" / str(n) / "params",
            abstract(state)["params"],
        )["w"]
        np.testing.assert_array_equal(w, np.full((256, 256), n))


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1)])
def test_restores_onto_another_mesh(tmp_path, shape, copy_steps):
    states = copy_steps(tmp_path, [1])
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    other_mesh = jax.sharding.Mesh(devices, ("data", "fsdp"))
    restored = restore(tmp_path, abstract(states[1], other_mesh)).state
    assert_same_bits(restored, states[1])
    assert restored["params"].slow["embedding"].sharding.mesh.shape == other_mesh.shape


def truncate(path):
    largest = arrays_of(path, 2)[-1]
    largest.write_bytes(largest.read_bytes()[:-7])


def flip_a_bit(path):
    largest = arrays_of(path, 2, "params")[-1]
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))


def remove_an_array_file(path):
    arrays_of(path, 2)[-1].unlink()


def remove_the_metadata(path):
    (path / "checkpoints" / "2" / "params" / "_METADATA").unlink()


def remove_an_item(path):
    shutil.rmtree(path / "checkpoints" / "2" / "meta")


def remove_the_checksums(path):
    (path / "checkpoints" / "2" / "checksums.json").unlink()


DAMAGES = [
    truncate,
    flip_a_bit,
    remove_an_array_file,
    remove_the_metadata,
    remove_an_item,
    remove_the_checksums,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_checkpoint_falls_back_to_previous(tmp_path, capfd, damage, copy_steps):
    states = copy_steps(tmp_path, [1, 2])
    damage(tmp_path)
    restored = restore(tmp_path, abstract(states[1]))
    assert restored.step == 1
    assert_same_bits(restored.state, states[1])
    assert "checkpoint of step 2 is damaged" in capfd.readouterr().err
    assert (tmp_path / "checkpoints" / "damaged-2").exists()
    # The step can be saved again and becomes the newest.
    save_steps(tmp_path, [2])
    assert restore(tmp_path, abstract(states[1])).step == 2


def test_all_checkpoints_damaged_is_an_error(tmp_path, copy_steps):
    copy_steps(tmp_path, [2])
    truncate(tmp_path)
    target = abstract(make_state(mesh(4, 2)))
    for _ in range(2):  # a second attempt gives the same error
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(2\)"):
            restore(tmp_path, target)


def test_only_renamed_damaged_checkpoints_is_an_error(tmp_path, copy_steps):
    copy_steps(tmp_path, [2])
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "2").rename(checkpoints / "damaged-2")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(damaged-2\)"):
        restore(tmp_path, abstract(make_state(mesh(4, 2))))


# States that are not finite -----------------------------------------------------------------------


def spoil(state, value):
    """The state with `value` in a matrix of the optimizer, which is sharded."""
    moments = state["opt_state"][1][0].mu.slow
    moments["embedding"] = moments["embedding"].at[-1, -1].set(value)
    return state


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_state_that_is_not_finite_is_not_saved(tmp_path, value):
    saver = checkpoints.Checkpointer(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"opt_state/.*mu/slow/embedding.*none before it"):
        saver.save(1, spoil(make_state(mesh(4, 2)), value))
    saver.close()
    assert steps_in(tmp_path) == []


def test_saved_state_that_is_not_finite_is_passed_over(tmp_path, capfd, copy_steps, monkeypatch):
    states = copy_steps(tmp_path, [1])
    saver = checkpoints.Checkpointer(tmp_path / "checkpoints")
    with monkeypatch.context() as patch:  # as earlier versions saved it
        patch.setattr(checkpoint_integrity, "first_nonfinite", lambda state: None)
        saver.save(2, spoil(make_state(mesh(4, 2), seed=2), np.nan))
    saver.close()
    with pytest.raises(UserError, match=r"--from-step=2: .* damaged .*embedding is not finite"):
        restore(tmp_path, abstract(states[1]), from_step=2)
    restored = restore(tmp_path, abstract(states[1]))
    assert restored.step == 1
    assert_same_bits(restored.state, states[1])
    assert "mu/slow/embedding is not finite); trying the one before" in capfd.readouterr().err
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    (tmp_path / "checkpoints" / "damaged-2").rename(tmp_path / "checkpoints" / "2")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(2\)"):
        restore(tmp_path, abstract(states[1]))


# Going back --------------------------------------------------------------------------------------


def test_going_back_keeps_later_checkpoints_and_happens_once(tmp_path, capfd, copy_steps):
    states = copy_steps(tmp_path, [1, 2])
    (tmp_path / "metrics.jsonl").write_text("records\n")
    target, folder = abstract(states[1]), tmp_path / "checkpoints"
    with pytest.raises(UserError, match=r"--from-step=3: .* no checkpoint .*; it has 1, 2"):
        restore(tmp_path, target, from_step=3)
    assert restore(tmp_path, target, from_step=1).step == 1
    assert steps_in(tmp_path) == ["1"]
    assert (folder / "abandoned-2" / "metrics.jsonl").read_text() == "records\n"
    shutil.copytree(folder / "abandoned-2", folder / "2")  # as if training had gone on
    assert restore(tmp_path, target, from_step=1).step == 2  # a repeated command
    assert "already gone back to step 1" in capfd.readouterr().err
    (folder / "went_back").unlink()
    assert restore(tmp_path, target, from_step=1).step == 1
    assert {p.name for p in folder.glob("abandoned-*")} == {"abandoned-2", "abandoned-2-2"}


def test_incomplete_checkpoint_is_reported_and_ignored(tmp_path, capfd, copy_steps):
    states = copy_steps(tmp_path, [1, 2])
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "2").rename(checkpoints / "2.orbax-checkpoint-tmp")
    assert restore(tmp_path, abstract(states[1])).step == 1
    assert "checkpoint of step 2" in capfd.readouterr().err
    assert not (checkpoints / "2.orbax-checkpoint-tmp").exists()


def test_other_architecture_is_refused_with_every_difference(tmp_path, copy_steps):
    states = copy_steps(tmp_path, [1])
    target = abstract(make_state(mesh(4, 2), width=24))
    params = target["params"]
    params.slow["norm_out"] = params.slow.pop("norm")
    with pytest.raises(UserError) as info:
        restore(tmp_path, target)
    text = str(info.value)
    assert "slow/embedding is float32[32, 16] in the checkpoint and float32[32, 24]" in text
    assert "missing slow/norm_out/scale float32[24] (nearest: slow/norm/scale)" in text
    assert "unexpected slow/norm/scale float32[16]" in text
    assert "fast/mlp is bfloat16[16, 8]" in text
    # Refusing does not damage the checkpoint.
    assert restore(tmp_path, abstract(states[1])).step == 1


def test_other_dtype_is_refused(tmp_path, copy_steps):
    target = abstract(copy_steps(tmp_path, [1])[1])
    mlp = target["params"].fast["mlp"]
    target["params"].fast["mlp"] = jax.ShapeDtypeStruct(
        mlp.shape, jnp.float32, sharding=mlp.sharding
    )
    with pytest.raises(UserError, match=r"fast/mlp is bfloat16.* and float32"):
        restore(tmp_path, target)


def test_restore_params_from_work_directory_or_checkpoint(tmp_path, copy_steps):
    states = copy_steps(tmp_path, [1, 2])
    target = abstract(states[1])["params"]
    for path, step in [
        (tmp_path, 2),
        (tmp_path / "checkpoints", 2),
        (tmp_path / "checkpoints/1", 1),
    ]:
        assert_same_bits(saved_weights.restore_params(path, target), states[step]["params"])
    assert saved_weights.load_saved_config(tmp_path) == {"a": {}}
    with pytest.raises(UserError, match="holds no checkpoint"):
        saved_weights.restore_params(tmp_path / "nowhere", target)


def test_restore_params_skips_damaged_without_renaming(tmp_path, capfd, copy_steps):
    states = copy_steps(tmp_path, [1, 2])
    flip_a_bit(tmp_path)
    restored = saved_weights.restore_params(tmp_path, abstract(states[1])["params"])
    assert_same_bits(restored, states[1]["params"])
    assert "is damaged" in capfd.readouterr().err
    assert (tmp_path / "checkpoints" / "2").exists()


def test_partial_loading_must_be_requested(tmp_path, copy_steps):
    saved = copy_steps(tmp_path, [1])[1]["params"]
    target = abstract(saved)
    extra = jax.device_put(jnp.full((3,), 7.0), NamedSharding(mesh(4, 2), PartitionSpec()))
    target = target.replace(fast={**target.fast, "new": {"scale": extra}})
    with pytest.raises(UserError, match="missing fast/new/scale"):
        saved_weights.restore_params(tmp_path, target)
    restored = saved_weights.restore_params(tmp_path, target, allow_missing=("fast/**",))
    np.testing.assert_array_equal(restored.fast["new"]["scale"], extra)
    assert_same_bits(restored.slow, saved.slow)

    partial = abstract(saved)
    del partial.slow["norm"]
    with pytest.raises(UserError, match="unexpected slow/norm/scale"):
        saved_weights.restore_params(tmp_path, partial)
    with pytest.raises(UserError, match="unexpected slow/norm/scale"):
        saved_weights.restore_params(tmp_path, partial, allow_unexpected=("slow/*",))
    restored = saved_weights.restore_params(tmp_path, partial, allow_unexpected=("slow/norm/*",))
    assert list(restored.slow) == ["embedding"]


@contextlib.contextmanager
def limited_file_size(limit):
    """Writes beyond `limit` bytes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_is_an_error_and_keeps_checkpoints(tmp_path):
    w = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    state = jax.device_put({"params": {"w": w}, "step": np.int32(0)})
    folder = tmp_path / "checkpoints"
    saver = checkpoints.Checkpointer(folder, keep=3)

    def save(step):
        saver.save(step, state)
        saver.wait()

    save(1)
    with limited_file_size(100_000), pytest.raises(UserError, match="no space left") as info:
        save(2)
    assert "step 1 is intact" in str(info.value)
    saver.close()
    assert saved_weights.find_checkpoint(folder).name == "1"
    assert not list(folder.glob("*tmp*"))


def test_late_writes_after_a_failure_are_removed(tmp_path):
    """One write of a save fails while others still run."""
    incomplete = tmp_path / f"2{checkpoint_format.TMP_MARK}"
    stop = time.monotonic() + 0.3

    def keep_writing():
        while time.monotonic() < stop:
            incomplete.mkdir(exist_ok=True)
            with contextlib.suppress(OSError):
                (incomplete / "array").write_text("x")

    (tmp_path / "1").mkdir()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(keep_writing)
        checkpoint_format.remove_unfinished(epath.Path(tmp_path), quiet_s=0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_save_that_fails_is_shared_before_the_next_barrier(tmp_path, monkeypatch):
    """The other processes wait in another barrier, and would do so for ever."""
    shared, barrier = [], lambda key, timeout_ms: None
    monkeypatch.setattr(checkpoints, "share_failure", shared.append)
    monkeypatch.setattr(checkpoints.ocp.multihost, "get_barrier_sync_fn", lambda: barrier)
    with contextlib.closing(checkpoints.Checkpointer(tmp_path)) as saver:
        saver._barrier(key="set_value_start", timeout_ms=1)
        assert not shared
        with contextlib.suppress(OSError), contextlib.ExitStack() as exit_stack:
            # As in the thread that finalises.
            exit_stack.callback(saver._barrier, key="set_value_start", timeout_ms=1)
            raise OSError("lost")
    assert [str(error) for error in shared] == ["lost"]
