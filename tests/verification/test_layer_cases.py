"""`tttjax verify` of the recurrent layers, against plain numpy loops.

Every parameter layout once, at awkward sizes: chunks that do not divide the sequence, several heads
per group, other convolution widths. Then: wrong or unknown parts of a case.
"""

import json
import shutil

import helpers.layer_loops as loops
import numpy as np
import pytest

from tttjax.cli.main import main
from tttjax.verification.verify import verify

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

TOKENS = 7
VOCAB = 5
MAMBA = {
    "hidden_size": 6,
    "num_heads": 4,
    "head_dim": 3,
    "state_size": 2,
    "n_groups": 2,
    "conv_kernel": 3,
    "eps": 1e-5,
    "chunk_size": 3,
    "time_step_limit": [0.4, 1.5],
}
DELTA = {
    "hidden_size": 6,
    "num_k_heads": 2,
    "num_v_heads": 4,
    "head_k_dim": 3,
    "head_v_dim": 2,
    "conv_kernel": 2,
    "eps": 1e-4,
    "chunk_size": 4,
}
TTT = {
    "hidden_size": 8,
    "num_heads": 2,
    "head_dim": 4,
    "mini_batch_size": 3,
    "ttt_base_lr": 0.7,
    "rope_theta": 100.0,
    "conv_width": 3,
}
MAMBA_SHAPES = {
    "in_proj.weight": (36, 6),
    "conv1d.weight": (20, 1, 3),
    "conv1d.bias": (20,),
    "dt_bias": (4,),
    "A_log": (4,),
    "D": (4,),
    "norm.weight": (12,),
    "out_proj.weight": (6, 12),
}
DELTA_CONV = {"conv1d.weight": (20, 1, 2), "A_log": (4,), "dt_bias": (4,)}
FUSED_SHAPES = DELTA_CONV | {
    "in_proj_qkvz.weight": (28, 6),
    "in_proj_ba.weight": (8, 6),
    "norm.weight": (2,),
    "out_proj.weight": (6, 8),
}
SEPARATE_SHAPES = DELTA_CONV | {
    **{f"{n}_proj.weight": (6, 6) for n in "qk"},
    **{f"{n}_proj.weight": (8, 6) for n in "vg"},
    **{f"{n}_proj.weight": (4, 6) for n in "ba"},
    "o_norm.weight": (2,),
    "o_proj.weight": (6, 8),
}
TTT_SHAPES = {
    **{f"w{n}.kernel": (8, 8) for n in "qvo"},
    "learnable_ttt_lr.kernel": (2, 8, 1),
    "learnable_ttt_lr.bias": (2, 1),
    "learnable_token_idx": (3,),
    "ttt_norm.scale": (2, 4),
    "ttt_norm.bias": (2, 4),
    "post_norm.scale": (8,),
    "post_norm.bias": (8,),
}
GATED_SHAPES = TTT_SHAPES | {
    "wg.kernel": (8, 8),
    **{f"conv_{n}.kernel": (3, 1, 8) for n in "qk"},
    **{f"conv_{n}.bias": (8,) for n in "qk"},
    "ttt_dense_0": (2, 4, 4),
    "ttt_bias_0": (2, 1, 4),
}
PLAIN_MLP_SHAPES = TTT_SHAPES | {
    "wk.kernel": (8, 8),
    "ttt_dense_0": (2, 4, 16),
    "ttt_bias_0": (2, 1, 16),
    "ttt_dense_1": (2, 16, 4),
    "ttt_bias_1": (2, 1, 4),
}
LM = {"num_layers": 2, "vocab_size": VOCAB}
MLP = {"intermediate_size": 4}
# name: layer, config, loop, shapes of its parameters, and whether gradients are stored.
MIXERS = {
    "mamba2": ("mamba2", MAMBA, loops.mamba2, MAMBA_SHAPES, True),
    "fused": ("gdn_qwen3next", DELTA, loops.delta_fused, FUSED_SHAPES, True),
    "separate": (
        *("gdn_separate", DELTA | {"allow_neg_eigval": True}),
        *(loops.delta_separate, SEPARATE_SHAPES, False),
    ),
    "ttt_linear": ("ttt_linear", TTT, loops.ttt, GATED_SHAPES, True),
    "ttt_mlp_base": ("ttt_mlp_base", TTT, loops.ttt, PLAIN_MLP_SHAPES, False),
}


def language_models():
    """name: layer, config, loop, shapes of its parameters."""

    def blocks(prefix, mixer, mixer_shapes, other_shapes):
        return {
            prefix.format(i) + name: shape
            for i in range(LM["num_layers"])
            for name, shape in (
                {mixer + n: s for n, s in mixer_shapes.items()} | other_shapes
            ).items()
        }

    delta_shapes = {
        "input_layernorm.weight": (6,),
        "post_attention_layernorm.weight": (6,),
        **{f"mlp.{n}_proj.weight": (4, 6) for n in ("gate", "up")},
        "mlp.down_proj.weight": (6, 4),
    }
    delta = blocks("model.layers.{}.", "linear_attn.", FUSED_SHAPES, delta_shapes)
    ttt_shapes = {
        "conv.conv_norm.kernel": (8,),
        "conv.conv1.kernel": (3, 1, 8),
        "conv.conv1.bias": (8,),
        "seq_norm.kernel": (8,),
        "ffn_norm.kernel": (8,),
        **{f"feed_forward.w{n}.kernel": (8, 4) for n in (1, 3)},
        "feed_forward.w2.kernel": (4, 8),
    }
    ttt = blocks("model.h.{}.", "seq_modeling_block.", GATED_SHAPES, ttt_shapes)
    mamba = blocks("backbone.layers.{}.", "mixer.", MAMBA_SHAPES, {"norm.weight": (6,)})
    head = {"lm_head.weight": (VOCAB, 6)}
    return {
        "lm_mamba2": (
            *("lm:mamba2", MAMBA | LM, loops.lm_mamba2),
            {"backbone.embeddings.weight": (VOCAB, 6), "backbone.norm_f.weight": (6,)}
            | mamba
            | head,
        ),
        "lm_fused": (
            *("lm:gdn_qwen3next", DELTA | LM | MLP, loops.lm_delta_fused),
            {"model.embed_tokens.weight": (VOCAB, 6), "model.norm.weight": (6,)} | delta | head,
        ),
        "lm_ttt": (
            "lm:ttt_linear",
            TTT | LM | MLP | {"pre_conv": True, "tie": True, "rms_norm_eps": 1e-3},
            loops.lm_ttt,
            {"model.wte.embedding": (VOCAB, 8), "model.ln_f.kernel": (8,)} | ttt,
        ),
    }


def draw(shapes, rng):
    """Random weights that give outputs of order 1."""
    return {f"param.{n}": rng.normal(size=s) / np.sqrt(s[-1]) for n, s in shapes.items()}


def on_parameters(loop, config, name):
    """The loop as a function of a case's arrays, `in.<name>` its input."""
    return lambda a: loop(config, loops.select_prefix(a, "param."), a[f"in.{name}"])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with all cases."""
    root = tmp_path_factory.mktemp("layers")
    rng = np.random.default_rng(3)
    for name, (layer, config, loop, shapes, with_gradients) in MIXERS.items():
        x = rng.normal(size=(2, TOKENS, config["hidden_size"]))
        positions = np.tile(np.arange(TOKENS, dtype=np.int32), (2, 1))
        loops.write_case(
            *(root, name, layer, config, on_parameters(loop, config, "x")),
            {"in.x": x, "in.position_ids": positions, **draw(shapes, rng)},
            {"cot.R": "out.y"} if with_gradients else {},
            ("in.x", "param.") if with_gradients else (),
        )
    for name, (layer, config, loop, shapes) in language_models().items():
        tokens = rng.integers(VOCAB, size=(2, TOKENS), dtype=np.int32)
        loops.write_case(
            *(root, name, layer, config, on_parameters(loop, config, "input_ids")),
            {"in.input_ids": tokens, **draw(shapes, rng)},
        )
    write_operators(root, rng)
    return root


def write_operators(root, rng):
    head = (2, TOKENS, 4)
    ssd = {
        "in.x": rng.normal(size=(*head, 3)),
        "in.dt": rng.uniform(0.1, 1, size=head),
        "in.A": -rng.uniform(0.5, 2, size=4),
        "in.B": rng.normal(size=(2, TOKENS, 2, 2)),
        "in.C": rng.normal(size=(2, TOKENS, 2, 2)),
        "in.D": rng.normal(size=4),
        "in.initial_state": rng.normal(size=(2, 4, 3, 2)),
    }
    delta = {
        "in.q": rng.normal(size=(2, TOKENS, 2, 3)),
        "in.k": rng.normal(size=(2, TOKENS, 2, 3)),
        "in.v": rng.normal(size=(*head, 2)),
        "in.g": -rng.uniform(0, 1, size=head),
        "in.beta": rng.uniform(0, 1, size=head),
        "in.initial_state": rng.normal(size=(2, 4, 3, 2)),
    }
    for name, layer, config, loop, arrays, output in (
        ("ssd", "mamba2_ssd_op", MAMBA, loops.ssd_op, ssd, "out.y"),
        ("delta", "gdn_op", DELTA | {"l2norm_in_op": True}, loops.delta_op, delta, "out.o"),
    ):
        used = ("num_heads", "head_dim", "state_size", "n_groups", "chunk_size", "l2norm_in_op")
        used += ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")
        settings = {k: v for k, v in config.items() if k in used}
        loops.write_case(
            *(root, name, layer, settings, lambda a, loop=loop: loop({}, a), arrays),
            {"cot.R": output, "cot.R_state": "out.final_state"},
            ("in.",),
        )


CASES = (*MIXERS, *language_models(), "ssd", "delta")


@pytest.mark.parametrize("name", CASES)
def test_every_form_of_every_layer(folder, name):
    rows = verify(folder / f"{name}.json")
    assert [row for row in rows if not row.ok or row.note.startswith("not")] == []
    forms = {row.case.partition("/")[2] for row in rows} - {""}
    assert len(forms) >= 2
    assert "recurrent" in forms
    content = json.loads((folder / f"{name}.json").read_text())
    gradients = [row for row in rows if row.quantity.startswith("grad")]
    assert bool(gradients) == any(n.startswith("grad") for n in content["arrays"])


@pytest.mark.parametrize("name", ["ssd", "fused", "ttt_linear"])
def test_float64_agrees_to_rounding(folder, name):
    rows = verify(folder / f"{name}.json", x64=True)
    assert [row for row in rows if not row.ok] == []
    assert all(row.tolerance < 1e-5 for row in rows)


# --- wrong and unknown parts ----------------------------------------------------------------------


@pytest.fixture
def changed(folder, tmp_path):
    """changed(name, change_json, change_arrays) -> the failing rows, and all rows."""

    def check(name, change_json=None, change_arrays=None):
        content = json.loads((folder / f"{name}.json").read_text())
        with np.load(folder / f"{name}.npz") as stored:
            arrays = dict(stored)
        if change_json:
            change_json(content)
        if change_arrays:
            change_arrays(arrays)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        np.savez(tmp_path / f"{name}.npz", **arrays)
        rows = verify(tmp_path)
        return [row for row in rows if not row.ok], rows

    return check


def shift(name, by):
    def change(arrays):
        arrays[name].flat[1] += by * np.abs(arrays[name]).max()

    return change


@pytest.mark.parametrize(
    ("name", "array", "by", "quantity"),
    [
        ("ssd", "out.y", 2e-5, "out.y"),
        ("ssd", "out.final_state", 2e-5, "out.final_state"),
        ("ssd", "grad_in.B", 1e-4, "grad_in.*, worst array"),
        ("delta", "out.o", np.nan, "out.o"),
    ],
)
def test_one_wrong_number_fails_its_quantity_alone(changed, name, array, by, quantity):
    failures, _ = changed(name, change_arrays=shift(array, by))
    assert {row.quantity for row in failures} == {quantity}
    if quantity.startswith("grad"):
        assert failures[0].note == array
    else:
        assert {row.case for row in failures} == {f"{name}/chunked", f"{name}/recurrent"}


def test_another_setting_fails(changed):
    failures, _ = changed("delta", lambda c: c["config"].update(l2norm_in_op=False))
    assert {row.quantity for row in failures} >= {"out.o", "out.final_state"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(layer="retention"), "unsupported layer 'retention'; one of"),
        (lambda c: c.pop("layer"), "the JSON has no field 'layer'"),
        (lambda c: c.pop("config"), "the JSON has no field 'config'"),
        (lambda c: c.update(config=[]), "config is [], not an object of settings"),
        (lambda c: c["config"].pop("state_size"), "the config has no field 'state_size'"),
        (lambda c: c["config"].update(state_size=2.5), "state_size = 2.5 is no positive whole"),
        (lambda c: c["config"].update(state_size=3), "in.B has shape (2, 7, 2, 2)"),
        (lambda c: c["config"].update(n_groups=3), "n_groups = 3 does not divide num_heads 4"),
        (lambda c: c["arrays"].update({"out.z": [1]}), "no array out.z, which its JSON lists"),
        (lambda c: c["arrays"].update({"out.y": [1]}), "its JSON says [1]"),
        (lambda c: c["arrays"].update({"out.y": 5}), "its JSON says 5"),
        (lambda c: c.update(float64_restatement={"out.y": 3}), "out.y is 3, without max_abs_diff"),
        (lambda c: c.update(arrays=["out.y"]), "'arrays' is ['out.y'], not an object by array"),
    ],
)
def test_invalid_cases_are_one_failing_row(changed, change, message):
    failures, _ = changed("ssd", change)
    assert len(failures) == 1
    assert message in failures[0].note


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ssd", lambda a: a.pop("in.dt"), "the case has no array in.dt"),
        ("ssd", lambda a: [a.pop(n) for n in ("cot.R", "cot.R_state")], "gradients, but no cot.R"),
        ("ssd", lambda a: a.update({"cot.R": a["cot.R"][:, 1:]}), "cot.R has shape"),
        ("mamba2", lambda a: a.pop("param.D"), "the case has no array param.D"),
        ("mamba2", lambda a: a.update({"param.E": np.ones(3)}), "has no parameter param.E"),
        ("ttt_linear", lambda a: a["in.position_ids"].__iadd__(1), "position_ids are not 0, 1"),
    ],
)
def test_invalid_arrays_are_one_failing_row(changed, name, change, message):
    failures, rows = changed(name, lambda c: c.pop("arrays"), change)
    assert len(failures) == len(rows) == 1
    assert message in failures[0].note


def test_unknown_settings_and_arrays_are_named(changed):
    def change(arrays):
        arrays["mid.h"] = np.zeros(3)
        arrays["in.mask"] = np.zeros(3)

    failures, rows = changed("ssd", lambda c: c["config"].update(shiny=3, seq_len=7), change)
    assert not failures
    notes = [row.note for row in rows if row.deviation is None]
    assert notes == ["not known, ignored: config.shiny = 3", "not compared: mid.h, in.mask"]


def test_optional_arrays_can_be_omitted(changed):
    def change(arrays):
        for name in list(arrays):
            if name.startswith(("cot.", "grad_in.")) or name == "in.initial_state":
                del arrays[name]

    failures, rows = changed("ssd", lambda c: c.pop("arrays"), change)
    assert {row.quantity for row in rows} == {"out.y", "out.final_state"}
    assert len(failures) == len(
        rows
    )  # without the stored initial state, sequences start from zeros


def test_a_damaged_file_is_one_sentence(folder, tmp_path, capsys):
    shutil.copy(folder / "ssd.json", tmp_path)
    content = (folder / "ssd.npz").read_bytes()
    (tmp_path / "ssd.npz").write_bytes(content[: len(content) // 2])
    assert main(["verify", str(tmp_path)]) == 1
    assert "ssd.npz is damaged" in capsys.readouterr().out
    (tmp_path / "ssd.npz").unlink()
    assert "ssd.npz is missing" in verify(tmp_path)[0].note
