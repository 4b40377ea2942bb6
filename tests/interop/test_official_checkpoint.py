"""Official checkpoints: opened lazily, and streamed into sharded arrays."""

import json
import platform
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore
from helpers.bucket_server import serve_bucket
from helpers.official_files import official_arrays, official_config, write_official

from tttjax.config import from_config_dict, load_config
from tttjax.errors import UserError
from tttjax.interop.official.checkpoint import (
    StorePath,
    is_official_checkpoint,
    load_official_checkpoint,
    open_official_checkpoint,
)
from tttjax.interop.official.config import infer_config
from tttjax.interop.official.names import (
    TOP_LEVEL_NAMES,
    check_arrays,
    from_official,
    iter_weights,
    official_shapes,
)
from tttjax.interop.streaming import assemble, return_freed_memory
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.training.step import weights_template

pytestmark = pytest.mark.slow

CONFIG = official_config()


@pytest.fixture(scope="module")
def arrays():
    return official_arrays(CONFIG)


@pytest.fixture(scope="module")
def step(arrays, tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("official"), arrays)


@pytest.fixture
def copy(step, tmp_path):
    return shutil.copytree(step, tmp_path / "run" / "3")


def template(config, **mesh):
    return weights_template(build_model(config.model, config.inner), make_mesh(**mesh))


def assert_same(params, expected):
    for actual, expected_leaf in zip(
        jax.tree.leaves(params), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(actual, expected_leaf)


def test_a_checkpoint_opens_by_step_folder_or_item(step, arrays):
    for source in (step, step.parent, step / "model_weights", str(step.parent) + "/"):
        checkpoint = open_official_checkpoint(source)
        assert (checkpoint.source, checkpoint.step) == (str(step), 3)
        assert {name: array.shape for name, array in checkpoint.arrays.items()} == {
            name: array.shape for name, array in arrays.items()
        }
        assert is_official_checkpoint(source)
    assert not is_official_checkpoint(step.parents[1])
    loaded = load_official_checkpoint(step)
    assert loaded.opt_state is None
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded.model_weights[name], array)


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"data": 8}])
def test_weights_are_assembled_on_any_mesh(step, arrays, mesh):
    model = build_model(CONFIG.model, CONFIG.inner)
    checkpoint = open_official_checkpoint(step)
    expected = template(CONFIG, **mesh)
    params = assemble(expected, iter_weights(checkpoint.arrays, model), model)
    assert_same(params, from_official(arrays, model))
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(
        lambda x: x.sharding, expected
    )


def test_one_slice_is_in_memory_at_a_time(step):
    model = build_model(CONFIG.model, CONFIG.inner)
    checkpoint = open_official_checkpoint(step)
    rows = max(
        array.nbytes // array.shape[0] for array in checkpoint.arrays.values() if array.shape[1:]
    )
    largest = max(rows, checkpoint.arrays[TOP_LEVEL_NAMES["embedding"]].nbytes)

    def watched():
        last = None
        for weight_slice in iter_weights(checkpoint.arrays, model):
            assert weight_slice.array.nbytes <= largest
            if last is not None:
                assert last() is None, "the previous slice was not freed"
            last = weakref.ref(weight_slice.array)
            yield weight_slice
            del weight_slice

    # The test's devices share host memory and may alias a slice: a target of another dtype prevents
    # that.
    half = official_config(param_dtype="bfloat16")
    assemble(template(half, data=8), watched(), model)


def peak_while(act) -> int:
    """Peak growth of this process's resident memory during `act`, in bytes."""
    return_freed_memory()

    def status(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    act()
    return status("VmHWM") - before


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/clear_refs").exists(),
    reason="measured with Linux and glibc",
)
def test_memory_is_the_target_and_two_arrays(tmp_path):
    config = official_config(
        vocab_size=16384, embed_dim=256, num_heads=8, num_layers=24, mlp_dim=640
    )
    model = build_model(config.model, config.inner)
    checkpoint = open_official_checkpoint(write_official(tmp_path, official_arrays(config)))
    target = template(config, devices=jax.devices()[:1])
    sizes = [array.nbytes for array in checkpoint.arrays.values()]
    results = []
    peak = peak_while(
        lambda: results.append(assemble(target, iter_weights(checkpoint.arrays, model), model))
    )
    programs = 48 * 2**20  # compiled programs and thread buffers
    assert peak < sum(sizes) + 2 * max(sizes) + programs
    assert sum(sizes) > 2 * max(sizes) + programs  # holding two copies would fail


def test_configurations_of_the_paper_are_inferred():
    for size in ("125m", "1b", "3b"):
        recipe = load_config(f"paper:{size},ttt_e2e,pretrain")
        model = build_model(recipe.model, recipe.inner)
        stored = {
            name: jax.ShapeDtypeStruct(shape, np.float32)
            for name, shape in official_shapes(model).items()
        }
        values, assumed = infer_config(stored)
        config = from_config_dict(values)
        assert config.model == recipe.model
        assert config.inner.chunk_size == recipe.inner.chunk_size == assumed["inner.chunk_size"]
        assert (config.inner.lr, config.inner.clip) == (recipe.inner.lr, recipe.inner.clip)


def test_other_configurations_are_inferred():
    changes = {"tie_embeddings": False, "post_norm": False, "head_dim": 6}
    for model in (changes, {"suffix_layers": 0, "fast_mlp": False}):
        config = official_config(**model)
        stored = official_arrays(config)
        inferred = from_config_dict(infer_config(stored)[0])
        check_arrays(stored, build_model(inferred.model, inferred.inner))
        assert inferred.model.mixers == (("window",) if inferred.model.fast_mlp else ("full",))
    del stored["language_model.model.h.blocks.seq_modeling_block.q_norm.weight"]
    with pytest.raises(UserError, match=r"q_norm.*is absent; give the configuration"):
        infer_config(stored)


def test_wrong_names_and_shapes_are_one_error(arrays):
    model = build_model(CONFIG.model, CONFIG.inner)
    wrong = {**arrays, "more": np.zeros(3), TOP_LEVEL_NAMES["final_norm/weight"]: np.zeros(5)}
    del wrong[TOP_LEVEL_NAMES["embedding"]]
    with pytest.raises(UserError) as caught:
        check_arrays(wrong, model)
    for words in ("missing language_model.model.wte", "unexpected more", "shape (5,), not (8,)"):
        assert words in str(caught.value)


def test_store_paths():
    path = StorePath.of("gs://bucket/a/b/", "mine")
    assert str(path / "4") == "gs://bucket/a/b/4"
    assert (path / "4").name == "4"
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": (path / "4" / "model_weights").kvstore,
            "path": "x.weight/",
        },
    }
    # tensorstore accepts the spec and gives the same URL.
    url = tensorstore.Spec(spec).kvstore.url
    assert url == "gs://bucket/a/b/4/model_weights/|ocdbt:x.weight/"
    assert path.kvstore["gcs_user_project"] == {"project_id": "mine"}
    assert "gcs_user_project" not in StorePath.of("gs://bucket").kvstore
    assert StorePath.of("gs://bucket").kvstore["path"] == ""
    assert str(StorePath.of("gs://bucket") / "4") == "gs://bucket/4"
    assert StorePath.of("/a b/c%20d").kvstore == {"driver": "file", "path": "/a b/c%20d/"}
    with pytest.raises(UserError, match="s3://b/a is neither a folder nor a path like gs://"):
        StorePath.of("s3://b/a")


def test_a_checkpoint_in_a_bucket(step, arrays, monkeypatch):
    with serve_bucket(step.parent) as (url, paths):
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        checkpoint = open_official_checkpoint("gs://bucket", project="mine")
        assert (checkpoint.source, checkpoint.step) == ("gs://bucket/3", 3)
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint.arrays[name].read(), array)
        assert all("userProject=mine" in path for path in paths)
        with pytest.raises(UserError, match="gs://bucket/elsewhere is no official checkpoint"):
            open_official_checkpoint("gs://bucket/elsewhere")


def test_checkpoint_in_folder_with_odd_name(step, arrays, tmp_path):
    odd = shutil.copytree(step, tmp_path / "a b%20#c?" / "3")
    checkpoint = open_official_checkpoint(odd)
    name = TOP_LEVEL_NAMES["embedding"]
    np.testing.assert_array_equal(checkpoint.arrays[name].read(), arrays[name])


def remove_metadata(folder):
    (folder / "model_weights" / "_METADATA").unlink()


def remove_manifest(folder):
    (folder / "model_weights" / "manifest.ocdbt").unlink()


def begin_item(folder):
    (folder / "model_weights").rename(folder / "model_weights.orbax-checkpoint-tmp-1")


def uncommit(folder):
    (folder / "commit_success.txt").unlink(missing_ok=True)
    path = folder / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({**json.loads(path.read_text()), "commit_timestamp_nsecs": None}))


def begin_step(folder):
    folder.rename(folder.with_name("3.orbax-checkpoint-tmp-1"))


def cut_short(folder):
    for path in (folder / "model_weights").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove_metadata, "no _METADATA: it is still being written, or was not fully copied"),
        (remove_manifest, "no manifest.ocdbt: it is still being written, or was not fully copied"),
        (begin_item, "is still being written"),
        (begin_step, "is still being written"),
        (uncommit, "is still being written"),
        (cut_short, "cannot be read"),
    ],
)
def test_incomplete_checkpoints_are_refused(copy, damage, sentence):
    damage(copy)
    assert is_official_checkpoint(copy.parent)
    with pytest.raises(UserError, match=sentence) as caught:
        load_official_checkpoint(copy.parent)
    assert "\n" not in str(caught.value)


def test_other_folders_are_refused(tmp_path):
    assert not is_official_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is no official checkpoint: it has no model_weights"):
        open_official_checkpoint(tmp_path)
