"""Damaged files of every kind: each damage must give a UserError or have no effect.

The result of opening a file is compared in full, so a damaged file that opens with another result
is a failure. So is any exception but UserError.
"""

import copy
import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tttjax.config import config_fingerprint, read_config, to_dict, write_run_info
from tttjax.data.shards import TOKENIZER_DIR, open_prepared
from tttjax.data.tokenizers.base import ByteTokenizer
from tttjax.errors import UserError
from tttjax.inference.session_file import load_session, save_session
from tttjax.interop.huggingface import export
from tttjax.interop.huggingface.import_ import open_huggingface
from tttjax.interop.huggingface.seal import EXPORT
from tttjax.io.sealed import SEAL
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.runs.load import load_model
from tttjax.runs.run import RunSpec, open_run
from tttjax.runs.tokenizer import load_run_tokenizer
from tttjax.training import checkpoint_integrity, checkpoints, saved_weights
from tttjax.training.checkpoint_integrity import checksums
from tttjax.training.step import weights_template

pytestmark = pytest.mark.slow

REFUSED, EARLIER, SAME, OTHER = "refused", "earlier", "same", "other"


# --- damages --------------------------------------------------------------------------------------


def flip(at):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 0x41
        path.write_bytes(content)

    return damage


def changed(value):
    """Values to replace `value` with: of the same type, and of another."""
    if isinstance(value, bool):
        return [not value, None]
    if isinstance(value, int | float):
        return [value + 1, -value - 5, "x", None]
    if isinstance(value, str):
        return [value + "x", "../" + value, 3]
    if value is None:
        return [7]
    return [value * 2 if isinstance(value, list) and value else 3, None]


def edits(values, path=()):
    """Copies of a JSON object, each with one value changed or removed."""
    children = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in children:
        if isinstance(value, dict | list) and value:
            for name, edited in edits(value, (*path, key)):
                yield name, replaced(values, key, edited)
        for new in changed(value):
            yield ".".join(map(str, (*path, key))), replaced(values, key, new)
    if isinstance(values, dict):
        for key in values:
            yield ".".join(map(str, (*path, key))), {k: v for k, v in values.items() if k != key}


def replaced(values, key, value):
    other = copy.copy(values)
    other[key] = value
    return other


def damages(path):
    """(description, function of the path) of every damage to a file."""
    result = {
        "removed": lambda p: p.unlink(),
        "empty": lambda p: os.truncate(p, 0),
        "cut short": lambda p: os.truncate(p, p.stat().st_size // 2),
        "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0x"),
        **{f"flipped at {at}": flip(at) for at in (0, 0.3, 0.5, 0.8, 1)},
    }
    if is_json(path):
        for text in ("null", "[]", "{}", "3", '"x"', "{"):
            result[text] = lambda p, text=text: p.write_text(text)
    return result.items()


def is_json(path):
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


def outcome(load, folder, good, earlier=None):
    try:
        result = load(folder)
    except UserError:
        return REFUSED
    if same(result, good):
        return SAME
    return EARLIER if earlier is not None and same(result, earlier) else OTHER


def same(a, b):
    return str(a) == str(b)


def damage_outcomes(folder, load, tmp_path, *, earlier=None, edited=(), excluded="-"):
    """{file: outcomes} of every damage to every file in a folder, and every edit of `edited`."""
    good, outcomes = load(folder), {}
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(excluded):
            continue
        candidates = [*damages(path)]
        if name.startswith("checkpoints/"):  # all are detected by the same check
            candidates = candidates[2:3] + candidates[6:7] + candidates[9:12]
        if name in edited:
            for description, values in edits(json.loads(path.read_text())):
                candidates.append((description, lambda p, v=values: p.write_text(json.dumps(v))))
        content = path.read_bytes()
        for description, damage in candidates:
            damage(copied / name)
            result = outcome(load, copied, good, earlier)
            assert result != OTHER, f"{name}, {description}: opens with another result"
            outcomes.setdefault(name, set()).add(result)
            (copied / name).write_bytes(content)
    return outcomes


def files_without_effect(outcomes):
    """Files for which at least one damage had no effect."""
    return {name for name, results in outcomes.items() if SAME in results}


def hash_arrays(tree):
    """A hash of all arrays of a tree."""
    arrays = [np.ascontiguousarray(x) for x in jax.tree.leaves(tree)]
    return hash(tuple((x.shape, x.dtype.name, x.tobytes()) for x in arrays))


# --- data sets ------------------------------------------------------------------------------------


def load_data(folder):
    """The full content of a prepared data set."""
    data = open_prepared(folder)
    splits = {
        name: (
            hash_arrays(data.split(name).read(0, data.split(name).num_tokens)),
            data.split(name).num_bytes,
            [*data.split(name).documents()],
        )
        for name in sorted(data.splits)
    }
    return splits, data.fingerprint, data.tokenizer.vocab_size, data.manifest["settings"]


@pytest.mark.parametrize("sealed", [True, False])
def test_damaged_data_are_refused(data, tmp_path, sealed):
    folder = tmp_path / "good" / "data"
    shutil.copytree(data, folder)
    if not sealed:
        as_version_1(folder)
    edited = ("manifest.json", "tokenizer/tokenizer_config.json") if sealed else ()

    def load(folder):  # the settings of an unsealed manifest cannot be checked
        return load_data(folder) if sealed else load_data(folder)[:-1]

    outcomes = damage_outcomes(folder, load, tmp_path, edited=edited)
    assert files_without_effect(outcomes) <= (set() if sealed else {"manifest.json"})


def as_version_1(folder):
    path = folder / "manifest.json"
    values = {**json.loads(path.read_text()), "version": 1}
    del values[SEAL]
    path.write_text(json.dumps(values))


def test_counts_of_an_unsealed_manifest_are_compared(data, tmp_path):
    folder = tmp_path / "good" / "data"
    shutil.copytree(data, folder)
    as_version_1(folder)
    good = load_data(folder)
    values = json.loads((folder / "manifest.json").read_text())
    for part in ("dtype", "splits", "tokenizer"):
        for description, edited in edits(values[part]) if part != "dtype" else [("", "<u4")]:
            if description in values["splits"]:  # a removed or renamed split
                continue
            (folder / "manifest.json").write_text(json.dumps({**values, part: edited}))
            assert outcome(load_data, folder, good) in (REFUSED, SAME), (part, description)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(make_run, tmp_path_factory):
    """A work directory with two checkpoints, their configuration, and a tokenizer."""
    template = make_run("template", suffix_layers=1, fast_mlp=True, mixers=("window",))
    config = read_config(template)
    folder = tmp_path_factory.mktemp("good") / "run"
    write_run_info(folder, config)
    ByteTokenizer().save(folder / TOKENIZER_DIR)
    model = build_model(config.model, config.inner)
    params = saved_weights.restore_params(template, weights_template(model, make_mesh()))
    saver = checkpoints.Checkpointer(folder / checkpoints.CHECKPOINT_DIR)
    for step in (2, 3):
        scaled = jax.tree.map(lambda x, k=step: jnp.asarray(np.asarray(x) * k), params)
        state = {"params": scaled, "step": np.int32(step)}
        saver.save(step, state, config=to_dict(config), tokenizer=ByteTokenizer().fingerprint())
    saver.close()
    return folder


def load_run(folder):
    """Step, checksums of the weights, tokenizer and configuration of an opened run."""
    opened_run = open_run(RunSpec(folder))
    weights = checksums(epath.Path(opened_run.checkpoint)) if opened_run.step == 3 else {}
    config = dataclasses.replace(opened_run.config, data=type(opened_run.config.data)())
    tokenizer = load_run_tokenizer(opened_run).fingerprint()
    return opened_run.step, weights, tokenizer, config_fingerprint(config)


# Files that no result depends on: Orbax's metadata, the record of starts, and config.json, which
# the configuration of the checkpoint replaces where it is missing or lacks a field.
UNUSED = {
    "checkpoints/3/_CHECKPOINT_METADATA",
    "checkpoints/3/commit_success.txt",
    "environment.json",
    "config.json",
}


def test_damaged_runs_are_refused_or_fall_back(run, tmp_path, capfd):
    second = tmp_path / "second"
    shutil.copytree(run, second)
    shutil.rmtree(second / "checkpoints" / "3")
    earlier = load_run(second)
    outcomes = damage_outcomes(run, load_run, tmp_path, earlier=earlier, excluded="checkpoints/2/")
    assert "is damaged" in capfd.readouterr().err
    # If the tokenizer is missing, the equal one of the data is used.
    assert files_without_effect(outcomes) <= UNUSED | {f"{TOKENIZER_DIR}/tokenizer_config.json"}
    items = [n for n in outcomes if n.startswith("checkpoints/3/") and n.count("/") > 2]
    assert len(items) > 5
    assert all(outcomes[name] == {EARLIER} for name in items)
    assert outcomes["checkpoints/3/checksums.json"] == {EARLIER}


def test_edited_configuration_is_refused_with_its_fields(run, tmp_path):
    path = tmp_path / "run" / "config.json"
    shutil.copytree(run, path.parent)
    values, good = json.loads(path.read_text()), load_run(run)
    for section in ("model", "inner", "train", "optim"):
        for field, value in values[section].items():
            if field == "init_from":  # a path, and runs move
                continue
            edited = {**values[section], field: changed(value)[0]}
            path.write_text(json.dumps({**values, section: edited}))
            assert outcome(load_run, path.parent, good) in (REFUSED, SAME), field
    model = {**values["model"], "rope_theta": 5.0}
    path.write_text(json.dumps({**values, "model": model}))
    with pytest.raises(UserError, match=r"\(model\.rope_theta was [\d.]+, is 5\.0\)"):
        load_run(path.parent)
    path.write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(UserError, match="has the format 99"):
        load_run(path.parent)


def test_nonfinite_weights_are_refused(run, tmp_path, monkeypatch):
    config = read_config(run)
    model = build_model(config.model, config.inner)
    params = saved_weights.restore_params(run, weights_template(model, make_mesh()))
    bad = jax.tree.map(lambda x: jnp.asarray(np.asarray(x) * np.float32(np.nan)), params)
    write_run_info(tmp_path, config)
    monkeypatch.setattr(checkpoint_integrity, "first_nonfinite", lambda state: None)
    saver = checkpoints.Checkpointer(tmp_path / checkpoints.CHECKPOINT_DIR)
    saver.save(3, {"params": bad})  # as earlier versions did
    monkeypatch.undo()
    saver.close()
    opened_run = open_run(RunSpec(tmp_path))
    with pytest.raises(UserError, match=r"weights .* are not finite"):
        opened_run.weights(weights_template(model, make_mesh()))


# --- sessions -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(run):
    return load_model(run)


@pytest.fixture(scope="module")
def session(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "good.session"
    engine = loaded.engine
    read, _ = engine.read(engine.start(), np.arange(12, dtype=np.int32))
    save_session(
        path, engine, read, model=loaded.model_fingerprint, tokenizer="t", chunk_losses=[2.5]
    )
    return path


def session_loader(loaded):
    def load(path):
        session, header = load_session(
            path, loaded.engine, model=loaded.model_fingerprint, tokenizer="t"
        )
        state = (
            session.learned,
            session.now,
            session.uncommitted,
            session.is_target,
            session.logit_V,
        )
        return session.tokens, hash_arrays(state), dataclasses.replace(header, format="", arrays="")

    return load


def rewrite(path, target, header=lambda h: h, arrays=lambda a: a, old=False):
    """Writes the session file with changed header and arrays. old: in the previous format."""
    with safe_open(path, "numpy") as file:
        values = json.loads(file.metadata()["session"])
    if old:
        values = {k: v for k, v in values.items() if k not in (SEAL, "arrays")}
        values["format"] = "tttjax-session-2"
    save_file(arrays(load_file(path)), target, metadata={"session": json.dumps(header(values))})


def test_damaged_sessions_are_refused(session, loaded, tmp_path):
    load, path = session_loader(loaded), tmp_path / "bad.session"
    good = load(session)
    size = session.stat().st_size
    candidates = [
        *damages(session),
        *((str(at), flip(at / size)) for at in range(0, size, size // 97)),
    ]
    for description, damage in candidates:
        shutil.copyfile(session, path)
        damage(path)
        assert outcome(load, path, good) == REFUSED, description


@pytest.mark.parametrize("old", [False, True])
def test_sessions_with_edited_header_are_refused(session, loaded, tmp_path, old):
    load, path = session_loader(loaded), tmp_path / "bad.session"
    good = load(session)
    rewrite(session, path, old=old)
    assert load(path) == good
    with safe_open(path, "numpy") as file:
        values = json.loads(file.metadata()["session"])
    # Fields that a file of the previous format has no check for.
    unchecked = ("drift", "layers", "lost", "chunk_losses", "chunk_losses_after", "source")
    for description, edited in edits(values):
        if old and description.split(".")[0] in (*unchecked, "tokens", "tokenizer"):
            continue
        rewrite(session, path, lambda _, e=edited: e, old=old)
        assert outcome(load, path, good) == REFUSED, description


@pytest.mark.parametrize("old", [False, True])
def test_sessions_with_other_arrays_are_refused(session, loaded, tmp_path, old):
    load, path = session_loader(loaded), tmp_path / "bad.session"
    good = load(session)
    for name, array in load_file(session).items():
        wrong = {
            "missing": None,
            "cut": array[..., :-1].copy() if array.shape[-1] else array[..., None],
            "other type": array.astype(np.float64),
        }
        if array.size and array.dtype == np.float32:
            wrong |= {"nan": np.where(np.arange(array.size).reshape(array.shape), array, np.nan)}
            wrong["nan"] = wrong["nan"].astype(np.float32)
            wrong |= {} if old else {"x 10": array * 10}
        for description, other in wrong.items():

            def change(arrays, name=name, other=other):
                return {k: v for k, v in {**arrays, name: other}.items() if v is not None}

            rewrite(session, path, arrays=change, old=old)
            assert outcome(load, path, good) == REFUSED, (name, description)
    rewrite(session, path, arrays=lambda a: {**a, "zzz": np.zeros(3, np.float32)}, old=old)
    assert outcome(load, path, good) == REFUSED


def test_nonfinite_session_is_not_written(session, loaded, tmp_path):
    engine = loaded.engine
    loaded_session, _ = load_session(session, engine, model=loaded.model_fingerprint)
    bad = dataclasses.replace(loaded_session, logit_V=loaded_session.logit_V * np.nan)
    with pytest.raises(UserError, match=r"is not written: .* logits is not finite"):
        save_session(tmp_path / "s", engine, bad, model=loaded.model_fingerprint)
    with pytest.raises(UserError, match="the loss of a chunk is not finite"):
        save_session(
            tmp_path / "s",
            engine,
            loaded_session,
            model=loaded.model_fingerprint,
            chunk_losses=[float("inf")],
        )
    assert not list(tmp_path.iterdir())


# --- exports --------------------------------------------------------------------------------------


def import_export(folder):
    """Configuration, weights and tokenizer of an imported export."""
    source = open_huggingface(folder, config="", overrides=[], tokenizer="", log=lambda line: None)
    model = build_model(source.config.model, source.config.inner)
    arrays = {str(weight[:-1]): weight[-1] for weight in source.iter_weights(model)}
    return source.config, hash_arrays(arrays), source.tokenizer.fingerprint()


def test_damaged_exports_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_compare", lambda *args: None)
    folder = tmp_path / "good" / "export"
    export.write_export(export.plan_export(run), folder, limit=4000)
    assert len([*folder.glob("*.safetensors")]) > 1
    outcomes = damage_outcomes(folder, import_export, tmp_path, edited=(EXPORT,))
    assert files_without_effect(outcomes) == {EXPORT}  # without it, a model of another tool
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not part of the export"):
        import_export(folder)
    values = json.loads((folder / EXPORT).read_text())
    (folder / EXPORT).write_text(json.dumps({**values, "format": 2}))
    with pytest.raises(UserError, match="export of format 2"):
        import_export(folder)
