"""Memory of a device and of this host, in bytes."""

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import jax


@dataclass(frozen=True)
class MemoryUse:
    """Bytes now and at the peak: of the fullest local "device", or of the "process" on CPU."""

    now: int
    peak: int
    where: str


def memory_use() -> MemoryUse:
    """Of the devices if JAX knows it of them, else of the process. From any thread."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [(s["peak_bytes_in_use"], s["bytes_in_use"]) for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return MemoryUse(max(peaks)[1], max(peaks)[0], "device")
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = kibibytes * (1 if sys.platform == "darwin" else 1024)
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    now = pages * os.sysconf("SC_PAGE_SIZE") or peak
    return MemoryUse(now, max(peak, now), "process")


def device_memory() -> float:
    """Bytes of the smallest local device; CPU devices share the host's memory."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [s["bytes_limit"] for s in stats if s.get("bytes_limit")]
    return float(min(limits)) if limits else host_memory() / len(stats)


def host_memory() -> float:
    """Total bytes of this host's memory."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
