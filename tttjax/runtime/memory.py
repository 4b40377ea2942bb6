"""Memory of a device and of this host, in bytes."""

import os

import jax


def device_memory() -> float:
    """Bytes of the smallest local device; CPU devices share the host's memory."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [s["bytes_limit"] for s in stats if s.get("bytes_limit")]
    return float(min(limits)) if limits else host_memory() / len(stats)


def host_memory() -> float:
    """Total bytes of this host's memory."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
