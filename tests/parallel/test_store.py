"""JAX's private store and its hooks, in a process of its own.

Not among the slow tests, so that it runs on the oldest and on the newest JAX.
"""

import os
import socket
import subprocess
import sys

CHECK = """
from tttjax.parallel import store
met = []
connected = store.connect(
    ("127.0.0.1:PORT", 1, 0), lambda *words: met.append(words), lambda: None,
    init_seconds=20, heartbeat_seconds=5, shutdown_seconds=5,
)
assert met == [("127.0.0.1:PORT", 0, 1)], met
assert (connected.process_id, connected.process_count) == (0, 1)
connected.put("a/1", "x")
connected.put("a/1", "y")
assert connected.put_first("a/2", "z") and not connected.put_first("a/2", "w")
assert connected.items("a") == {"1": "y", "2": "z"}, connected.items("a")
assert connected.items("b") == {}
assert connected.peek("a/2") == "z" and connected.peek("b") is None
assert connected.get("a/2", 5) == "z" and connected.get("c", 0.1) is None
assert connected.wait_for_all("barrier", 5)
assert not connected.stop_notice()

import jax
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()  # no device was touched
jax.distributed.shutdown()
try:
    connected.put("a/1", "x")
except store.StoreLostError:
    print("all as expected")
"""


def test_the_store_of_this_jax():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [sys.executable, "-c", CHECK.replace("PORT", port)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert result.stdout == "all as expected\n", result.stderr
