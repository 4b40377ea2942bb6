"""How much memory there is: of a device, and of this host."""

import os

import jax


def device_memory() -> float:
    """Bytes of the smallest local device; devices of a CPU share the host's."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [s["bytes_limit"] for s in stats if s.get("bytes_limit")]
    return float(min(limits)) if limits else host_memory() / len(stats)


def host_memory() -> float:
    """Bytes of this host's memory, in all."""
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
