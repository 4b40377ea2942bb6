"""Every kind of file, damaged in every way: refused in one sentence, or without any effect.

What opening gives is compared in full, so that a file that is read as if nothing had happened, with
another result, is a failure; and so is every exception that users are not meant to see.
"""

import copy
import dataclasses
import json
import os
import shutil

import jax
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
from tttjax.models import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.runs.load import load_model
from tttjax.runs.run import RunSpec, open_run
from tttjax.runs.tokenizer import load_run_tokenizer
from tttjax.training import checkpoints
from tttjax.training.checkpoint_format import checksums
from tttjax.training.step import weights_template

REFUSED, EARLIER, SAME, OTHER = "refused", "earlier", "same", "other"


# --- damages --------------------------------------------------------------------------------------


def flip(at):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 0x41
        path.write_bytes(content)

    return damage


def changed(value):
    """Another value of the same type, and one of another."""
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
    """Copies of an object, each with one value changed, or left out."""
    children = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in children:
        if isinstance(value, dict | list) and value:
            for name, edited in edits(value, (*path, key)):
                yield name, put(values, key, edited)
        for new in changed(value):
            yield ".".join(map(str, (*path, key))), put(values, key, new)
    if isinstance(values, dict):
        for key in values:
            yield ".".join(map(str, (*path, key))), {k: v for k, v in values.items() if k != key}


def put(values, key, value):
    other = copy.copy(values)
    other[key] = value
    return other


def damages(path):
    """(what, function of the path) for a file."""
    found = {
        "removed": lambda p: p.unlink(),
        "empty": lambda p: os.truncate(p, 0),
        "cut short": lambda p: os.truncate(p, p.stat().st_size // 2),
        "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0x"),
        **{f"flipped at {at}": flip(at) for at in (0, 0.3, 0.5, 0.8, 1)},
    }
    if is_json(path):
        for text in ("null", "[]", "{}", "3", '"x"', "{"):
            found[text] = lambda p, text=text: p.write_text(text)
    return found.items()


def is_json(path):
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


def outcome(look, folder, good, earlier=None):
    try:
        found = look(folder)
    except UserError:
        return REFUSED
    if same(found, good):
        return SAME
    return EARLIER if earlier is not None and same(found, earlier) else OTHER


def same(a, b):
    return str(a) == str(b)


def all_outcomes(folder, look, tmp_path, *, earlier=None, edited=(), left_out="-"):
    """{file: outcomes} of every damage to every file in a folder; of JSON, of every edit too."""
    good, found = look(folder), {}
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith(left_out):
            continue
        tried = [*damages(path)]
        if name.startswith("checkpoints/"):  # all of them are found by one comparison
            tried = tried[2:3] + tried[6:7] + tried[9:12]
        if name in edited:
            for what, values in edits(json.loads(path.read_text())):
                tried.append((what, lambda p, v=values: p.write_text(json.dumps(v))))
        whole = path.read_bytes()
        for what, damage in tried:
            damage(copied / name)
            result = outcome(look, copied, good, earlier)
            assert result != OTHER, f"{name}, {what}: read with another result"
            found.setdefault(name, set()).add(result)
            (copied / name).write_bytes(whole)
    return found


def without_effect(outcomes):
    """Files of which at least one damage went without any effect."""
    return {name for name, found in outcomes.items() if SAME in found}


def sum_of(tree):
    """Of arrays: a number that changes with every bit of them."""
    arrays = [np.ascontiguousarray(x) for x in jax.tree.leaves(tree)]
    return hash(tuple((x.shape, x.dtype.name, x.tobytes()) for x in arrays))


# --- data sets ------------------------------------------------------------------------------------


def see_data(folder):
    """All that can be read out of a prepared data set."""
    data = open_prepared(folder)
    splits = {
        name: (
            sum_of(data.split(name).read(0, data.split(name).num_tokens)),
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

    def see(folder):  # nothing says that an unsealed manifest's settings are what they were
        return see_data(folder) if sealed else see_data(folder)[:-1]

    outcomes = all_outcomes(folder, see, tmp_path, edited=edited)
    assert without_effect(outcomes) <= (set() if sealed else {"manifest.json"})


def as_version_1(folder):
    path = folder / "manifest.json"
    values = {**json.loads(path.read_text()), "version": 1}
    del values[SEAL]
    path.write_text(json.dumps(values))


def test_counts_of_an_unsealed_manifest_are_compared(data, tmp_path):
    folder = tmp_path / "good" / "data"
    shutil.copytree(data, folder)
    as_version_1(folder)
    good = see_data(folder)
    values = json.loads((folder / "manifest.json").read_text())
    for part in ("dtype", "splits", "tokenizer"):
        for what, edited in edits(values[part]) if part != "dtype" else [("", "<u4")]:
            if what in values["splits"]:  # a split that is missing, or called otherwise
                continue
            (folder / "manifest.json").write_text(json.dumps({**values, part: edited}))
            assert outcome(see_data, folder, good) in (REFUSED, SAME), (part, what)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(make_run, tmp_path_factory):
    """A work directory with two checkpoints that know their configuration, and a tokenizer."""
    template = make_run("template", suffix_layers=1, fast_mlp=True, mixers=("window",))
    config = read_config(template)
    folder = tmp_path_factory.mktemp("good") / "run"
    write_run_info(folder, config)
    ByteTokenizer().save(folder / TOKENIZER_DIR)
    model = build_model(config.model, config.inner)
    params = checkpoints.restore_params(template, weights_template(model, make_mesh()))
    saver = checkpoints.Checkpointer(folder / checkpoints.CHECKPOINT_DIR)
    for step in (2, 3):
        state = {"params": jax.tree.map(lambda x, k=step: x * k, params), "step": np.int32(step)}
        saver.save(step, state, config=to_dict(config), tokenizer=ByteTokenizer().fingerprint())
    saver.close()
    return folder


def see_run(folder):
    """What commands that open a run get of it: the files of the weights, and all that they need."""
    found = open_run(RunSpec(folder))
    weights = checksums(epath.Path(found.checkpoint)) if found.step == 3 else {}
    config = dataclasses.replace(found.config, data=type(found.config.data)())
    tokenizer = load_run_tokenizer(found).fingerprint()
    return found.step, weights, tokenizer, config_fingerprint(config)


# What no result reads: Orbax's own notes, the record of starts, and where config.json is missing
# or leaves a field at its default, the configuration is that of the checkpoint.
UNREAD = {
    "checkpoints/3/_CHECKPOINT_METADATA",
    "checkpoints/3/commit_success.txt",
    "environment.json",
    "config.json",
}


def test_damaged_runs_are_refused_or_an_earlier_checkpoint_read(run, tmp_path, capfd):
    second = tmp_path / "second"
    shutil.copytree(run, second)
    shutil.rmtree(second / "checkpoints" / "3")
    earlier = see_run(second)
    outcomes = all_outcomes(run, see_run, tmp_path, earlier=earlier, left_out="checkpoints/2/")
    assert "is damaged" in capfd.readouterr().err
    # Where the tokenizer is missing, that of the data is taken, which is the same.
    assert without_effect(outcomes) <= UNREAD | {f"{TOKENIZER_DIR}/tokenizer_config.json"}
    items = [n for n in outcomes if n.startswith("checkpoints/3/") and n.count("/") > 2]
    assert len(items) > 5
    assert all(outcomes[name] == {EARLIER} for name in items)
    assert outcomes["checkpoints/3/checksums.json"] == {EARLIER}


def test_an_edited_configuration_is_refused_with_its_fields(run, tmp_path):
    path = tmp_path / "run" / "config.json"
    shutil.copytree(run, path.parent)
    values, good = json.loads(path.read_text()), see_run(run)
    for section in ("model", "inner", "train", "optim"):
        for field, value in values[section].items():
            if field == "init_from":  # a path, and runs move
                continue
            edited = {**values[section], field: changed(value)[0]}
            path.write_text(json.dumps({**values, section: edited}))
            assert outcome(see_run, path.parent, good) in (REFUSED, SAME), field
    model = {**values["model"], "rope_theta": 5.0}
    path.write_text(json.dumps({**values, "model": model}))
    with pytest.raises(UserError, match=r"\(model\.rope_theta was [\d.]+, is 5\.0\)"):
        see_run(path.parent)
    path.write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(UserError, match="has the format 99"):
        see_run(path.parent)


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    config = read_config(run)
    model = build_model(config.model, config.inner)
    params = checkpoints.restore_params(run, weights_template(model, make_mesh()))
    bad = jax.tree.map(lambda x: x * np.nan, params)
    write_run_info(tmp_path, config)
    saver = checkpoints.Checkpointer(tmp_path / checkpoints.CHECKPOINT_DIR)
    saver.save(3, {"params": bad})
    saver.close()
    found = open_run(RunSpec(tmp_path))
    with pytest.raises(UserError, match=r"weights .* are not finite"):
        found.weights(weights_template(model, make_mesh()))


# --- sessions -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(run):
    return load_model(run)


@pytest.fixture(scope="module")
def session(opened, tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "good.session"
    engine = opened.engine
    read, _ = engine.read(engine.start(), np.arange(20, dtype=np.int32))
    save_session(
        path, engine, read, model=opened.model_fingerprint, tokenizer="t", chunk_losses=[2.5]
    )
    return path


def see_session(opened):
    def look(path):
        found, about = load_session(
            path, opened.engine, model=opened.model_fingerprint, tokenizer="t"
        )
        state = found.learned, found.now, found.pending, found.counted, found.logit_V
        return found.tokens, sum_of(state), dataclasses.replace(about, format="", arrays="")

    return look


def rewrite(path, target, header=lambda h: h, arrays=lambda a: a, old=False):
    """The session file with its header and arrays changed; old: of the format before."""
    with safe_open(path, "numpy") as file:
        values = json.loads(file.metadata()["session"])
    if old:
        values = {k: v for k, v in values.items() if k not in (SEAL, "arrays")}
        values["format"] = "tttjax-session-2"
    save_file(arrays(load_file(path)), target, metadata={"session": json.dumps(header(values))})


def test_damaged_sessions_are_refused(session, opened, tmp_path):
    look, path = see_session(opened), tmp_path / "bad.session"
    good = look(session)
    size = session.stat().st_size
    tried = [*damages(session), *((str(at), flip(at / size)) for at in range(0, size, size // 97))]
    for what, damage in tried:
        shutil.copyfile(session, path)
        damage(path)
        assert outcome(look, path, good) == REFUSED, what


@pytest.mark.parametrize("old", [False, True])
def test_sessions_with_an_edited_header_are_refused(session, opened, tmp_path, old):
    look, path = see_session(opened), tmp_path / "bad.session"
    good = look(session)
    rewrite(session, path, old=old)
    assert look(path) == good
    with safe_open(path, "numpy") as file:
        values = json.loads(file.metadata()["session"])
    # What nothing else in a file of the format before tells of.
    shown = ("drift", "layers", "lost", "chunk_losses", "chunk_losses_after", "source", "rank")
    for what, edited in edits(values):
        if old and what.split(".")[0] in (*shown, "tokens", "tokenizer"):
            continue
        rewrite(session, path, lambda _, e=edited: e, old=old)
        assert outcome(look, path, good) == REFUSED, what


@pytest.mark.parametrize("old", [False, True])
def test_sessions_with_other_arrays_are_refused(session, opened, tmp_path, old):
    look, path = see_session(opened), tmp_path / "bad.session"
    good = look(session)
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
        for what, other in wrong.items():

            def change(arrays, name=name, other=other):
                return {k: v for k, v in {**arrays, name: other}.items() if v is not None}

            rewrite(session, path, arrays=change, old=old)
            assert outcome(look, path, good) == REFUSED, (name, what)
    rewrite(session, path, arrays=lambda a: {**a, "zzz": np.zeros(3, np.float32)}, old=old)
    assert outcome(look, path, good) == REFUSED


def test_a_session_that_is_not_finite_is_not_written(session, opened, tmp_path):
    engine = opened.engine
    found, _ = load_session(session, engine, model=opened.model_fingerprint)
    bad = dataclasses.replace(found, logit_V=found.logit_V * np.nan)
    with pytest.raises(UserError, match=r"is not written: .* logits is not finite"):
        save_session(tmp_path / "s", engine, bad, model=opened.model_fingerprint)
    with pytest.raises(UserError, match="the loss of a chunk is not finite"):
        save_session(
            tmp_path / "s",
            engine,
            found,
            model=opened.model_fingerprint,
            chunk_losses=[float("inf")],
        )
    assert not list(tmp_path.iterdir())


# --- exports --------------------------------------------------------------------------------------


def see_export(folder):
    """What an import makes of it."""
    source = open_huggingface(folder, config="", overrides=[], tokenizer="", say=lambda line: None)
    model = build_model(source.config.model, source.config.inner)
    arrays = {str(piece[:-1]): piece[-1] for piece in source.pieces(model)}
    return source.config, sum_of(arrays), source.tokenizer.fingerprint()


def test_damaged_exports_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_compare", lambda *args: None)
    folder = tmp_path / "good" / "export"
    export.write(export.plan(run), folder, limit=4000)
    assert len([*folder.glob("*.safetensors")]) > 1
    outcomes = all_outcomes(folder, see_export, tmp_path, edited=(EXPORT,))
    assert without_effect(outcomes) == {EXPORT}  # removed: a model from elsewhere
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="was not exported with the rest"):
        see_export(folder)
    values = json.loads((folder / EXPORT).read_text())
    (folder / EXPORT).write_text(json.dumps({**values, "format": 2}))
    with pytest.raises(UserError, match="export of the format 2"):
        see_export(folder)
