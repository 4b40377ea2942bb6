"""Relations between fields, and between a configuration and the devices."""

import pytest

from tttjax.config import Config, check_mesh, default_config, from_config_dict, has_fast_weights
from tttjax.errors import UserError

FAST = {"model.suffix_layers": 2, "model.fast_mlp": True}


def configured(**values) -> Config:
    config = default_config()
    for name, value in values.items():
        section, _, key = name.partition(".")
        config[section][key] = value
    return from_config_dict(config)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"train.seq_len": 1000},
            "train.seq_len = 1000 is not a multiple of inner.chunk_size = 128; the nearest is 896 "
            "or 1024",
        ),
        ({"train.seq_len": 100}, "the nearest is 128"),
        ({"eval.context_lengths": (512, 700)}, "eval.context_lengths = 700 is not a multiple"),
        (
            {**FAST, "model.window_size": 64},
            "model.window_size = 64 is smaller than inner.chunk_size = 128",
        ),
        ({"train.accum_steps": 3}, "train.batch_size = 8 is not a multiple of train.accum_steps"),
        (
            {"model.suffix_layers": 9},
            "model.suffix_layers = 9 is more than model.num_layers = 8",
        ),
        ({"model.fast_mlp": True}, "needs model.suffix_layers of at least 1"),
        ({"model.embed_dim": 255}, "model.embed_dim = 255 is not a multiple of model.num_heads"),
        ({"model.head_dim": 33}, "A head has 33 entries"),
        ({"model.embed_dim": 260}, "A head has 65 entries"),
        ({"model.num_kv_heads": 3}, "num_kv_heads = 3 does not divide model.num_heads = 4"),
        ({"model.num_kv_heads": 8}, "num_kv_heads = 8 does not divide model.num_heads = 4"),
        ({"model.rope_scaling": (8.0, 1.0)}, "has 2 numbers; give none, one .a factor. or four"),
        ({"model.rope_scaling": (0.5,)}, "its factor, 0.5, must be at least 1"),
        ({"model.rope_scaling": (8.0, 4.0, 4.0, 99.0)}, "low_freq_factor, 4, must be less than"),
        ({"model.rope_scaling": (8.0, 0.0, 4.0, 99.0)}, "rope_scaling = 0.0 must be greater than"),
        ({"model.fast_mlp_init": "zero"}, '"zero" is only for model.fast_mlp = True'),
        ({"model.mixers": ()}, "model.mixers is empty"),
        ({"model.mixers": ("window",) * 9}, "longer than model.num_layers = 8"),
        ({"inner.meta_gradient": "truncated"}, "needs inner.truncate_chunks of at least 1"),
        ({"inner.truncate_chunks": 2}, 'only for inner.meta_gradient = "truncated"'),
        ({"optim.warmup_steps": 1000}, "leaves no step for the decay.*train.steps = 1000"),
        (
            {"optim.warmup_steps": 500, "optim.decay_steps": 400},
            "leaves no step for the decay.*optim.decay_steps = 400",
        ),
        ({"optim.init_lr": -0.5}, "must be at least 0, or exactly -1"),
        ({"train.profile_steps": (5,)}, "must be the first and the last step"),
        ({"train.profile_steps": (5, 3)}, "must be the first and the last step"),
        ({"train.profile_steps": (0, 3)}, "train.profile_steps = 0 must be at least 1"),
        ({"data.weights": (1.0,)}, "data.weights has 1 entries for 0 data.sources"),
        ({"mesh.data": 0}, "mesh.data = 0"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(values, sentence):
    with pytest.raises(UserError, match=sentence):
        configured(**values)


def test_what_has_no_attention_needs_no_heads():
    config = configured(**{"model.mixers": ("none",), "model.embed_dim": 255})
    assert config.model.embed_dim == 255


def test_a_narrow_window_is_fine_without_fast_weights():
    assert configured(**{"model.window_size": 64}).model.window_size == 64


def test_fast_weights_are_declared_or_chosen():
    declared = configured(**FAST)
    chosen = configured(**{"model.suffix_layers": 2, "inner.fast_paths": ("suffix/**/mlp/**",)})
    plain = configured(**{"model.suffix_layers": 2})
    found = [has_fast_weights(c.model, c.inner) for c in (declared, chosen, plain)]
    assert found == [True, True, False]


@pytest.mark.parametrize(
    ("values", "devices", "processes", "data"),
    [
        ({}, 8, 1, 8),
        ({"mesh.fsdp": 2, "mesh.tensor": 2}, 8, 2, 2),
        ({"mesh.data": 4, "mesh.fsdp": 2}, 8, 8, 4),
        ({"train.accum_steps": 8}, 1, 1, 1),
    ],
)
def test_the_mesh_takes_all_devices(values, devices, processes, data):
    mesh = check_mesh(configured(**values), devices, processes)
    assert mesh.data == data
    assert mesh.data * mesh.fsdp * mesh.tensor == devices


@pytest.mark.parametrize(
    ("values", "devices", "processes", "sentence"),
    [
        ({"mesh.tensor": 3}, 8, 1, "1 x 3 = 3 does not divide the number of devices, 8"),
        ({"mesh.data": 2, "mesh.fsdp": 2}, 8, 1, "2 x 2 x 1 = 4 is not the number of devices, 8"),
        ({"train.batch_size": 12}, 8, 1, "12 sequences cannot be divided among.*= 8"),
        ({"train.accum_steps": 2}, 8, 1, "8 / 2 = 4 sequences cannot be divided"),
        ({"mesh.tensor": 8}, 8, 1, "model.num_heads = 4 cannot be divided among mesh.tensor = 8"),
        (
            {"mesh.tensor": 4, "model.num_kv_heads": 2},
            *(8, 1, "model.num_kv_heads = 2 cannot be divided among mesh.tensor = 4"),
        ),
        ({"mesh.tensor": 4, "model.mlp_dim": 510}, 8, 1, "model.mlp_dim = 510 cannot be divided"),
        ({"mesh.tensor": 4, "model.vocab_size": 257}, 8, 1, "model.vocab_size = 257 cannot"),
        ({"mesh.fsdp": 3, "train.batch_size": 3}, 3, 1, "model.embed_dim = 256 cannot be divided"),
        ({"mesh.tensor": 4}, 8, 4, "= 2 must be a multiple of the 4 processes"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(values, devices, processes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_mesh(configured(**values), devices, processes)
