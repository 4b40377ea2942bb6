"""Peak rates and memory of accelerators, as used by MFU and `tttjax plan`.

FLOP/s are dense bfloat16 peaks (tensor cores without sparsity). `link` is the outgoing bandwidth of
a chip over all of its links, half of the advertised bidirectional bandwidth. `network` is one
chip's share of its host's network, which connects hosts that share no links.

Sources, as published in 2026. TPUs: the system architecture page of each version in Google Cloud's
documentation (cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x); for v6e the higher of its
two lists of figures; memory of v5e and later is what the compiler reports as available to a
program. NVIDIA GPUs: the data sheet of each; `network` is that of the DGX and HGX systems of the
generation (one 200 Gbit/s, later one 400 Gbit/s adapter per GPU).
"""

from dataclasses import dataclass

GiB = 2**30
Gbit = 1e9 / 8


@dataclass(frozen=True)
class Accelerator:
    """One chip. kinds: prefixes of its `jax.Device.device_kind`.

    flops: bfloat16 FLOP/s. memory: bytes. bandwidth (to memory), link, network: bytes per second;
    network 0: links only. devices: JAX devices per chip. topology: libtpu's name; empty for GPUs,
    and for v4, whose two cores are one JAX device but two in libtpu's description.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float = 0.0
    devices: int = 1
    topology: str = ""


_ALL = (
    Accelerator("v4", ("TPU v4",), 275e12, 32 * GiB, 1.2e12, 2400 * Gbit),
    Accelerator(
        "v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GiB, 819e9, 1600 * Gbit, topology="v5e"
    ),
    Accelerator(
        "v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GiB, 2765e9, 4800 * Gbit, topology="v5p"
    ),
    Accelerator(
        "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GiB, 1640e9, 3584 * Gbit, topology="v6e"
    ),
    Accelerator(
        "v7x", ("TPU7x",), 2307e12, 189.5 * GiB, 7380e9, 600e9, devices=2, topology="tpu7x"
    ),
    Accelerator("a100", ("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9, 200 * Gbit),
    Accelerator("h100", ("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, 400 * Gbit),
    Accelerator("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 80e9, 2000e9, 64e9, 400 * Gbit),
    Accelerator("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 400 * Gbit),
    Accelerator("b200", ("NVIDIA B200",), 2250e12, 180e9, 7700e9, 900e9, 400 * Gbit),
)
ACCELERATORS = {accelerator.name: accelerator for accelerator in _ALL}


def peaks() -> dict[str, float]:
    """FLOP/s of one JAX device, by prefix of its `device_kind`."""
    return {
        kind: accelerator.flops / accelerator.devices
        for accelerator in _ALL
        for kind in accelerator.kinds
    }
