"""What is written beside a run's results, and who may continue it."""

import dataclasses
import json

import pytest

from tttjax.config import (
    Config,
    check_same_run,
    config_fingerprint,
    read_config,
    write_run_info,
)
from tttjax.config.run_info import CONFIG, ENVIRONMENT, describe_environment
from tttjax.errors import UserError


def changed(section: str, **values) -> Config:
    config = Config()
    part = dataclasses.replace(getattr(config, section), **values)
    return dataclasses.replace(config, **{section: part})


def test_a_run_writes_configuration_versions_and_revision(tmp_path):
    write_run_info(tmp_path / "run", Config())
    assert read_config(tmp_path / "run") == Config()
    (start,) = json.loads((tmp_path / "run" / ENVIRONMENT).read_text())
    assert start["environment"]["packages"]["tttjax"]
    assert start["environment"]["packages"]["jax"]
    assert set(start["environment"]) == {"python", "platform", "packages", "git"}
    assert [p.name for p in (tmp_path / "run").iterdir() if "tmp" in p.name] == []


def test_devices_are_described_on_request():
    assert describe_environment(with_devices=True)["backend"] == "cpu"


def test_every_start_is_kept(tmp_path):
    write_run_info(tmp_path, Config())
    write_run_info(tmp_path, changed("train", log_every=3))
    starts = json.loads((tmp_path / ENVIRONMENT).read_text())
    assert [start["config"]["train"]["log_every"] for start in starts] == [10, 3]
    assert read_config(tmp_path).train.log_every == 3


def test_no_secret_of_the_environment_is_written(tmp_path, monkeypatch):
    secret = "4f1c9e-not-to-be-seen"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD", "GIT_ASKPASS"):
        monkeypatch.setenv(name, secret)
    write_run_info(tmp_path, Config())
    for file in tmp_path.iterdir():
        assert secret not in file.read_text()


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"embed_dim": 512}),
        ("inner", {"lr": 0.5}),
        ("optim", {"peak_lr": 1e-3}),
        ("train", {"steps": 5}),
        ("train", {"batch_size": 16}),
        ("data", {"seed": 1}),
    ],
)
def test_another_computation_is_refused(tmp_path, section, values):
    write_run_info(tmp_path, Config())
    other = changed(section, **values)
    assert config_fingerprint(other) != config_fingerprint(Config())
    name = f"{section}.{next(iter(values))}"
    with pytest.raises(UserError, match=f"belongs to another configuration .*{name} was"):
        write_run_info(tmp_path, other)
    assert read_config(tmp_path) == Config()


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("train", {"log_every": 1, "checkpoint_every": 5, "keep_checkpoints": 1}),
        ("train", {"checkpoint_minutes": 1.0, "keep_every": 10}),
        ("train", {"profile_steps": (1, 2), "wandb_project": "p", "max_skipped_steps": 1}),
        ("train", {"max_failed_starts": 1}),
        ("mesh", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("eval", {"bins": 8}),
        ("model", {"remat": "none"}),
    ],
)
def test_what_leaves_the_numbers_alone_may_change(tmp_path, section, values):
    write_run_info(tmp_path, Config())
    other = changed(section, **values)
    assert config_fingerprint(other) == config_fingerprint(Config())
    check_same_run(tmp_path, other)


def test_later_fields_leave_older_fingerprints_unchanged():
    assert config_fingerprint(Config()) == "d68dae5c93e1ce7e"  # from before there were any
    grouped = changed("model", num_kv_heads=2)
    assert config_fingerprint(grouped) != config_fingerprint(Config())


def test_a_fixed_schedule_may_run_for_longer(tmp_path):
    fixed = changed("optim", decay_steps=1000)
    write_run_info(tmp_path, fixed)
    longer = dataclasses.replace(fixed, train=dataclasses.replace(fixed.train, steps=2000))
    check_same_run(tmp_path, longer)


def test_a_damaged_file_is_reported(tmp_path):
    (tmp_path / CONFIG).write_text('{"model": ')
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        check_same_run(tmp_path, Config())
