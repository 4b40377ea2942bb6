"""What must hold between the fields of a configuration, and between it and the devices.

Every function raises UserError with one sentence that names the fields, their values and what
is allowed.
"""

import dataclasses

from tttjax.config.custom_code import check_custom_code
from tttjax.config.limits import INT_MAX
from tttjax.config.schema import Config, InnerConfig, MeshConfig, ModelConfig
from tttjax.errors import UserError


def has_fast_weights(model: ModelConfig, inner: InnerConfig) -> bool:
    """Whether the inner loop has weights to update."""
    return model.fast_mlp or bool(inner.fast_paths)


def check_config(config: Config) -> None:
    """All relations between fields; single values have been checked before."""
    _check_shapes(config.model)
    _check_fast_weights(config.model, config.inner)
    check_custom_code(config.inner)
    _check_chunks(config)
    _check_schedule(config)
    _check_data(config)
    if config.mesh.data == 0:
        raise UserError(
            "mesh.data = 0 must be a number of devices, or -1 for all remaining devices."
        )


def check_mesh(config: Config, num_devices: int, num_processes: int = 1) -> MeshConfig:
    """The mesh with `data` resolved to a number; UserError if it does not fit devices or model."""
    mesh, model, train = config.mesh, config.model, config.train
    others = mesh.fsdp * mesh.tensor
    fitting = _counts_that_fit(config, num_devices, num_processes)
    if mesh.data == -1 and num_devices % others:
        raise UserError(
            f"mesh.fsdp x mesh.tensor = {mesh.fsdp} x {mesh.tensor} = {others} does not divide the "
            f"number of devices, {num_devices}{fitting}."
        )
    data = num_devices // others if mesh.data == -1 else mesh.data
    if data * others != num_devices:
        raise UserError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {data} x {mesh.fsdp} x {mesh.tensor} = "
            f"{data * others} is not the number of devices, {num_devices}; "
            "mesh.data = -1 takes all remaining devices."
        )
    shards = data * mesh.fsdp
    micro_batch = train.batch_size // train.accum_steps
    if micro_batch % shards:
        name = "train.batch_size"
        if train.accum_steps > 1:
            name += f" / train.accum_steps = {train.batch_size} / {train.accum_steps}"
        raise UserError(
            f"{name} = {micro_batch} sequences cannot be divided among mesh.data x mesh.fsdp = "
            f"{data} x {mesh.fsdp} = {shards}; choose a multiple of {shards}{fitting}."
        )
    if shards % num_processes:
        raise UserError(
            f"mesh.data x mesh.fsdp = {shards} must be a multiple of the {num_processes} "
            "processes, so that each loads its own part of the batch."
        )
    for size, what in _sharded_by_tensor(model):
        if size % mesh.tensor:
            raise UserError(f"{what} = {size} cannot be divided among mesh.tensor = {mesh.tensor}.")
    if model.embed_dim % mesh.fsdp:
        raise UserError(
            f"model.embed_dim = {model.embed_dim} cannot be divided among mesh.fsdp = {mesh.fsdp}."
        )
    return dataclasses.replace(mesh, data=data)


def _counts_that_fit(config: Config, num_devices: int, num_processes: int) -> str:
    """The nearest numbers of devices, or of processes, that mesh and batch fit, as a clause."""
    mesh, train = config.mesh, config.train
    if mesh.data != -1:
        return ""
    unit = num_devices // num_processes if num_processes > 1 else 1
    now = num_devices // unit
    fitting = [
        count
        for count in range(1, 2 * now + 1)
        if count * unit % (mesh.fsdp * mesh.tensor) == 0
        and train.batch_size // train.accum_steps % (count * unit // mesh.tensor) == 0
    ]
    nearest = [n for n in fitting if n < now][-1:] + [n for n in fitting if n > now][:1]
    what = "processes" if num_processes > 1 else "devices"
    return f"; {' or '.join(map(str, nearest))} {what} would fit" if nearest else ""


def _sharded_by_tensor(model: ModelConfig) -> list[tuple[int, str]]:
    """What is sharded over the mesh axis `tensor`: sizes and their names."""
    result = [(model.mlp_dim, "model.mlp_dim"), (model.vocab_size, "model.vocab_size")]
    for mixer in model.mixers_in_use:
        result += mixer.sharded_by_tensor(model)
    if model.fast_mlp_heads:
        result.append((model.fast_mlp_heads, "model.fast_mlp_heads"))
    return result


def _check_shapes(model: ModelConfig) -> None:
    if not model.mixers:
        raise UserError('model.mixers is empty; give at least one, such as ("window",).')
    if len(model.mixers) > model.num_layers:
        raise UserError(
            f"model.mixers is a pattern of {len(model.mixers)} blocks, longer than "
            f"model.num_layers = {model.num_layers}; some of it would never be used."
        )
    if model.suffix_layers > model.num_layers:
        raise UserError(
            f"model.suffix_layers = {model.suffix_layers} is more than model.num_layers = "
            f"{model.num_layers}; the suffix is the last blocks of the model."
        )
    for mixer in model.mixers_in_use:
        mixer.check(model)


def _check_fast_weights(model: ModelConfig, inner: InnerConfig) -> None:
    if model.fast_mlp and model.suffix_layers == 0:
        raise UserError(
            "model.fast_mlp = True needs model.suffix_layers of at least 1: the fast MLPs are in "
            "the suffix."
        )
    if model.fast_mlp and not (model.mlp_dim or model.fast_mlp_heads):
        raise UserError("model.fast_mlp = True needs model.mlp_dim, the fast MLPs' width, above 0.")
    if model.fast_mlp_heads and model.embed_dim % model.fast_mlp_heads:
        raise UserError(
            f"model.embed_dim = {model.embed_dim} is not a multiple of model.fast_mlp_heads = "
            f"{model.fast_mlp_heads}."
        )
    if model.fast_mlp_heads and not model.fast_mlp:
        raise UserError(
            f"model.fast_mlp_heads = {model.fast_mlp_heads} is only for model.fast_mlp = True."
        )
    if model.fast_mlp_init == "zero" and not model.fast_mlp:
        raise UserError('model.fast_mlp_init = "zero" is only for model.fast_mlp = True.')
    if inner.meta_gradient == "truncated" and inner.truncate_chunks == 0:
        raise UserError(
            'inner.meta_gradient = "truncated" needs inner.truncate_chunks of at least 1.'
        )
    if inner.meta_gradient != "truncated" and inner.truncate_chunks:
        raise UserError(
            f"inner.truncate_chunks = {inner.truncate_chunks} is only for inner.meta_gradient = "
            f'"truncated", not "{inner.meta_gradient}"; set it to 0.'
        )
    trains_rates = has_fast_weights(model, inner) and inner.meta_gradient != "none"
    if inner.learn_lr != "none" and not trains_rates:
        raise UserError(
            f'inner.learn_lr = "{inner.learn_lr}" needs inner updates in training: fast weights, '
            'and an inner.meta_gradient other than "none".'
        )
    window_too_small = "window" in model.mixer_kinds and model.window_size < inner.chunk_size
    if has_fast_weights(model, inner) and window_too_small:
        raise UserError(
            f"model.window_size = {model.window_size} is smaller than inner.chunk_size = "
            f"{inner.chunk_size}; tokens of one chunk could not attend to each other before the "
            "update; make the window at least as long as a chunk."
        )


def _check_chunks(config: Config) -> None:
    chunk = config.inner.chunk_size
    lengths = [("train.seq_len", config.train.seq_len)]
    lengths += [("eval.context_lengths", length) for length in config.eval.context_lengths]
    for name, length in lengths:
        if length % chunk:
            below = length - length % chunk
            choices = f"{below} or {below + chunk}" if below else str(chunk)
            raise UserError(
                f"{name} = {length} is not a multiple of inner.chunk_size = {chunk}; the nearest "
                f"is {choices}."
            )


def _check_schedule(config: Config) -> None:
    train, optim = config.train, config.optim
    if train.batch_size * train.seq_len > INT_MAX:
        raise UserError(
            f"train.batch_size x train.seq_len = {train.batch_size} x {train.seq_len} = "
            f"{train.batch_size * train.seq_len} tokens of a step must be at most {INT_MAX}."
        )
    if train.batch_size % train.accum_steps:
        raise UserError(
            f"train.batch_size = {train.batch_size} is not a multiple of train.accum_steps = "
            f"{train.accum_steps}."
        )
    end, name = (
        (optim.decay_steps, "optim.decay_steps")
        if optim.decay_steps
        else (train.steps, "train.steps")
    )
    if optim.warmup_steps >= end:
        raise UserError(
            f"optim.warmup_steps = {optim.warmup_steps} leaves no step for the decay, which ends "
            f"at {name} = {end}."
        )
    if -1 < optim.init_lr < 0:
        raise UserError(f"optim.init_lr = {optim.init_lr} must be at least 0, or exactly -1.")
    first_last = train.profile_steps
    if first_last and (len(first_last) != 2 or first_last[0] > first_last[1]):
        raise UserError(
            f"train.profile_steps = {first_last} must be the first and the last step, such as "
            "(10, 12)."
        )
    if first_last and first_last[0] > train.steps:
        raise UserError(
            f"train.profile_steps = {first_last} begins after the last step, train.steps = "
            f"{train.steps}: nothing would be traced."
        )


def _check_data(config: Config) -> None:
    data = config.data
    if data.weights and len(data.weights) != len(data.sources):
        raise UserError(
            f"data.weights has {len(data.weights)} entries for {len(data.sources)} data.sources; "
            "give one weight per source, or none."
        )
