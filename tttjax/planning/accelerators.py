"""What one accelerator can do at best: the table behind MFU and `tttjax plan`.

Dense bfloat16 peaks (tensor cores without sparsity), memory, and bytes per second to memory and to
other chips. Links carry as much in each direction; `link` is what leaves a chip over all of its
links together, half of what is sold as bidirectional bandwidth. `network` is the share of one chip
in its host's network, over which hosts talk that share no links.

Sources, as published in 2026: for TPUs, the system architecture page of each version in Google
Cloud's documentation (cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e, /tpu7x), of v6e's two lists
of figures the higher, but for the memory of v5e and later, which is what their compiler leaves to a
program (it says so when it refuses one); for NVIDIA GPUs, the data sheet of each, and for `network`
the DGX and HGX systems of that generation (one 200, later one 400 Gbit/s adapter per GPU).
"""

from dataclasses import dataclass

GiB = 2**30
Gbit = 1e9 / 8


@dataclass(frozen=True)
class Chip:
    """One chip. kinds: what `jax.Device.device_kind` of its devices starts with.

    flops: bfloat16 FLOP/s. memory: bytes. bandwidth, link, network: bytes per second (the module's
    docstring); network 0: there are only links. devices: how many devices JAX sees in one chip.
    topology: what libtpu calls it; empty for GPUs, and for v4, whose two cores are one device on
    the machine and two devices in libtpu's description.
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
    Chip("v4", ("TPU v4",), 275e12, 32 * GiB, 1.2e12, 2400 * Gbit),
    Chip(
        "v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GiB, 819e9, 1600 * Gbit, topology="v5e"
    ),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GiB, 2765e9, 4800 * Gbit, topology="v5p"),
    Chip(
        "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GiB, 1640e9, 3584 * Gbit, topology="v6e"
    ),
    Chip("v7x", ("TPU7x",), 2307e12, 189.5 * GiB, 7380e9, 600e9, devices=2, topology="tpu7x"),
    Chip("a100", ("NVIDIA A100",), 312e12, 80e9, 2039e9, 300e9, 200 * Gbit),
    Chip("h100", ("NVIDIA H100",), 989e12, 80e9, 3350e9, 450e9, 400 * Gbit),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 80e9, 2000e9, 64e9, 400 * Gbit),
    Chip("h200", ("NVIDIA H200",), 989e12, 141e9, 4800e9, 450e9, 400 * Gbit),
    Chip("b200", ("NVIDIA B200",), 2250e12, 180e9, 7700e9, 900e9, 400 * Gbit),
)
CHIPS = {chip.name: chip for chip in _ALL}


def peaks() -> dict[str, float]:
    """FLOP/s of one JAX device by the start of its `device_kind`."""
    return {kind: chip.flops / chip.devices for chip in _ALL for kind in chip.kinds}
