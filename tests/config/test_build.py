"""Types, limits, unknown names; what comes out is frozen and goes back to plain values."""

import dataclasses
import json

import pytest

from tttjax.config import Config, default_config, from_config_dict, to_dict, to_flat_dict
from tttjax.config.values import parse_value
from tttjax.errors import UserError


def configured(name: str, value):
    section, _, key = name.partition(".")
    return from_config_dict({section: {key: value}})


def test_the_defaults_are_those_of_the_dataclasses():
    assert from_config_dict(default_config()) == Config()


def test_a_config_survives_json():
    config = configured("eval.context_lengths", (256, 512))
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert to_flat_dict(config)["eval.context_lengths"] == [256, 512]


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().train.steps = 3  # type: ignore[misc]


def test_integers_are_numbers_and_lists_are_tuples():
    assert isinstance(configured("optim.peak_lr", 1).optim.peak_lr, float)
    assert configured("model.mixers", ["full"]).model.mixers == ("full",)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("train.setps", 3, "no configuration field 'train.setps'. Did you mean 'train.steps'?"),
        ("train.peak_lr", 0.1, "no configuration field 'train.peak_lr'. Did you mean 'optim.peak"),
        ("trian.steps", 3, "no configuration section 'trian'.*Did you mean 'train'"),
        ("train.steps", "3", "train.steps = '3' must be an integer, not str"),
        ("train.steps", 3.0, "train.steps = 3.0 must be an integer, not float"),
        ("train.steps", True, "train.steps = True must be an integer, not bool"),
        ("train.steps", 0, "train.steps = 0 must be at least 1"),
        ("train.steps", -5, "train.steps = -5 must be at least 1"),
        ("optim.b1", 1.0, "optim.b1 = 1.0 must be less than 1"),
        ("optim.eps", 0.0, "optim.eps = 0.0 must be greater than 0"),
        ("optim.peak_lr", float("nan"), "optim.peak_lr = nan must be a number"),
        ("optim.clip", -1.0, "optim.clip = -1.0 must be at least 0"),
        ("model.fast_mlp", 1, "model.fast_mlp = 1 must be true or false"),
        ("model.mixers", ("windw",), "'windw' is not one of full, window.*Did you mean 'window'"),
        ("model.mixers", "full", "model.mixers = 'full' must be a list of values"),
        ("model.compute_dtype", "float16", "'float16' is not one of float32, bfloat16"),
        ("inner.rule", "SGD", "inner.rule = 'SGD' is not one of sgd"),
        ("inner.meta_gradient", "exakt", "Did you mean 'exact'"),
        ("data.layout", "packed", "data.layout = 'packed' is not one of stream, documents"),
        ("data.weights", (0.5, -0.5), "data.weights = -0.5 must be greater than 0"),
        ("train.profile_steps", (1.5, 2), "train.profile_steps = 1.5 must be an integer"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value, sentence):
    with pytest.raises(UserError, match=sentence):
        configured(name, value)


def test_earlier_names_are_read():
    old = {"mamba_state": 64, "ttt_chunk": 8}
    model = from_config_dict({"model": old, "train": {"nonfinite_limit": 3}}).model
    assert (model.mamba2.state_size, model.ttt_layer.chunk_size) == (64, 8)
    with pytest.raises(UserError, match=r"model.mamba2.state_size is given twice"):
        from_config_dict({"model": {**old, "mamba2": {"state_size": 32}}})
    with pytest.raises(UserError, match=r"model.mamba_state is now model.mamba2.state_size"):
        parse_value("model.mamba_state", "64")


def test_a_nested_section_takes_no_value():
    with pytest.raises(
        UserError, match=r"model.kda is a section; set its fields, such as model.kda"
    ):
        configured("model.kda", 3)


def test_a_section_must_be_one():
    with pytest.raises(UserError, match="train = 3 must be a section"):
        from_config_dict({"train": 3})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("train.steps", "100", 100),
        ("train.steps", "1e5", 100_000),
        ("train.steps", "10_000", 10_000),
        ("optim.peak_lr", "1e-3", 1e-3),
        ("optim.peak_lr", "2", 2.0),
        ("model.fast_mlp", "true", True),
        ("model.fast_mlp", "False", False),
        ("model.mixers", "window,full", ("window", "full")),
        ("model.mixers", "('window', 'full',)", ("window", "full")),
        ("eval.context_lengths", "[512, 1024]", (512, 1024)),
        ("eval.context_lengths", "()", ()),
        ("data.weights", "0.5,1", (0.5, 1.0)),
        ("inner.fast_paths", "suffix/**/mlp/**", ("suffix/**/mlp/**",)),
        ("train.init_from", "runs/a=b", "runs/a=b"),
        ("train.wandb_project", "7", "7"),
    ],
)
def test_values_are_read_by_the_fields_type(name, text, value):
    read = parse_value(name, text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.steps", "many"),
        ("train.steps", "1.5"),
        ("train.steps", ""),
        ("optim.peak_lr", "inf"),
        ("model.fast_mlp", "maybe"),
        ("eval.context_lengths", "1,x"),
    ],
)
def test_what_does_not_read_as_type_is_refused(name, text):
    with pytest.raises(UserError, match=name.replace(".", r"\.") + " = "):
        parse_value(name, text)
