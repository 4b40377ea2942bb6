"""All reference cases of public code; skipped without their folders.

TTTJAX_GOLDEN is the folder of the official code's cases; the default is beside the project. The
recurrent layers' cases are beside it in `layers`.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.exhaustive import only

from tttjax.cli import main
from tttjax.errors import UserError
from tttjax.interop.official.checkpoint import load_official_checkpoint
from tttjax.interop.official.names import to_official
from tttjax.models.transformer import build_model
from tttjax.parallel.mesh import make_mesh
from tttjax.runs.run import RunSpec, open_run
from tttjax.training.step import weights_template
from tttjax.verification import golden
from tttjax.verification.verify import verify

FOLDER = Path(
    os.environ.get("TTTJAX_GOLDEN", Path(__file__).parents[3] / "shared" / "golden" / "e2e")
)
LAYERS = FOLDER.parent / "layers"
pytestmark = [
    pytest.mark.skipif(
        not FOLDER.is_dir(), reason=f"no reference numbers at {FOLDER} (set TTTJAX_GOLDEN)"
    ),
    pytest.mark.slow,
]


def failures(rows):
    return [row for row in rows if not row.ok]


CASES = sorted(path.stem for path in FOLDER.glob("*.json")) if FOLDER.is_dir() else []


@pytest.mark.parametrize("case", only(["01_e2e_basic"], CASES))
def test_every_case_in_float32(case):
    rows = verify(FOLDER / f"{case}.json")
    assert not failures(rows)
    assert sum(row.deviation is not None for row in rows) >= 10


@pytest.mark.exhaustive
def test_the_reference_form_in_float32(monkeypatch):
    """`verify` uses the fast form, which `ttt/test_meta_gradient.py` holds against this one."""

    def in_the_reference_form(inner):
        made.append(make_inner_loop(inner)._replace(form="reference"))
        return made[-1]

    make_inner_loop, made = golden.make_inner_loop, []
    monkeypatch.setattr(golden, "make_inner_loop", in_the_reference_form)
    assert not failures(verify(FOLDER / "02_e2e_suffix2.json"))
    assert made


LAYER_CASES = sorted(path.stem for path in LAYERS.glob("*.json"))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "case", ["mamba2_groups2", "gdn_qwen3next_gva", "lm_ttt_linear", "ttt_linear_init", "ttt_mlp"]
)
def test_cases_of_layers_in_float32(case):
    rows = verify(LAYERS / f"{case}.json")
    assert not failures(rows)
    assert sum(row.deviation is not None for row in rows) >= 2


@pytest.mark.parametrize("case", only(LAYER_CASES[::4], LAYER_CASES))
def test_every_layer_in_float64_agrees_to_rounding(case):
    rows = verify(LAYERS / f"{case}.json", x64=True)
    assert not failures(rows)
    assert sum(row.deviation is not None for row in rows) >= 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["03_e2e_noclip", "05_swa_pretrain"])
def test_losses_in_float64_agree_to_rounding(case):
    rows = verify(FOLDER / f"{case}.json", x64=True)
    assert not failures(rows)
    losses = [row for row in rows if row.quantity == "loss" and row.case == case]
    assert losses[0].tolerance == 1e-10


def test_the_zarr_batches():
    rows = verify(FOLDER / "zarr")
    assert not failures(rows)
    assert {row.deviation for row in rows} == {0.0}


def test_the_checkpoints_bit_for_bit(monkeypatch):
    monkeypatch.chdir(FOLDER.parent)  # a relative path
    rows = verify(Path(FOLDER.name) / "checkpoint" / "checkpoint.json")
    assert not failures(rows)
    assert [row.quantity for row in rows].count("model_weights") == 2
    assert "loss" in {row.quantity for row in rows}


def test_official_checkpoint_by_parent_folder_and_step(tmp_path):
    root = FOLDER / "checkpoint" / "01_e2e_basic_full"
    by_parent, by_step = (load_official_checkpoint(p) for p in (root, root / "4"))
    assert by_parent.step == by_step.step == 4
    assert by_parent.data_iterator == {"next_index": 5}
    for name, array in by_parent.model_weights.items():
        np.testing.assert_array_equal(array, by_step.model_weights[name])
    arrays = golden.load_arrays(FOLDER / "01_e2e_basic.npz")
    assert set(by_parent.model_weights) == set(golden.select_prefix(arrays, "final_params/"))
    with pytest.raises(UserError, match="is no official checkpoint"):
        load_official_checkpoint(tmp_path)
    damaged = tmp_path / "damaged"
    shutil.copytree(root / "4" / "model_weights", damaged / "model_weights")
    for path in [damaged, *damaged.rglob("*")]:
        path.chmod(0o755)
    (damaged / "model_weights" / "manifest.ocdbt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        load_official_checkpoint(damaged)


@pytest.mark.exhaustive
def test_an_official_checkpoint_as_a_run(tmp_path):
    source = FOLDER / "checkpoint" / "01_e2e_basic_params"
    words = ["import", str(source), f"--workdir={tmp_path / 'run'}"]
    assert main.main([*words, "--config.model.compute_dtype=float32"]) == 0
    run = open_run(RunSpec(tmp_path / "run"))
    model = build_model(run.config.model, run.config.inner)
    named = to_official(run.weights(weights_template(model, make_mesh())), model)
    expected = golden.select_prefix(golden.load_arrays(FOLDER / "01_e2e_basic.npz"), "params/")
    assert named.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(named[name], array)
