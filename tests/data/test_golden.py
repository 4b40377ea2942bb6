"""The official loader's batches, and new cases of the same format made with zarr itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from grain.experimental import index_shuffle

from tttjax.data.preparation import prepare
from tttjax.errors import UserError
from tttjax.verification.golden_data import check_zarr_case

GOLDEN = Path(__file__).parents[3] / "shared" / "golden" / "e2e" / "zarr"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no reference batches in {GOLDEN}")
def test_official_batches():
    results = dict(check_zarr_case(GOLDEN))
    with np.load(GOLDEN / "batches.npz") as arrays:
        assert len(results) == 2 * len(arrays.files)
    assert set(results.values()) == {0.0}


def write_case(folder, tokens, arrays, **description):
    for version in (2, 3):
        group = zarr.create_group(folder / f"tokens_v{version}", zarr_format=version)
        for split, values in tokens.items():
            group.create_array(split, data=values, chunks=(100,))
    np.savez(folder / "batches.npz", **arrays)
    shapes = {name: {"shape": list(a.shape), "dtype": str(a.dtype)} for name, a in arrays.items()}
    (folder / "batches.json").write_text(json.dumps({**description, "arrays": shapes}))


@pytest.fixture
def case(tmp_path):
    rng = np.random.default_rng(0)
    tokens = {"train": rng.integers(0, 50, 1003), "val": rng.integers(0, 50, 500).astype("uint16")}
    rows = np.stack([tokens["val"][i * 16 : i * 16 + 17] for i in range(6)]).reshape(2, 3, 17)
    # 62 training records, so 20 batches of 3 in an epoch; its second epoch has seed 5 + 1.
    second = [index_shuffle(i, max_index=61, seed=6, rounds=4) for i in range(6)]
    arrays = {
        "train_shuffled_epoch1_shard1of3/record_index": np.array([[second[1]], [second[4]]]),
        "train_shuffled_seed5_epoch1/record_index": np.array(second).reshape(2, 3),
        "tokens/train": tokens["train"],
        "val_unshuffled/input_ids": rows[..., :-1].astype(np.int32),
        "val_unshuffled/target_tokens": rows[..., 1:].astype(np.int32),
        "val_unshuffled/loss_masks": rows[..., 1:] != 48,
        "val_unshuffled/record_index": np.arange(6).reshape(2, 3),
        "val_unshuffled_shard1of3/record_index": np.array([[1], [4], [7]]),
    }
    sizes = {"seq_len": 16, "global_batch_size": 3, "vocab_size": 50}
    write_case(tmp_path, tokens, arrays, **sizes, seed=5, bos_token_id=48, eos_token_id=49)
    return tmp_path


def test_a_new_case_of_the_format(case):
    results = check_zarr_case(case)
    assert {name.split("/")[0] for name, _ in results} == {"tokens_v2", "tokens_v3"}
    assert {deviation for _, deviation in results} == {0.0}
    assert check_zarr_case(case / "batches.json") == results


def test_a_wrong_number_shows(case):
    with np.load(case / "batches.npz") as file:
        arrays = dict(file)
    arrays["val_unshuffled/input_ids"][1, 2, 3] += 7
    arrays["val_unshuffled/record_index"] = arrays["val_unshuffled/record_index"][:, :2]
    np.savez(case / "batches.npz", **arrays)
    wrong = {name: deviation for name, deviation in check_zarr_case(case) if deviation}
    assert wrong == {
        "tokens_v2/val_unshuffled/input_ids": 7.0,
        "tokens_v3/val_unshuffled/input_ids": 7.0,
        "tokens_v2/val_unshuffled/record_index": float("inf"),
        "tokens_v3/val_unshuffled/record_index": float("inf"),
    }


def test_documents_begin_at_bos(case, tmp_path, monkeypatch):
    monkeypatch.setattr("tttjax.data.zarr._BLOCK", 64)
    settings = {"tokenizer": "ids", "vocab_size": 50, "bos_id": 48, "eos_id": 49}
    data = prepare([case / "tokens_v3"], tmp_path / "d", shard_tokens=200, **settings)
    tokens = zarr.open_array(case / "tokens_v3" / "train")[:]
    split = data.split("train")
    np.testing.assert_array_equal(split.read(0, split.num_tokens), tokens)
    starts, _ = split.document_bounds()
    np.testing.assert_array_equal(starts, np.union1d([0], np.flatnonzero(tokens == 48)))
    assert len(data.splits["train"]["shards"]) > 1


def test_bad_zarr(case, tmp_path):
    with pytest.raises(UserError, match=r"train has the token 49, outside the vocabulary of 49"):
        prepare([case / "tokens_v2"], tmp_path / "a", tokenizer="ids", vocab_size=49)
    with pytest.raises(UserError, match="must be the only input"):
        prepare([case / "tokens_v2", "stdlib"], tmp_path / "a", tokenizer="ids")
    with pytest.raises(UserError, match="do not apply"):
        prepare([case / "tokens_v2"], tmp_path / "a", tokenizer="ids", min_document_tokens=5)
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        prepare([case / "tokens_v2"], tmp_path / "a", tokenizer="sentencepiece")
    group = zarr.create_group(tmp_path / "square")
    group.create_array("train", data=np.zeros((3, 3), np.int32))
    with pytest.raises(UserError, match=r"is not one-dimensional with integers \(shape \(3, 3\)"):
        prepare([tmp_path / "square"], tmp_path / "a", tokenizer="ids")
    chunk = case / "tokens_v3" / "train" / "c" / "3"
    chunk.write_bytes(chunk.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"Cannot read .*tokens_v3/train"):
        prepare([case / "tokens_v3"], tmp_path / "a", tokenizer="ids", vocab_size=50, bos_id=48)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="Cannot read the golden case"):
        check_zarr_case(tmp_path / "square")


def test_an_array_of_unknown_meaning(case):
    np.savez(case / "batches.npz", **{"train_sorted/input_ids": np.zeros(3)})
    with pytest.raises(UserError, match="the unknown name 'train_sorted/input_ids'"):
        check_zarr_case(case)
