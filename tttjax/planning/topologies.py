"""Names of pods (`v5p:4x4x4`, `gpu:h100:8x4`, `cpu:4`), and meshes over devices that are absent.

The devices of a TPU slice come from libtpu, which describes and compiles for any slice without
hardware; those of GPUs from JAX's CUDA plugin, given their description. `cpu:N` is this machine as
N (fake) devices. The cloud console's names of TPU slices, such as `v5p-128`, are accepted as well.
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from tttjax.config import MeshConfig
from tttjax.config.values import nearest
from tttjax.errors import UserError, install_extra
from tttjax.parallel.mesh import make_mesh
from tttjax.planning.accelerators import ACCELERATORS, Accelerator
from tttjax.planning.gpu_targets import GPU_TARGETS, missing_wheels, target_config
from tttjax.runtime import libtpu

TPUS = {name: tpu for name, tpu in ACCELERATORS.items() if tpu.topology}
GPUS = {name: ACCELERATORS[name] for name in GPU_TARGETS}

# Console name of a TPU -> (our name, units counted per chip, slices with a unique console name).
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

# Keeps libtpu from querying the machine for its TPU.
_WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    **libtpu.ENVIRONMENT,
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclass(frozen=True)
class Topology:
    """A pod. accelerator: None for `cpu:N`. shape: TPU chips along each axis, or (GPUs per host,
    hosts)."""

    name: str
    accelerator: Accelerator | None
    shape: tuple[int, ...]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.num_chips * (self.accelerator.devices if self.accelerator else 1)

    @property
    def platform(self) -> str:
        """The platform that programs for it are lowered to."""
        return {"cpu": "cpu", "gpu": "cuda"}.get(self.name.partition(":")[0], "tpu")

    def link(self, group_size: int) -> float:
        """Peak outgoing bytes per second of a device in a collective among `group_size` devices."""
        accelerator = self.accelerator
        assert accelerator is not None
        uses_links = not accelerator.network or group_size <= self.shape[0]
        return (accelerator.link if uses_links else accelerator.network) / accelerator.devices


def parse_topology(name: str) -> Topology:
    """The pod of that name. Raises UserError with the nearest valid name."""
    prefix, dash, count = name.partition("-")
    if prefix in CONSOLE and dash:
        return parse_topology(_from_console(prefix, count))
    platform, _, size = name.partition(":")
    if platform == "gpu":
        return _parse_gpu(name, size)
    if platform == "cpu":
        if not re.fullmatch("[1-9][0-9]*", size):
            raise UserError(f"--topology={name}: write cpu:N for N devices, as in cpu:4.")
        return Topology(name, None, (int(size),))
    if platform not in TPUS:
        names = [*TPUS, *CONSOLE, "gpu", "cpu"]
        platform = platform.partition("-")[0]
        raise UserError(
            f"--topology={name}: unknown accelerator {platform!r}; choose from "
            f"{', '.join(TPUS)} (TPUs, as in v5p:4x4x4 or v5p-128), "
            f"gpu:{{{','.join(GPUS)}}} (as in gpu:h100:8x4) and cpu:N.{nearest(platform, names)}"
        )
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", size):
        raise UserError(
            f"--topology={name}: write {platform}: followed by the chips along each axis of the "
            f"slice, as in {platform}:2x2 or {platform}:4x4x4."
        )
    return Topology(name, TPUS[platform], tuple(map(int, size.split("x"))))


def console_name(topology: Topology) -> str:
    """The cloud console's name of a TPU slice, `v5p-64`. Raises UserError if it has none."""
    shape = "x".join(map(str, topology.shape))
    for prefix, (tpu, per_chip, shapes) in CONSOLE.items():
        if topology.accelerator is TPUS[tpu] and shape in shapes:
            return f"{prefix}-{per_chip * topology.num_chips}"
    raise UserError(
        f"--topology={topology.name}: the cloud console has no name for this slice; choose one "
        "that it names, as in v5p-64"
    )


def _from_console(prefix: str, count: str) -> str:
    """`v5p`, `128` -> `v5p:4x4x4`. Raises UserError with the nearest names if there is no slice."""
    tpu, per_chip, shapes = CONSOLE[prefix]
    names = {per_chip * math.prod(map(int, shape.split("x"))): shape for shape in shapes}
    units = "TensorCores, two per chip" if per_chip == 2 else "chips"
    if not re.fullmatch("[0-9]{1,9}", count):
        raise UserError(
            f"--topology={prefix}-{count}: write {prefix}- followed by the number of {units}, as "
            f"in {prefix}-8, or the chips along each axis, as in {tpu}:{shapes[3]}."
        )
    if int(count) not in names:
        near = sorted(sorted(names, key=lambda size: abs(size - int(count)))[:2])
        raise UserError(
            f"--topology={prefix}-{count}: there is no slice of {count} {units}; the nearest are "
            f"{' and '.join(f'{prefix}-{size}' for size in near)}. Name other slices by their "
            f"chips along each axis, as in {tpu}:{shapes[3]}."
        )
    return f"{tpu}:{names[int(count)]}"


def _parse_gpu(name: str, spec: str) -> Topology:
    gpu, _, size = spec.partition(":")
    if gpu not in GPUS:
        raise UserError(
            f"--topology={name}: unknown GPU {gpu!r}; choose from "
            f"{', '.join(GPUS)}.{nearest(gpu, GPUS)}"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", size):
        raise UserError(
            f"--topology={name}: write gpu:{gpu}: followed by GPUs per host x hosts, as in "
            f"gpu:{gpu}:8x4 for 32 GPUs."
        )
    per_host, _, hosts = size.partition("x")
    return Topology(name, GPUS[gpu], (int(per_host), int(hosts or 1)))


def open_mesh(topology: Topology, mesh: MeshConfig) -> Mesh:
    """The mesh of a configuration (with data resolved) over the topology's devices.

    Raises UserError if the compiler is missing or does not know the slice.
    """
    find_devices = {"cpu": _cpus, "tpu": _tpus, "cuda": _gpus}[topology.platform]
    return make_mesh(mesh.data, mesh.fsdp, mesh.tensor, devices=find_devices(topology))


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
            f"--topology={topology.name} needs libtpu, which is not installed; install it with "
            f"{install_extra('plan')} (Linux)."
        )
    for variable, value in _WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    assert topology.accelerator is not None
    shape = "x".join(map(str, topology.shape))
    options = {"chips_per_host_bounds": [1, 1, 1]} if topology.num_chips == 1 else {}
    try:
        name = f"{topology.accelerator.topology}:{shape}"
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except Exception as error:  # its type differs between JAX versions
        reason = str(error).partition("\n")[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"--topology={topology.name}: libtpu does not know this slice ({reason}); use sides "
            "that are 1 or multiples of 2, at least two of them more than 1."
        ) from error


def _gpus(topology: Topology) -> list[jax.Device]:
    if missing := missing_wheels():
        raise UserError(
            f"--topology={topology.name} needs packages that are not installed "
            f"({', '.join(missing)}); install them with {install_extra('plan-gpu')} (Linux, no GPU "
            "needed)."
        )
    # XLA logs a compilation of some minutes as an error; others raise an exception.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    assert topology.accelerator is not None
    per_host, hosts = topology.shape
    try:
        description = topologies.get_topology_desc(
            *("", "cuda"),
            target_config=target_config(topology.accelerator.name),
            topology=f"1x{hosts}x{per_host}",  # slices, hosts, devices
        )
    except NotImplementedError as error:  # JAX has looked for a GPU, and dropped the plugin
        raise UserError(
            f"--topology={topology.name}: this process has no CUDA compiler, because JAX found no "
            "GPU when it started; set JAX_PLATFORMS=cpu before."
        ) from error
    return list(description.devices)


def use_cpu_backend(devices: int) -> None:
    """Makes this process use `devices` fake CPU devices instead of accelerators.

    Does nothing if JAX has initialised its backends already.
    """
    try:
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        return
    jax.config.update("jax_platforms", "cpu")
