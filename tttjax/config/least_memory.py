"""A lower bound on the memory of training: configurations that certainly exceed it are refused.

Otherwise they would compile for minutes, or the system would kill the process without a message. A
configuration that passes may still not fit; `tttjax plan` tells.
"""

from tttjax.config.counts import parameter_count
from tttjax.config.schema import Config, MeshConfig
from tttjax.errors import UserError

_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
_TOKEN_BYTES = 4 + 4 + 1  # input, target, mask
_GB = 1e9


def check_memory(
    config: Config, mesh: MeshConfig, device_bytes: float, host_bytes: float, processes: int = 1
) -> None:
    """UserError if weights and optimizer exceed a device, or the batches a host.

    mesh: with `data` resolved. device_bytes, host_bytes: the memory of one device, of one host.
    """
    state = least_state_bytes(config, mesh)
    if state > device_bytes:
        raise UserError(
            f"The {parameter_count(config.model)['total']:,} parameters and their optimizer state "
            f"need {state / _GB:,.1f} GB on each device, which has {device_bytes / _GB:,.1f} GB: "
            "make the model smaller (model.embed_dim, model.num_layers, ...), or shard it over "
            "more devices with mesh.fsdp; `tttjax plan` says what fits."
        )
    activations = least_activation_bytes(config, mesh)
    if activations > device_bytes:
        raise UserError(
            f"One activation of {config.train.batch_size} x {config.train.seq_len} tokens "
            f"(train.batch_size x train.seq_len) needs {activations / _GB:,.1f} GB on each device, "
            f"which has {device_bytes / _GB:,.1f} GB: lower them, or raise train.accum_steps."
        )
    tokens = config.train.batch_size * config.train.seq_len
    batches = (1 + config.data.prefetch) * tokens * _TOKEN_BYTES / processes
    if batches > host_bytes:
        raise UserError(
            f"Batches of {config.train.batch_size} x {config.train.seq_len} tokens "
            f"(train.batch_size x train.seq_len), {config.data.prefetch} of them prefetched "
            f"(data.prefetch), need {batches / _GB:,.1f} GB of the host's memory, which has "
            f"{host_bytes / _GB:,.1f} GB: lower one of the three."
        )


def least_state_bytes(config: Config, mesh: MeshConfig) -> float:
    """Weights and Adam's two moments on one device, all sharded as far as the mesh allows."""
    width = _BYTES[config.model.param_dtype]
    count = parameter_count(config.model)["total"]
    return count * (width + 2 * max(4, width)) / (mesh.fsdp * mesh.tensor)


def least_activation_bytes(config: Config, mesh: MeshConfig) -> float:
    """The hidden states between two blocks for a device's part of a microbatch.

    0 where all blocks run chunk by chunk, so that no full sequence is in memory.
    """
    model, train = config.model, config.train
    if model.suffix_layers == model.num_layers:
        return 0.0
    sequences = train.batch_size / train.accum_steps / (mesh.data * mesh.fsdp)
    return sequences * train.seq_len * model.embed_dim * _BYTES[model.compute_dtype]
