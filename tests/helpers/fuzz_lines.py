"""Valid and invalid command lines of `tttjax train`: lists, and random ones from the schema."""

import random
from itertools import pairwise
from typing import get_args, get_origin

from tttjax.config.fields import field_info
from tttjax.config.schema import all_fields

# For a run of one block without fast weights, 12 steps of 8 sequences of 32 tokens.
WORKS = [
    ["--config.train.steps=1e3"],
    ["--config.train.steps=1_0"],
    ["--config.optim.peak_lr=.003"],
    ["--config.optim.init_lr", "-1"],
    ["--config.model.fast_mlp=True", "--config.model.suffix_layers=1"],
    ["--config.eval.context_lengths=16"],
    ["--config.eval.context_lengths=(16,)"],
    ["--config.eval.context_lengths=[16, 32]"],
    ["--config.model.mixers=('window','full')", "--config.model.num_layers=2"],
    ["--config.train.batch_size=3000", "--config.data.sources=data,data"],
    ["--config.data.sources=data,data"],
    ["--config.inner.chunk_size=32"],
    ["--config.inner.lr=1e30"],
    ["--config.inner.truncate_chunks=99", "--config.inner.meta_gradient=truncated"],
    ["--config.model.init_std=1e20"],
    ["--config.train.batch_size=8e0"],
    ["--config=5"],  # the last of several
]
REFUSED = [
    *(["--config.train.steps=1.5"], ["--config.train.steps=-3"], ["--config.train.steps=0"]),
    *(["--config.train.steps="], ["--config.train.steps=0x10"], ["--config.train.steps=1e400"]),
    *(["--config.train.steps=\uff11\uff10"], ["--config.train.steps=99999999999999999999"]),
    *(["--config.optim.peak_lr=nan"], ["--config.optim.peak_lr=inf"]),
    *(["--config.optim.peak_lr=1e-400"], ["--config.optim.peak_lr=1e39"]),
    *(["--config.optim.peak_lr=3e-3,"], ["--config.optim.peak_lr=-1e-3"]),
    *(["--config.optim.init_lr=-0.5"], ["--config.model.fast_mlp=on"]),
    *(["--config.model.fast_mlp"], ["--config.model.fast_mlp=None"]),
    *(["--config.eval.context_lengths=16;32"], ["--config.eval.context_lengths=((16,32))"]),
    *(["--config.eval.context_lengths=range(3)"], ["--config.model.mixers=window,full,mamba2"]),
    *(["--config.model.mixers=winodw"], ["--config.train.seq_len=31"]),
    *(["--config.train.seq_len=8000000"], ["--config.train.batch_size=3000"]),
    *(["--config.train.seed=4294967296"], ["--config.train.seed=99999999999999999999"]),
    *(["--config.data.seed=4294967296"], ["--config.data.seed=99999999999999999999"]),
    *(["--config.train.step=5"], ["--config.steps=5"], ["--config.training.steps=5"]),
    *(["--config.train.steps.x=5"], ["--config.train=5"], ["--config.data.sources=nowhere"]),
    *(["--config.data.sources="], ["--config.data.weights=1,2"], ["--config.data.weights=0"]),
    *(["--config.model.vocab_size=100"], ["--config.model.head_dim=3"]),
    *(["--config.model.num_heads=0"], ["--config.model.embed_dim=1000000000"]),
    *(["--config.inner.chunk_size=64"], ["--config.inner.fast_paths=nothing/**"]),
    *(["--config.inner.fast_paths=**"], ["--config.train.profile_steps=5,2"]),
    *(["--config.train.profile_steps=100,200"], ["--config.model.window_size=99999999999"]),
    *(["--config.mesh.data=3"], ["--config.mesh.data=0"], ["--config.mesh.tensor=3"]),
    *(["--config.train.init_from=nowhere"], ["--config.train.init_from=~/x"]),
    *(["--config.model.rope_scaling=1,2"], ["--config.model.compute_dtype=fp16"]),
    *(["--config.model.compute_dtype=float16"], ["--config.model.rope_theta=1e-30"]),
    *(["--config.model.norm_eps=0"], ["--config.model.init_std=nan"]),
    *(["--config.train.steps", "--config.train.seed=1"], ["--config.train.accum_steps=3"]),
    *(["--config.train.log_every=0"], ["--config.model.suffix_layers=3"]),
    # These would compile for minutes, or exhaust memory.
    *(["--config.model.num_layers=2147483647"], ["--config.model.vocab_size=2147483647"]),
    *(["--config.train.batch_size=100000000"], ["--config.data.prefetch=2147483647"]),
    ["--config.model.conv_size=100000", "--config.model.pre_conv=true"],
]

_INTEGERS = (
    *("-1", "0", "1", "2", "7", "1e3", "1_0", "2147483647", "2147483648", "4294967295"),
    *("4294967296", "9223372036854775808", "1e400", "1.5", "", "nan", "\uff11", "0x10"),
)
_NUMBERS = (
    *("-1", "-0.0", "0", "1", "0.5", "1e-7", "1e30", "3.4e38", "1e39", "1.2e-38", "1e-46"),
    *("1e-400", "nan", "-inf", "", "1;5", "\uff11", "1e", "--1"),
)
_WORDS = ("", "nowhere", "None", "\xe9", "a" * 300, "x+y", "+")
_BOOLEANS = ("true", "False", "1", "2", "", "on", "None")


def companions(name: str) -> list[str]:
    """Other flags with which the field has an effect."""
    key = name.split(".")[1]
    if key == "mamba2":
        sizes = ["--config.model.mamba2.head_dim=8", "--config.model.mamba2.state_size=4"]
        return ["--config.model.mixers=mamba2", *sizes]
    if key in ("gated_deltanet", "mixer_norm_eps", "scan_chunk"):
        return ["--config.model.mixers=gated_deltanet"]
    if key == "ttt_layer":
        return ["--config.model.mixers=ttt_linear"]
    if key == "conv_size":
        return ["--config.model.pre_conv=true"]
    if key.startswith("fast_mlp") or name.startswith("inner"):
        return ["--config.model.suffix_layers=1", "--config.model.fast_mlp=true"]
    return []


def values(name: str) -> list[str]:
    """Valid and invalid values of a field, among them neighbours of its limits and default."""
    field = all_fields()[name]
    info, is_tuple = field_info(field), get_origin(field.type) is tuple
    kind = get_args(field.type)[0] if is_tuple else field.type
    result = list({int: _INTEGERS, float: _NUMBERS, bool: _BOOLEANS, str: _WORDS}[kind])
    result += info.choices
    for limit in (info.minimum, info.maximum, info.above, info.below):
        if limit is not None:
            result += [f"{limit + d:.10g}" for d in ((-1, 0, 1) if kind is int else (-1e-6, 1e-6))]
    if kind in (int, float) and not is_tuple:
        result += [str(field.default + 1), str(field.default - 1), str(2 * field.default)]
    if is_tuple:
        pairs = pairwise(result)
        result += [f"{a},{b}" for a, b in pairs] + ["()", "[]", ",", "(1", "{}"]
    return list(dict.fromkeys(result))


def lines(number: int, seed: int = 0) -> list[list[str]]:
    """Lines with random values of one or two fields; every field is used in turn."""
    rng, names, result = random.Random(seed), list(all_fields()), []
    for i in range(number):
        name = names[i % len(names)]
        line = [*companions(name), f"--config.{name}={rng.choice(values(name))}"]
        if rng.random() < 0.2:
            other = rng.choice(names)
            line.append(f"--config.{other}={rng.choice(values(other))}")
        result.append(line)
    return result
