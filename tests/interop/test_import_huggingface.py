"""Import of Hugging Face models: same logits as transformers, also with fast MLPs added."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax.traverse_util import flatten_dict
from helpers.official_files import official_config
from safetensors.numpy import load_file, save_file

from tttjax.cli import main
from tttjax.config import read_config
from tttjax.data.tokenizers.base import load_tokenizer
from tttjax.errors import UserError
from tttjax.interop.huggingface import import_ as huggingface
from tttjax.interop.huggingface import tensor_slots
from tttjax.interop.huggingface.architectures import config_json, learning_json
from tttjax.interop.huggingface.files import write_tensors
from tttjax.interop.huggingface.import_ import open_huggingface
from tttjax.interop.streaming import assemble
from tttjax.interop.transfer import import_run
from tttjax.models.stacking import combine
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.runs.run import RunSpec, open_run
from tttjax.training.step import make_trainer, weights_template
from tttjax.types import Batch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # by torch and transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAST = (
    *("--config.model.fast_mlp=true", "--config.model.suffix_layers=2"),
    *("--config.inner.chunk_size=8", "--config.train.seq_len=32", "--config.train.batch_size=2"),
)


def save_model(folder, family, dtype=None, shard="1GB", **fields):
    """Saves a random model with transformers."""
    kinds = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }
    make_config, make_model = kinds[family]
    torch.manual_seed(0)
    with torch.no_grad():
        model = make_model(make_config(**{**SIZES, "initializer_range": 0.3, **fields}))
        for name, weight in model.named_parameters():
            if "norm" in name:  # so that no two norms are the same
                weight.mul_(torch.rand_like(weight) + 0.5)
        model.to(dtype or torch.float32).save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return save_model(folder, "llama", rope_parameters=LLAMA3, tie_word_embeddings=False)


def whitespace_tokenizer(words):
    """The JSON of a whitespace tokenizer."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    deviations = tokenizers.Tokenizer(model)
    deviations.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return deviations.to_str()


CASES = {
    "llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": False},
    "qwen3": {"head_dim": 6, "tie_word_embeddings": True, "shard": "8KB"},
}


@pytest.mark.parametrize("family", CASES)
def test_logits_are_those_of_transformers(family, tmp_path, capsys):
    folder = save_model(tmp_path / "hf", family, **CASES[family])
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (family == "qwen3")
    (folder / "tokenizer.json").write_text(whitespace_tokenizer(["<unk>", "<s>", "</s>", "a", "b"]))
    assert main.main(["import", str(folder), f"--workdir={tmp_path / 'run'}"]) == 0
    output = capsys.readouterr().out
    compared = next(line for line in output.splitlines() if "compared with transformers" in line)
    assert float(compared.split("at most ")[1].split()[0]) < 1e-4
    config = read_config(tmp_path / "run")
    assert config.model.kv_heads == 2
    assert config.train.seq_len == 256
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.fingerprint() == open_run(RunSpec(tmp_path / "run")).tokenizer


def test_new_fast_mlps_start_as_identity(tmp_path):
    """Logits equal those of transformers; training lowers the loss and moves all fast weights."""
    lines, folder = [], save_model(tmp_path / "hf", "llama", num_hidden_layers=2)
    fast = (*FAST, "--config.model.suffix_layers=1")
    source = open_huggingface(folder, overrides=fast, log=lines.append)
    assert source.config.model.fast_mlp_init == "zero"
    deviations = import_run(source, tmp_path / "run", log=lines.append)
    assert deviations.reference < 1e-4
    assert deviations.read_back == 0
    assert any("start at 0" in line or "starts at 0" in line for line in lines)
    run = open_run(RunSpec(tmp_path / "run"))
    trainer = make_trainer(run.config, make_mesh(devices=jax.devices()[:1]))
    params = run.weights(trainer.abstract_state.params)
    start = jax.tree.map(np.asarray, params)
    last = start.fast["suffix"]["stage0"]["block0"]["fast_mlp"]["w2"]
    assert last.shape == (1, 24, 16)
    assert not last.any()
    rng = np.random.default_rng(0)
    token_BT = np.tile(rng.integers(96, size=(2, 1), dtype=np.int32), (1, 33))
    batch = Batch(token_BT[:, :-1], token_BT[:, 1:], np.ones((2, 32), bool))
    state, losses = trainer.start_from(params), []
    for _ in range(4):
        state, metrics = trainer.step(state, trainer.put_batch(batch))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - np.asarray(b)).max()), start, state.params)
    assert min(jax.tree.leaves(moved.fast)) > 0


def test_window_and_theta_can_be_overridden(llama, tmp_path, capsys):
    more = ["--config.model.mixers=window", "--config.model.window_size=8"]
    words = ["import", str(llama), f"--workdir={tmp_path / 'run'}", *FAST, *more]
    assert main.main([*words, "--config.model.rope_theta=2e6"]) == 0
    output = capsys.readouterr().out
    assert "compared with transformers" in output
    config = read_config(tmp_path / "run")
    assert (config.model.window_size, config.model.rope_theta) == (8, 2e6)


def test_bfloat16_weights_are_exact(tmp_path):
    folder = save_model(tmp_path / "hf", "llama", dtype=torch.bfloat16)
    source = open_huggingface(folder, log=lambda line: None)
    assert source.config.model.compute_dtype == "bfloat16"
    assert import_run(source, tmp_path / "run", log=lambda line: None).reference < 1e-4
    run = open_run(RunSpec(tmp_path / "run"))
    model = build_model(run.config.model, run.config.inner)
    params = run.weights(weights_template(model, make_mesh()))
    stored = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params.slow["embedding"], stored.astype(np.float32))
    assert params.slow["embedding"].dtype == jnp.float32


def test_without_transformers_the_command_says_so(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "transformers_logits", lambda *args, **kwargs: None)
    lines = []
    deviations = import_run(
        open_huggingface(llama, log=lines.append), tmp_path / "run", lines.append
    )
    assert deviations.reference is None
    assert any("transformers is not installed" in line for line in lines)


def test_config_cannot_load_foreign_kernels(llama, tmp_path):
    """transformers would download this kernel and run it."""
    folder = shutil.copytree(llama, tmp_path / "hf")
    edit_config(folder, attn_implementation="kernels-community/flash-attn")
    source = open_huggingface(folder, log=lambda line: None)
    assert import_run(source, tmp_path / "run", log=lambda line: None).reference < 1e-4


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def reshape(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].copy()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: edit_config(f, model_type="gpt2"), "'gpt2' is not supported.*llama.*qwen3"),
        (lambda f: edit_config(f, attention_bias=True), "projections with a bias"),
        (lambda f: edit_config(f, num_hidden_layers=2), "unexpected model.layers.2"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (cut_short, "cannot be read"),
        (reshape, r"model.norm.weight has shape \(5,\), not \(16,\)"),
    ],
)
def test_bad_sources_are_one_sentence(llama, damage, sentence, tmp_path, capsys):
    folder = shutil.copytree(llama, tmp_path / "hf")
    damage(folder)
    assert main.main(["import", str(folder), f"--workdir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError(err)
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_deviating_logits_are_refused(llama, tmp_path, monkeypatch):
    theirs = huggingface.transformers_logits

    def scaled_logits(*args, **kwargs):
        return theirs(*args, **kwargs) * 1.01

    monkeypatch.setattr(huggingface, "transformers_logits", scaled_logits)
    with pytest.raises(UserError, match=r"differ by at most .* was not imported"):
        import_run(open_huggingface(llama, log=lambda line: None), tmp_path / "run", print)
    assert list(tmp_path.iterdir()) == []


def test_only_fast_mlps_can_be_added(llama):
    with pytest.raises(UserError, match=r"has no tensor for .*q_norm.*only fast MLPs can be added"):
        open_huggingface(llama, overrides=("--config.model.qk_norm=true",), log=lambda line: None)


def test_exports_can_be_imported(tmp_path):
    config = official_config(num_kv_heads=1, rope_scaling=(4.0, 1.0, 4.0, 16.0))
    model = build_model(config.model, config.inner)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape, np.float32), model.abstract_params()
    )
    flat = flatten_dict(combine(params.slow, params.fast), sep="/")

    def read(slot):
        return np.asarray(flat[slot.path] if slot.row is None else flat[slot.path][slot.row])

    slots = tensor_slots(model, "tttjax")
    write_tensors(tmp_path, slots, read, dtype="float32", limit=2**30)
    values = config_json(config.model, "tttjax", dtype="float32", max_length=32, tokens={})
    values |= learning_json(model, config.inner, 0.5, learn=True)
    (tmp_path / "config.json").write_text(json.dumps(values))
    source = open_huggingface(tmp_path, log=lambda line: None)
    assert source.config.inner == dataclasses.replace(config.inner, lr=0.5)
    head_dim = config.model.head_size  # which an export states
    assert source.config.model == dataclasses.replace(config.model, head_dim=head_dim)
    assert source.reference is None
    template = weights_template(model, make_mesh(devices=jax.devices()[:1]))
    for actual, expected_leaf in zip(
        jax.tree.leaves(assemble(template, source.iter_weights(model), model)),
        jax.tree.leaves(params),
        strict=True,
    ):
        np.testing.assert_array_equal(actual, expected_leaf)
