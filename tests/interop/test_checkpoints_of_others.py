"""Import of unusual Hugging Face models: several EOS tokens, untied heads, quantized weights."""

import json
import struct

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from tttjax.cli import main
from tttjax.config import read_config
from tttjax.data.tokenizers.base import load_tokenizer
from tttjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from tttjax.errors import UserError
from tttjax.inference.generator import Generator, Request
from tttjax.inference.options import Sampling
from tttjax.interop.huggingface import import_ as huggingface
from tttjax.interop.huggingface import tensor_slots
from tttjax.interop.huggingface.files import INDEX, SINGLE
from tttjax.interop.huggingface.import_ import open_huggingface
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.runs.load import load_model
from tttjax.runs.run import RunSpec, open_run
from tttjax.training.step import weights_template

WORDS = ("<unk>", "<s>", "</s>", *map(chr, range(97, 126)))
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # by torch and transformers


@pytest.fixture
def folder(tmp_path):
    """A Llama with random weights and a tokenizer of letters."""
    folder = tmp_path / "hf"
    folder.mkdir()
    edit(folder, "config.json", **CONFIG)
    config = huggingface._resolve("", (), huggingface.config_from_huggingface(CONFIG), CONFIG)
    rng = np.random.default_rng(0)
    slots = tensor_slots(build_model(config.model, config.inner), "llama")
    tensors = {p.name: rng.standard_normal(p.shape, np.float32) for p in slots}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    letters = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>")
    (folder / "tokenizer.json").write_text(tokenizers.Tokenizer(letters).to_str())
    return folder


@pytest.fixture
def without_transformers(monkeypatch):
    monkeypatch.setattr(huggingface, "transformers_logits", lambda *args, **kwargs: None)


def edit(folder, name, **fields):
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **fields}))


def open_quietly(folder, *overrides):
    return open_huggingface(folder, overrides=overrides, log=lambda line: None)


def change(folder, **tensors):
    """Tensors by name with "__" for a dot."""
    new = {name.replace("__", "."): array for name, array in tensors.items()}
    save_file({**load_file(folder / SINGLE), **new}, folder / SINGLE, metadata={"format": "pt"})


def recast(folder, name, kind, bits):
    """Replaces a tensor by zeros of another dtype."""
    data = (folder / SINGLE).read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header, packed = json.loads(data[8:start]), b""
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        body = data[slice(*(start + at for at in entry["data_offsets"]))]
        if tensor == name:
            entry["dtype"], body = kind, bytes(len(body) * bits // 32)  # they were float32
        entry["data_offsets"] = [len(packed), len(packed) + len(body)]
        packed += body
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + packed)


# --- several EOS tokens ---------------------------------------------------------------------------


def test_end_tokens_of_all_files_are_imported(folder):
    edit(folder, "config.json", eos_token_id=[2, 5])
    edit(folder, "generation_config.json", eos_token_id=[7, 2])
    edit(folder, "tokenizer_config.json", eos_token={"content": "z"})
    tokenizer = open_quietly(folder).tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.eos_ids == (2, 5, 7, WORDS.index("z"))


def test_end_tokens_of_generation_config_alone(folder):
    edit(folder, "config.json", eos_token_id=None)
    edit(folder, "generation_config.json", eos_token_id=[9, 8])
    tokenizer = open_quietly(folder).tokenizer
    assert (tokenizer.eos_id, tokenizer.eos_ids) == (9, (9, 8))


def test_end_tokens_survive_saving(folder, tmp_path):
    path = folder / "tokenizer.json"
    several = HuggingFaceTokenizer(path, bos_id=1, eos_id=2, eos_ids=(2, 5))
    several.save(tmp_path / "several")
    again = load_tokenizer(tmp_path / "several")
    assert again.eos_ids == (2, 5)
    assert again.fingerprint() == several.fingerprint()
    one = HuggingFaceTokenizer(path, bos_id=1, eos_id=2)
    one.save(tmp_path / "one")
    assert "eos_ids" not in (tmp_path / "one" / "tokenizer_config.json").read_text()
    assert load_tokenizer(tmp_path / "one").eos_ids == (2,)
    same = HuggingFaceTokenizer(path, bos_id=1, eos_id=2, eos_ids=(2,))
    assert one.fingerprint() == same.fingerprint() != several.fingerprint()


@pytest.mark.parametrize("wrong", ["</s>", [2, "x"], True, -1, [99]])
def test_invalid_end_tokens_are_refused(wrong, folder):
    edit(folder, "config.json", eos_token_id=wrong)
    with pytest.raises(UserError, match=r"no token id|outside the vocabulary"):
        open_quietly(folder)


def only_five(folder):
    """Sets weights of a model that always predicts token 5."""
    tensors = load_file(folder / SINGLE)
    zeros = {name: 0 * t for name, t in tensors.items() if "o_proj" in name or "down_proj" in name}
    head = np.concatenate((0 * tensors[HEAD][:5], 1 + 0 * tensors[HEAD][:1], 0 * tensors[HEAD][6:]))
    ends = {EMBEDDING: np.abs(tensors[EMBEDDING]), "model.norm.weight": np.ones(8, np.float32)}
    save_file({**tensors, **zeros, **ends, HEAD: head}, folder / SINGLE, metadata={"format": "pt"})


def test_every_end_token_stops_generation(folder, tmp_path, without_transformers, capsys):
    only_five(folder)
    edit(folder, "config.json", eos_token_id=[2, 5])
    run, out = tmp_path / "run", tmp_path / "out"
    assert main.main(["import", str(folder), f"--workdir={run}"]) == 0
    opened = load_model(run)
    session, _ = opened.engine.read(opened.engine.start(), np.array([1, 4]))
    request = Request(session, Sampling(temperature=0), max_tokens=8)
    (generated,) = Generator(opened.engine, opened.tokenizer, [request])
    assert (generated.token, generated.finish_reason, generated.text) == (5, "eos", "")

    assert main.main(["export", str(run), f"--to={out}", "--own-code"]) == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == [2, 5]
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert open_quietly(out).tokenizer.fingerprint() == opened.tokenizer_fingerprint
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.generate(torch.tensor([[1, 4]]), max_new_tokens=8).tolist() == [[1, 4, 5]]


# --- heads ----------------------------------------------------------------------------------------


def test_a_head_that_differs_is_imported_untied(folder, tmp_path, capsys):
    edit(folder, "config.json", tie_word_embeddings=True)
    assert main.main(["import", str(folder), f"--workdir={tmp_path / 'run'}"]) == 0
    assert "imported untied" in capsys.readouterr().out
    assert not read_config(tmp_path / "run").model.tie_embeddings
    run = open_run(RunSpec(tmp_path / "run"))
    model = build_model(run.config.model, run.config.inner)
    params = run.weights(weights_template(model, make_mesh()))
    np.testing.assert_array_equal(params.slow["head"], load_file(folder / SINGLE)[HEAD].T)


def test_a_head_that_is_the_embedding_stays_tied(folder):
    edit(folder, "config.json", tie_word_embeddings=True)
    change(folder, lm_head__weight=load_file(folder / SINGLE)[EMBEDDING])
    assert open_quietly(folder).config.model.tie_embeddings


def test_an_override_cannot_drop_a_head(folder):
    with pytest.raises(UserError, match=r"head .* is not its embedding"):
        open_quietly(folder, "--config.model.tie_embeddings=true")


# --- stored dtypes -------------------------------------------------------------------------------


KINDS = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6}
KINDS |= {"I8": 8, "U8": 8, "I32": 32, "I64": 64, "BOOL": 8, "C64": 64}


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_no_floats_are_refused(kind, folder, capsys):
    recast(folder, "model.layers.0.mlp.up_proj.weight", kind, KINDS[kind])
    assert main.main(["import", str(folder), f"--workdir={folder.parent / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert f"up_proj.weight in {folder} is stored as {kind}" in error
    assert error.count("\n") == 1
    assert not (folder.parent / "run").exists()


def test_a_quantization_configuration_is_refused(folder):
    edit(folder, "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="quantized weights"):
        open_quietly(folder)


# --- every tensor is used -------------------------------------------------------------------------


def split(folder, **overrides):
    """Splits the weights into two shards; returns an index with `overrides` in it."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = {name: f"{int(name.startswith('lm_head'))}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    return {"weight_map": {**files, **overrides}}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda index: index["weight_map"].pop("model.norm.weight"), "which .* does not place"),
        (lambda index: index["weight_map"].update({"x": "0.safetensors"}), "names x, which no"),
        (lambda index: index["weight_map"].update({HEAD: "../a"}), "not a file of its folder"),
        (lambda index: index.update(weight_map=["a"]), "cannot be read"),
        (lambda index: index["weight_map"].update({HEAD: 5}), "cannot be read"),
    ],
)
def test_an_index_must_fit_its_files(damage, sentence, folder):
    index = split(folder)
    damage(index)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=sentence):
        open_quietly(folder)


def test_shards_with_a_valid_index_are_opened(folder):
    (folder / INDEX).write_text(json.dumps(split(folder)))
    assert open_quietly(folder).config.model.num_layers == 1


def test_unexpected_tensors_are_refused(folder):
    change(folder, model__layers__0__self_attn__q_proj__bias=np.zeros(8, np.float32))
    with pytest.raises(UserError, match=r"unexpected .*q_proj.bias"):
        open_quietly(folder)


def test_an_adapter_beside_the_weights_is_refused(folder):
    edit(folder, "adapter_config.json", peft_type="LORA")
    with pytest.raises(UserError, match="adapter"):
        open_quietly(folder)
