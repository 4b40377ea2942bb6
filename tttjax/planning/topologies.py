"""Names of pods: `v5p:4x4x4`, `gpu:h100:8x4`, `cpu:4`, and meshes over devices that are not there.

Chips of a TPU slice come from libtpu, which describes and compiles for any slice without one. GPUs
have no compiler here, so their mesh is abstract: a program can be traced for it, not compiled.
`cpu:N` is this machine, as N fake devices where N is more than one. The cloud console's names of
TPU slices, as `v5p-128`, are taken as well.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import cast

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh

from tttjax.config import MeshConfig
from tttjax.config.values import nearest
from tttjax.errors import UserError, install_extra
from tttjax.parallel.mesh import MESH_AXES, make_mesh
from tttjax.planning.accelerators import CHIPS, Chip
from tttjax.runtime import libtpu

TPUS = {chip.name: chip for chip in CHIPS.values() if chip.topology}
GPUS = {chip.name: chip for chip in CHIPS.values() if chip.network}

# The console's name of a TPU: ours, what its number counts in one chip, and the slices it offers.
# Other slices have no such name, or one that says nothing of their shape.
_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x8x12", "8x8x8"),
    *("8x8x12", "8x8x16", "8x12x16", "8x16x16", "12x16x16", "16x16x16", "16x16x24"),
)
CONSOLE = {
    "v5litepod": ("v5e", 1, _2D),
    "v5e": ("v5e", 1, _2D),
    "v6e": ("v6e", 1, _2D),
    "v5p": ("v5p", 2, _3D),
    "tpu7x": ("v7x", 2, _3D),
}

# libtpu asks the machine it runs on which TPU it has, unless it is told not to.
_WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    **libtpu.ENVIRONMENT,
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclass(frozen=True)
class Topology:
    """A pod by its name. chip: None for `cpu:N`. shape: its chips along each axis, or for GPUs
    (GPUs of a host, hosts)."""

    name: str
    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """What JAX calls devices, and a mesh divides."""
        return self.chips * (self.chip.devices if self.chip else 1)

    @property
    def compiles(self) -> bool:
        """Whether the program can be compiled for it here."""
        return self.chip is None or bool(self.chip.topology)

    @property
    def platform(self) -> str:
        """As programs for it are lowered."""
        if self.chip is None:
            return "cpu"
        return "tpu" if self.chip.topology else "cuda"

    def link(self, group: int) -> float:
        """Bytes per second out of a device, at best, in a collective among `group` of them."""
        assert self.chip is not None
        inside = not self.chip.network or group <= self.shape[0]
        return (self.chip.link if inside else self.chip.network) / self.chip.devices


def parse_topology(name: str) -> Topology:
    """The pod of that name; UserError that says what is wrong with it, with the nearest name."""
    prefix, dash, count = name.partition("-")
    if prefix in CONSOLE and dash:
        return parse_topology(_from_console(prefix, count))
    platform, _, rest = name.partition(":")
    if platform == "gpu":
        return _parse_gpu(name, rest)
    if platform == "cpu":
        if not re.fullmatch("[1-9][0-9]*", rest):
            raise UserError(f"--topology={name}: write cpu:N, N devices, as in cpu:4.")
        return Topology(name, None, (int(rest),))
    if platform not in TPUS:
        known = [*TPUS, *CONSOLE, "gpu", "cpu"]
        platform = platform.partition("-")[0]
        raise UserError(
            f"--topology={name}: there is no chip {platform!r} to plan for; choose among "
            f"{', '.join(TPUS)} for TPUs, as in v5p:4x4x4 or v5p-128, "
            f"gpu:{{{','.join(GPUS)}}}, as in gpu:h100:8x4, and cpu:N.{nearest(platform, known)}"
        )
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", rest):
        raise UserError(
            f"--topology={name}: after {platform}: come the chips along each axis of the slice, "
            f"as in {platform}:2x2 or {platform}:4x4x4."
        )
    return Topology(name, TPUS[platform], tuple(map(int, rest.split("x"))))


def _from_console(prefix: str, count: str) -> str:
    """`v5p`, `128` -> `v5p:4x4x4`. UserError with the nearest names if there is no such slice."""
    chip, per_chip, shapes = CONSOLE[prefix]
    names = {per_chip * math.prod(map(int, shape.split("x"))): shape for shape in shapes}
    counted = "TensorCores, two a chip" if per_chip == 2 else "chips"
    if not re.fullmatch("[0-9]{1,9}", count):
        raise UserError(
            f"--topology={prefix}-{count}: after {prefix}- comes the number of {counted}, as in "
            f"{prefix}-8; a slice by its chips along each axis is {chip}:{shapes[3]}."
        )
    if int(count) not in names:
        near = sorted(sorted(names, key=lambda known: abs(known - int(count)))[:2])
        raise UserError(
            f"--topology={prefix}-{count}: there is no slice of {count} {counted}; the nearest are "
            f"{' and '.join(f'{prefix}-{known}' for known in near)}, and others are named by their "
            f"chips along each axis, as in {chip}:{shapes[3]}."
        )
    return f"{chip}:{names[int(count)]}"


def _parse_gpu(name: str, rest: str) -> Topology:
    chip, _, size = rest.partition(":")
    if chip not in GPUS:
        raise UserError(
            f"--topology={name}: there is no GPU {chip!r} in the table; choose among "
            f"{', '.join(GPUS)}.{nearest(chip, GPUS)}"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", size):
        raise UserError(
            f"--topology={name}: after gpu:{chip}: come the GPUs of one host and the number of "
            f"hosts, as in gpu:{chip}:8x4 for 32 GPUs."
        )
    gpus, _, hosts = size.partition("x")
    return Topology(name, GPUS[chip], (int(gpus), int(hosts or 1)))


def open_mesh(topology: Topology, mesh: MeshConfig) -> Mesh:
    """The mesh of a configuration (with data resolved) over the topology's devices.

    Raises UserError without libtpu, or for a slice that it does not know.
    """
    if topology.compiles:
        devices = _cpus(topology) if topology.chip is None else _tpus(topology)
        return make_mesh(mesh.data, mesh.fsdp, mesh.tensor, devices=devices)
    sizes = mesh.data, mesh.fsdp, mesh.tensor
    types = (AxisType.Auto,) * len(MESH_AXES)
    return cast(Mesh, AbstractMesh(sizes, MESH_AXES, axis_types=types))  # enough for tracing


def _cpus(topology: Topology) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
        raise UserError(
            f"--topology={topology.name}: this process has {len(devices)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices}."
        )
    return devices[: topology.devices]


def _tpus(topology: Topology) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name} is compiled for with libtpu, which is not installed; "
            f"install it with {install_extra('plan')} (Linux), or plan for GPUs."
        )
    for variable, value in _WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    assert topology.chip is not None
    shape = "x".join(map(str, topology.shape))
    options = {"chips_per_host_bounds": [1, 1, 1]} if topology.chips == 1 else {}
    try:
        name = f"{topology.chip.topology}:{shape}"
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:  # of a type that differs between JAX's versions
        reason = str(error).partition("\n")[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"--topology={topology.name}: libtpu does not know this slice ({reason}); sides are "
            "1, or multiples of 2 of which two at least are more than 1."
        ) from error


def own_backend_is_cpu(devices: int) -> None:
    """Keeps this process off accelerators, with so many fake CPU devices.

    Does nothing in a process that uses its devices already.
    """
    try:
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        return
    jax.config.update("jax_platforms", "cpu")
