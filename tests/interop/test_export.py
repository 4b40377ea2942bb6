"""Exports load in transformers and compute the same logits, with test-time training."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tttjax.cli.main import main
from tttjax.errors import UserError
from tttjax.inference.generator import Generator, Request
from tttjax.inference.options import Sampling
from tttjax.interop.huggingface import export as exporting
from tttjax.interop.huggingface import names
from tttjax.interop.huggingface.compare import transformers_logits
from tttjax.io.atomic import require_empty_dir
from tttjax.io.locks import hold
from tttjax.models.mamba2.config import Mamba2Config
from tttjax.runs.load import load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # the models are too small for threads
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # by torch and transformers

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
    """The folder where transformers caches modeling code (tests/conftest.py)."""
    return Path(transformers.dynamic_module_utils.HF_MODULES_CACHE) / "transformers_modules"


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **kwargs
    ).eval()


def export(workdir, folder, *options: str) -> int:
    return main(["export", str(workdir), f"--to={folder}", *options])


def deviations(output: str) -> list[float]:
    return [
        float(line.split("at most ")[1].split(";")[0])
        for line in output.splitlines()
        if "at most" in line
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_static_models_become_stock_architectures(name, make_run, tmp_path, capsys):
    workdir = make_run(f"hf-{name}", **{**STATIC, **ARCHITECTURES[name]})
    assert export(workdir, tmp_path / "hf") == 0
    output = capsys.readouterr().out
    assert f"as {name}ForCausalLM" in output
    assert "tokenizes" not in output
    assert len(deviations(output)) == 2  # by tttjax, by transformers
    assert max(deviations(output)) < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# --- test-time training ---------------------------------------------------------------------------


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


def test_forward_learns_as_tttjax_does(opened, model):
    ids = tokens(25)
    full_logits = logits(model, ids[None])[0]
    session = opened.engine.start()
    for start, end in ((0, 9), (9, 25)):
        session, _ = opened.engine.read(session, ids[start:end])
        np.testing.assert_allclose(full_logits[end - 1], session.logit_V, atol=1e-4)
    unlearned = logits(model, ids[None], learn=False)[0]
    np.testing.assert_allclose(unlearned[:8], full_logits[:8], atol=1e-5)
    assert np.abs(unlearned[-1] - full_logits[-1]).max() > 0.1


def test_greedy_generation_learns_as_tttjax_does(opened, model):
    ids = tokens(17)
    session, _ = opened.engine.read(opened.engine.start(), ids)
    request = Request(session, Sampling(temperature=0), max_tokens=24)
    ours = [generated.token for generated in Generator(opened.engine, opened.tokenizer, [request])]
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
    batch = torch.from_numpy(ids[None])
    theirs = model.generate(batch, **options)[0, 17:].tolist()
    assert theirs == ours
    assert model.generate(batch, learn=False, **options)[0, 17:].tolist() != ours
    # In a batch with a longer text, with padding on the left.
    two = np.stack([np.concatenate((np.zeros(5, int), ids)), tokens(2, 22)[1]])
    mask = np.ones_like(two)
    mask[0, :5] = 0
    batched = model.generate(
        torch.from_numpy(two), attention_mask=torch.from_numpy(mask), **options
    )
    assert batched[0, 22:].tolist() == ours
    assert model.generate(
        batch, max_new_tokens=9, do_sample=True, num_return_sequences=2
    ).shape == (2, 26)


def test_logits_do_not_depend_on_split_into_calls(model):
    ids = tokens(2, 29)
    full_logits = logits(model, ids)
    cache, outputs = None, []
    for start, end in ((0, 3), (3, 8), (8, 9), (9, 26), (26, 27), (27, 29)):
        with torch.no_grad():
            out = model(torch.from_numpy(ids[:, start:end]), past_key_values=cache)
        cache = out.past_key_values
        outputs.append(out.logits.numpy())
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), full_logits, atol=1e-5)
    assert cache.get_seq_length() == 29
    buffered = {layer[0].shape[1] for reading in cache.readings for layer in reading.past}
    assert buffered == {7}  # window 8, with the key of the next token
    np.testing.assert_allclose(logits(model, ids, logits_to_keep=2), full_logits[:, -2:], atol=1e-6)


@pytest.mark.parametrize("learns", [True, False])
def test_texts_of_a_batch_may_have_different_lengths(learns, model, monkeypatch):
    if not learns:
        monkeypatch.setattr(model.config, "fast_parameters", [])
    ids, cache, outputs = tokens(2, 20), None, []
    mask = np.ones_like(ids)
    mask[0, 0] = 0
    mask[1, 9:] = 0
    for start, end in ((0, 12), (12, 20)):  # the second text ends in the first call
        options = {"attention_mask": torch.from_numpy(mask[:, :end]), "past_key_values": cache}
        with torch.no_grad():
            out = model(torch.from_numpy(ids[:, start:end]), **options)
        cache = out.past_key_values
        outputs.append(out.logits.numpy())
    batched = np.concatenate(outputs, axis=1)
    np.testing.assert_allclose(batched[0, 1:], logits(model, ids[:1, 1:])[0], atol=1e-5)
    np.testing.assert_allclose(batched[1, :9], logits(model, ids[1:, :9])[0], atol=1e-5)
    assert not batched[1, 9:].any()


def test_forward_without_learning(opened, model):
    ids = tokens(25)
    session, _ = opened.engine.read(opened.engine.start(), ids[:9])
    session, _ = opened.engine.read(session, ids[9:], learn=False)
    with torch.no_grad():
        out = model(torch.from_numpy(ids[None, :9]))
        out = model(
            torch.from_numpy(ids[None, 9:]), past_key_values=out.past_key_values, learn=False
        )
    np.testing.assert_allclose(out.logits[0, -1], session.logit_V, atol=1e-4)


def test_backward_without_learning_and_cache(model):
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


def test_dynamic_evaluation_of_a_static_model(make_run, tmp_path, capsys):
    workdir = make_run("hf-dynamic", **{**STATIC, "tie_embeddings": False, "mixers": HYBRID})
    assert export(workdir, tmp_path / "hf", "--mode=dynamic") == 0
    assert max(deviations(capsys.readouterr().out)) < 1e-4
    names = json.loads((tmp_path / "hf" / "config.json").read_text())["fast_parameters"]
    assert names == [f"model.layers.2.mlp.{w}_proj.weight" for w in ("gate", "up", "down")]


# --- errors ---------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists"):
        require_empty_dir(tmp_path, "--to")
    with pytest.raises(UserError, match="exists"):
        require_empty_dir(tmp_path / "file", "--to")
    for size in ("five", "0", "5TB"):
        with pytest.raises(UserError, match="is no size"):
            exporting.parse_size(size)
    assert exporting.parse_size("1.5 KB") == 1500


def test_models_that_cannot_be_exported_are_refused(make_run, tmp_path, capsys):
    workdir = make_run(
        "hf-mamba", mixers=("mamba2",), mamba2=Mamba2Config(head_dim=4, state_size=4)
    )
    assert export(workdir, tmp_path / "hf") == 2
    err = capsys.readouterr().err
    assert "model.mixers has 'mamba2'" in err
    assert "Only models whose blocks" in err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr(exporting, "write_tokenizer", fail)
    with pytest.raises(OSError, match="no space"):
        export(run, tmp_path / "deep" / "hf")
    assert not any(tmp_path.iterdir())


def test_a_concurrent_export_is_refused(run, tmp_path, capsys):
    with hold(tmp_path / "hf", beside=True):
        assert export(run, tmp_path / "hf") == 2
    assert "hf is being written by another command (process" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_exports_have_the_permissions_of_the_umask(run, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        assert export(run, tmp_path / "hf", "--max-shard-size=4KB") == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()}
    assert modes == dict.fromkeys(modes, mode)
    assert len([name for name in modes if name.endswith(".safetensors")]) > 1
    assert (tmp_path / "hf").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_transformers_error_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match=r"cannot open .* logits were not compared"):
        transformers_logits(tmp_path, np.arange(4), [0])


@pytest.mark.parametrize("both_directions", [False, True])
def test_a_wrong_export_is_noticed_and_removed(both_directions, run, tmp_path, capsys, monkeypatch):
    """The conversion is wrong in one direction or in both; only transformers detects the latter."""
    monkeypatch.setattr(names, "_to_half_split", lambda x: x)
    if both_directions:
        monkeypatch.setattr(names, "_to_interleaved", lambda x: x)
    assert export(run, tmp_path / "hf") == 1
    reader = "transformers" if both_directions else "tttjax"
    assert f"error: read {'' if both_directions else 'back '}by {reader}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
