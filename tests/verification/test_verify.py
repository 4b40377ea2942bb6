"""`tttjax verify` names every wrong number and everything that it cannot check."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tttjax.cli.main import main
from tttjax.errors import UserError
from tttjax.ttt import update_rules
from tttjax.verification import rows
from tttjax.verification.verify import find_cases, format_table, verify

pytestmark = pytest.mark.slow


def failed(results):
    return {row.quantity for row in results if not row.ok}


def test_a_correct_case_passes(write_case, tmp_path, capsys):
    folder = write_case(everything=True)
    report = tmp_path / "report.txt"
    assert main(["verify", str(folder), "--json", str(report)]) == 0
    shown = capsys.readouterr().out
    assert "computed in float32 on cpu" in shown
    assert "grads, worst array" in shown
    assert "final_params, change" in shown
    assert "quantities are within tolerance" in shown
    content = json.loads(report.read_text())
    assert {row["ok"] for row in content["rows"]} == {True}
    assert content["precision"] == "float32"


def scale_one(name, factor=1.01):
    def change(arrays):
        arrays[name].flat[0] *= factor

    return change


@pytest.mark.parametrize(
    ("name", "quantities"),
    [
        ("loss", {"loss"}),
        ("token_nll", {"token_nll"}),
        ("chunk_loss", {"chunk_loss"}),
        ("inner_grad_norm", {"inner_grad_norm"}),
    ],
)
def test_one_wrong_number_fails_its_quantity_alone(write_case, name, quantities):
    assert failed(verify(write_case(change_arrays=scale_one(name)))) == quantities


def test_wrong_gradients_and_final_weights_fail(write_case, capsys):
    def change(arrays):
        arrays["grads/language_model.model.ln_f.weight"] *= 1.001
        arrays["final_params/language_model.model.ln_f.weight"] += 1e-4

    folder = write_case(change_arrays=change, everything=True)
    assert main(["verify", str(folder)]) == 1
    shown = capsys.readouterr().out
    worst = next(line for line in shown.splitlines() if "grads, worst array" in line)
    assert "FAIL" in worst
    assert worst.endswith("language_model.model.ln_f.weight")
    assert "checks failed" in shown


@pytest.mark.parametrize(
    "change",
    [
        lambda case: case["model"].update(sliding_window_size=5),
        lambda case: case["model"].update(rope_theta=101.0),
        lambda case: case.update(step_index=2),
        lambda case: case["inner_optimizer"].update(clip_gradient=0.4),
    ],
    ids=["window", "theta", "inner warm-up", "clip"],
)
def test_another_setting_fails(write_case, change):
    assert "token_nll" in failed(verify(write_case(change_json=change)))


def test_a_bug_in_the_code_fails(write_case, monkeypatch):
    """Clips every array separately instead of by the global norm."""

    def clip_each(max_norm):
        def update(g, state, params=None):
            return {k: _clip_leaves(v, max_norm) for k, v in g.items()}, state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    def _clip_leaves(tree, max_norm):
        if isinstance(tree, dict):
            return {k: _clip_leaves(v, max_norm) for k, v in tree.items()}
        return tree * jnp.minimum(1.0, max_norm / jnp.linalg.norm(tree))

    monkeypatch.setattr(update_rules, "clip_by_global_norm", clip_each)
    assert "token_nll" in failed(verify(write_case()))


def test_nan_is_never_within_tolerance(write_case):
    assert failed(verify(write_case(change_arrays=scale_one("loss", np.nan)))) == {"loss"}


def test_another_shape_is_a_failure_with_a_reason(write_case):
    def change(arrays):
        arrays["chunk_loss"] = arrays["chunk_loss"][:, :1]

    (row,) = [row for row in verify(write_case(change_arrays=change)) if not row.ok]
    assert (row.quantity, row.deviation) == ("chunk_loss", float("inf"))
    assert row.note == "shape (2, 2) was computed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(attn_pdrop=0.1), "model.attn_pdrop = 0.1, not 0"),
        (lambda c: c["model"].update(seq_modeling_block="ssm"), "'ssm' is none of SWA"),
        (lambda c: c["model"].update(state_dtype="int8"), "model.state_dtype = 'int8'"),
        (lambda c: c["inner_optimizer"].update(type="lion"), "inner_optimizer.type = 'lion'"),
        (lambda c: c["training"].update(spec_inner=["**.nothing"]), "matches no weight"),
        (lambda c: c["training"].update(spec_inner=["**"]), "embedding an inner weight"),
        (lambda c: c["model"].pop("rope_theta"), "no field 'rope_theta'"),
        (lambda c: c["model"].update(num_hidden_layers=3), "has shape"),
    ],
)
def test_unsupported_settings_are_one_failing_row(write_case, change, message):
    (row,) = [row for row in verify(write_case(change_json=change)) if not row.ok]
    assert message in row.note


def test_an_unsupported_outer_optimizer_fails_only_its_steps(write_case):
    def change(case):
        case["outer_optimizer"]["bf16_momentum"] = True

    results = verify(write_case(change_json=change, everything=True))
    (row,) = [row for row in results if not row.ok]
    assert "unsupported setting: outer_optimizer.bf16_momentum = True" in row.note
    assert {"loss", "grads, tree"} <= {row.quantity for row in results if row.ok}


def test_unknown_fields_and_arrays_are_named(write_case):
    def change_arrays(arrays):
        arrays["entropy"] = np.zeros(3)

    results = verify(write_case(lambda case: case["model"].update(shiny=3), change_arrays))
    notes = [row.note for row in results if row.note]
    assert notes == ["not known, ignored: model.shiny = 3", "not compared: entropy"]
    assert not failed(results)


def test_damaged_or_missing_numbers_are_one_sentence(write_case, capsys):
    folder = write_case()
    content_bytes = (folder / "tiny.npz").read_bytes()
    (folder / "tiny.npz").write_bytes(content_bytes[: len(content_bytes) // 2])
    (row,) = verify(folder)
    assert not row.ok
    assert "tiny.npz is damaged" in row.note
    (folder / "tiny.npz").unlink()
    assert main(["verify", str(folder)]) == 1
    assert "tiny.npz is missing" in capsys.readouterr().out


def test_a_damaged_json_is_a_failure(write_case):
    folder = write_case()
    (folder / "more.json").write_text('{"model": ')
    assert "file" in failed(verify(folder))


def test_other_json_files_are_listed(write_case, capsys):
    folder = write_case()
    (folder / "notes.json").write_text("{}")
    assert main(["verify", str(folder)]) == 0
    assert "not recognised: notes" in capsys.readouterr().out


def test_a_folder_without_cases_is_an_error(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "notes.json").write_text("{}")
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no reference case: none of its 1 JSON files" in capsys.readouterr().err


def test_array_stores_are_not_searched(tmp_path):
    store = tmp_path / "tokens"
    store.mkdir()
    (store / "zarr.json").write_text("{}")
    with pytest.raises(UserError, match="none of its 0 JSON files"):
        find_cases(tmp_path)


def test_tolerances_are_tighter_in_float64():
    for quantity, limits in rows.TOLERANCES.items():
        assert limits.float64_to_32 <= limits.float32 <= limits.bfloat16, quantity
        assert (limits.float64 or 0) <= limits.float64_to_32, quantity
    assert rows.tolerance_of("loss", "float64", True) < rows.tolerance_of("loss", "float64", False)


def test_the_table_is_aligned():
    table = format_table(
        [
            rows.VerifyRow("a", "loss", 1e-7, 1e-5, True),
            rows.VerifyRow("b", "x", None, None, False, "why"),
        ]
    )
    assert table[1].index("ok") == table[2].index("FAIL")
    assert table[2].endswith("why")
