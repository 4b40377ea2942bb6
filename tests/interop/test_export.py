"""Exports load in transformers and compute what the runs do, learning included."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tttjax.cli.main import main
from tttjax.errors import UserError
from tttjax.inference.generator import Generator, Request
from tttjax.inference.sampling import Sampling
from tttjax.interop.huggingface import export as exporting
from tttjax.interop.huggingface import names
from tttjax.interop.huggingface.compare import their_logits
from tttjax.io.locks import hold
from tttjax.runs.load import load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # what is computed here is too little to be divided
pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries, about themselves

STATIC = {"num_layers": 3, "num_heads": 2, "embed_dim": 8}
PLAIN = {"post_norm": False, "qk_norm": False}
HYBRID = ("window", "full", "window")
TTT = {"num_layers": 3, "num_heads": 2, "suffix_layers": 2, "fast_mlp": True}
LLAMA3 = (4.0, 1.0, 4.0, 16.0)
ARCHITECTURES = {
    "Llama": {**PLAIN, "mixers": ("full",), "tie_embeddings": False, "rope_scaling": LLAMA3},
    "Mistral": {**PLAIN, "mixers": ("window",), "rope_scaling": (2.0,)},
    "Ministral": {**PLAIN, "mixers": HYBRID, "tie_embeddings": False},
    "Qwen3": {"post_norm": False, "mixers": HYBRID, "num_kv_heads": 1, "rope_scaling": LLAMA3},
    "Gemma3": {"mixers": HYBRID, "num_kv_heads": 1, "rope_scaling": LLAMA3},
    "TTTJax": {"mixers": HYBRID, "pre_norm": False, "num_kv_heads": 1, "rope_scaling": LLAMA3},
}


@pytest.fixture
def modules_cache():
    """Where transformers copies the code of models that it loads (tests/conftest.py)."""
    return Path(transformers.dynamic_module_utils.HF_MODULES_CACHE) / "transformers_modules"


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **kwargs
    ).eval()


def export(workdir, folder, *options: str) -> int:
    return main(["export", str(workdir), f"--to={folder}", *options])


def deviations(said: str) -> list[float]:
    return [
        float(line.split("at most ")[1].split(";")[0])
        for line in said.splitlines()
        if "at most" in line
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_static_model_becomes_the_architecture_that_it_is(name, make_run, tmp_path, capsys):
    workdir = make_run(f"hf-{name}", **{**STATIC, **ARCHITECTURES[name]})
    assert export(workdir, tmp_path / "hf") == 0
    said = capsys.readouterr().out
    assert f"as {name}ForCausalLM" in said
    assert "other tokens" not in said
    assert len(deviations(said)) == 2  # by tttjax, by transformers
    assert max(deviations(said)) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# --- models that learn ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(make_run):
    return make_run("hf-ttt", **TTT)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports") / "ttt"
    assert export(run, folder, "--max-shard-size=4KB") == 0
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def opened(run):
    return load_model(run)


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(256, size=shape)


def logits(model, ids, **options) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(ids)), **options).logits.numpy()


def test_shards_have_an_index(folder, modules_cache):
    names = [path.name for path in modules_cache.iterdir()]
    assert "__init__.py" in names
    assert not [name for name in names if name.endswith("_dot_tmp")]  # no copy is left
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert {path.name for path in folder.glob("*.safetensors")} == files
    assert "auto_map" in json.loads((folder / "config.json").read_text())


def test_reading_learns_what_ours_learns(opened, model):
    ids = tokens(25)
    whole = logits(model, ids[None])[0]
    session = opened.engine.start()
    for start, end in ((0, 9), (9, 25)):
        session, _ = opened.engine.read(session, ids[start:end])
        np.testing.assert_allclose(whole[end - 1], session.logit_V, atol=1e-4)
    unlearned = logits(model, ids[None], learn=False)[0]
    np.testing.assert_allclose(unlearned[:8], whole[:8], atol=1e-5)
    assert np.abs(unlearned[-1] - whole[-1]).max() > 0.1


def test_greedy_writing_learns_as_it_goes(opened, model):
    ids = tokens(17)
    session, _ = opened.engine.read(opened.engine.start(), ids)
    request = Request(session, Sampling(temperature=0), max_tokens=24)
    ours = [piece.token for piece in Generator(opened.engine, opened.tokenizer, [request])]
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    batch = torch.from_numpy(ids[None])
    theirs = model.generate(batch, **options)[0, 17:].tolist()
    assert theirs == ours
    assert model.generate(batch, learn=False, **options)[0, 17:].tolist() != ours
    # Beside a longer text, with padding on the left.
    two = np.stack([np.concatenate((np.zeros(5, int), ids)), tokens(2, 22)[1]])
    mask = np.ones_like(two)
    mask[0, :5] = 0
    both = model.generate(torch.from_numpy(two), attention_mask=torch.from_numpy(mask), **options)
    assert both[0, 22:].tolist() == ours
    assert model.generate(
        batch, max_new_tokens=9, do_sample=True, num_return_sequences=2
    ).shape == (2, 26)


def test_any_split_of_calls_gives_the_same(model):
    ids = tokens(2, 29)
    whole = logits(model, ids)
    cache, found = None, []
    for start, end in ((0, 3), (3, 8), (8, 9), (9, 26), (26, 27), (27, 29)):
        with torch.no_grad():
            out = model(torch.from_numpy(ids[:, start:end]), past_key_values=cache)
        cache = out.past_key_values
        found.append(out.logits.numpy())
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, atol=1e-5)
    assert cache.get_seq_length() == 29
    kept = {layer[0].shape[1] for reading in cache.readings for layer in reading.past}
    assert kept == {7}  # of the window of 8, the next token's own key is the eighth
    np.testing.assert_allclose(logits(model, ids, logits_to_keep=2), whole[:, -2:], atol=1e-6)


@pytest.mark.parametrize("learns", [True, False])
def test_a_text_may_end_before_those_beside_it(learns, model, monkeypatch):
    if not learns:
        monkeypatch.setattr(model.config, "fast_parameters", [])
    ids, cache, found = tokens(2, 20), None, []
    mask = np.ones_like(ids)
    mask[0, 0] = 0
    mask[1, 9:] = 0
    for start, end in ((0, 12), (12, 20)):  # of the second text, nothing is in the second call
        options = {"attention_mask": torch.from_numpy(mask[:, :end]), "past_key_values": cache}
        with torch.no_grad():
            out = model(torch.from_numpy(ids[:, start:end]), **options)
        cache = out.past_key_values
        found.append(out.logits.numpy())
    both = np.concatenate(found, axis=1)
    np.testing.assert_allclose(both[0, 1:], logits(model, ids[:1, 1:])[0], atol=1e-5)
    np.testing.assert_allclose(both[1, :9], logits(model, ids[1:, :9])[0], atol=1e-5)
    assert not both[1, 9:].any()


def test_tokens_may_be_read_without_learning_from_them(opened, model):
    ids = tokens(25)
    session, _ = opened.engine.read(opened.engine.start(), ids[:9])
    session, _ = opened.engine.read(session, ids[9:], learn=False)
    with torch.no_grad():
        out = model(torch.from_numpy(ids[None, :9]))
        out = model(
            torch.from_numpy(ids[None, 9:]), past_key_values=out.past_key_values, learn=False
        )
    np.testing.assert_allclose(out.logits[0, -1], session.logit_V, atol=1e-4)


def test_without_learning_and_a_cache_it_can_be_trained(model):
    ids = torch.from_numpy(tokens(2, 12))
    model(ids, labels=ids, learn=False, use_cache=False).loss.backward()
    gradient = model.model.layers[0].self_attn.q_proj.weight.grad
    assert float(gradient.abs().sum()) > 0
    model.zero_grad()


def test_fast_weights_are_float32_in_bfloat16(run, tmp_path, capsys):
    assert export(run, tmp_path / "half", "--dtype=bfloat16") == 0
    assert "rounding to bfloat16 alone" in capsys.readouterr().out
    model = load(tmp_path / "half", dtype="auto")
    assert model.dtype == torch.bfloat16
    cache = model(torch.from_numpy(tokens(1, 20))).past_key_values
    assert {w.dtype for w in cache.readings[0].fast.values()} == {torch.float32}
    assert cache.readings[0].past[0][0].dtype == torch.bfloat16


def test_a_static_model_may_learn_too(make_run, tmp_path, capsys):
    workdir = make_run("hf-dynamic", **{**STATIC, "tie_embeddings": False, "mixers": HYBRID})
    assert export(workdir, tmp_path / "hf", "--mode=dynamic") == 0
    assert max(deviations(capsys.readouterr().out)) < 1e-4
    names = json.loads((tmp_path / "hf" / "config.json").read_text())["fast_parameters"]
    assert names == [f"model.layers.2.mlp.{w}_proj.weight" for w in ("gate", "up", "down")]


# --- what must not be -----------------------------------------------------------------------------


def test_a_folder_that_is_in_use_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists"):
        exporting.require_empty_dir(tmp_path, "--to")
    with pytest.raises(UserError, match="exists"):
        exporting.require_empty_dir(tmp_path / "file", "--to")
    for size in ("five", "0", "5TB"):
        with pytest.raises(UserError, match="is no size"):
            exporting.parse_size(size)
    assert exporting.parse_size("1.5 KB") == 1500


def test_models_that_cannot_be_exported_are_refused(make_run, tmp_path, capsys):
    workdir = make_run("hf-mamba", mixers=("mamba2",), mamba_head_dim=4, mamba_state=4)
    assert export(workdir, tmp_path / "hf") == 2
    assert "model.mixers has 'mamba2'. Exported are models" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_an_export_that_was_broken_off(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr(exporting, "write_tokenizer", fail)
    with pytest.raises(OSError, match="no space"):
        export(run, tmp_path / "deep" / "hf")
    assert not any(tmp_path.iterdir())


def test_a_second_export_to_one_place_is_refused(run, tmp_path, capsys):
    with hold(tmp_path / "hf", beside=True):
        assert export(run, tmp_path / "hf") == 2
    assert "hf is being written by another command (process" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_exports_have_the_permissions_of_the_umask(make_run, tmp_path, umask, mode):
    workdir = make_run("hf-permissions", **PLAIN)
    before = os.umask(umask)
    try:
        assert export(workdir, tmp_path / "hf", "--max-shard-size=4KB") == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()}
    assert modes == dict.fromkeys(modes, mode)
    assert len([name for name in modes if name.endswith(".safetensors")]) > 1
    assert (tmp_path / "hf").stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_transformers_cannot_open_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match=r"cannot open .* so nothing could be compared"):
        their_logits(tmp_path, np.arange(4), [0])


@pytest.mark.parametrize("both_ways", [False, True])
def test_a_wrong_export_is_noticed_and_removed(both_ways, run, tmp_path, capsys, monkeypatch):
    """A conversion wrong in one direction, or consistently in both: only transformers sees that."""
    monkeypatch.setattr(names, "_to_halves", lambda x: x)
    if both_ways:
        monkeypatch.setattr(names, "_to_pairs", lambda x: x)
    assert export(run, tmp_path / "hf") == 1
    who = "transformers" if both_ways else "tttjax"
    assert f"error: read {'' if both_ways else 'back '}by {who}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
