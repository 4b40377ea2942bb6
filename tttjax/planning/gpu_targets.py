"""GPUs as XLA's compiler wants them described, so that it compiles for one that is not here.

The figures are the device properties that CUDA reports of each GPU. Sources: the descriptions
`a100_sxm_80`, `h100_sxm`, `h100_pcie`, `h200` and `b200` in XLA's repository (openxla/xla,
`xla/backends/gpu/target_config/specs`), and for the limits that all share the table of compute
capabilities in NVIDIA's CUDA programming guide.
"""

import importlib.metadata
from dataclasses import dataclass, replace

# What the compiler needs, as in the extra `plan-gpu`: JAX's plugin, cuDNN, ptxas, libdevice.
WHEELS = ("jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-cuda-nvcc", "nvidia-nvvm")


@dataclass(frozen=True)
class GpuTarget:
    """One GPU. capability: the major compute capability. cores: streaming multiprocessors.

    fpus: float32 units per core. clock: GHz. memory, l2_cache, shared_memory (of a core): bytes.
    bandwidth: bytes per second.
    """

    description: str
    capability: int
    cores: int
    fpus: int
    clock: float
    memory: int
    bandwidth: int
    l2_cache: int
    shared_memory: int


_H100 = GpuTarget(
    description="NVIDIA H100 80GB HBM3",
    capability=9,
    cores=132,
    fpus=128,
    clock=1.98,
    memory=84942979072,
    bandwidth=3352320000000,
    l2_cache=52428800,
    shared_memory=233472,
)
GPU_TARGETS = {
    "a100": GpuTarget(
        description="NVIDIA A100-SXM4-80GB",
        capability=8,
        cores=108,
        fpus=64,
        clock=1.41,
        memory=85100068864,
        bandwidth=2039040000000,
        l2_cache=41943040,
        shared_memory=167936,
    ),
    "h100": _H100,
    "h100-pcie": replace(
        _H100, description="NVIDIA H100 PCIe", cores=114, clock=1.755, bandwidth=2039040000000
    ),
    "h200": replace(_H100, description="NVIDIA H200", memory=151397597184, bandwidth=4800000000000),
    "b200": replace(
        _H100,
        description="NVIDIA B200",
        capability=10,
        cores=148,
        clock=1.965,
        memory=191514411008,
        bandwidth=7672320000000,
        l2_cache=132644864,
    ),
}


def missing_wheels() -> list[str]:
    """The packages of `WHEELS` that are not installed."""
    installed = {dist.metadata["Name"] for dist in importlib.metadata.distributions()}
    return [name for name in WHEELS if name not in installed]


def target_config(gpu: str) -> str:
    """The description of a GPU of `GPU_TARGETS`, a `GpuTargetConfigProto` as text.

    The version of cuDNN is the installed one's, whose front end compiles attention.
    """
    target = GPU_TARGETS[gpu]
    major, minor, patch, *_ = importlib.metadata.version("nvidia-cudnn-cu13").split(".")
    features = "ACCELERATED_FEATURES" if target.capability >= 9 else "NONE"
    return f"""\
platform_name: "CUDA"
device_description_str: "{target.description}"
dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}
gpu_device_info {{
  cuda_compute_capability {{ major: {target.capability} feature_extension: {features} }}
  core_count: {target.cores}
  fpus_per_core: {target.fpus}
  clock_rate_ghz: {target.clock}
  device_memory_size: {target.memory}
  memory_bandwidth: {target.bandwidth}
  l2_cache_size: {target.l2_cache}
  shared_memory_per_core: {target.shared_memory}
  shared_memory_per_block_optin: {target.shared_memory - 1024}
  shared_memory_per_block: 49152
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
"""
