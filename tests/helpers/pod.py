"""A pod of real processes of `tttjax train` on loopback, with one CPU device each.

    with PodServer() as server:
        pod = server.pod(folder, data, heartbeat=5)
        pod.start()
        assert pod.wait(60) == [0, 0]

Faults are those of `pod_server.py`. All processes have deadlines, and end with the server.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from helpers.paths import ROOT

TINY = ROOT / "tests" / "helpers" / "tiny_run.py"
SERVER = ROOT / "tests" / "helpers" / "pod_server.py"
JOIN = 60  # seconds for all processes to start, on a busy machine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_device_environment(cache):
    flags = re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return environment | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(cache)}


class PodServer:
    """The process that forks those of all pods."""

    def __init__(self, cache):
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=one_device_environment(cache),
            text=True,
        )
        self._pods = []
        assert json.loads(self._process.stdout.readline()) == {"ready": True}
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pod in self._pods:
            pod.kill()
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
        self._thread.join()

    def pod(self, folder, data, count=2, **limits):
        self._pods.append(Pod(self, folder, data, count, limits))
        return self._pods[-1]

    def order(self, **order):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _read(self):
        for line in self._process.stdout:
            message = json.loads(line)
            kind = "pid" if "pid" in message else "code"
            number, rank = message["rank"].split("/")
            self._pods[int(number)].note(kind, int(rank), message[kind])


class Pod:
    """One run. codes: exit codes by rank; ended: the second in which each was seen."""

    def __init__(self, server, folder, data, count, limits):
        self._server, self.folder, self.count, self.port = server, folder, count, free_port()
        self.number, self.workdir = len(server._pods), folder / "run"
        self.words = [f"--config={TINY}:static", f"--config.data.sources={data}"]
        self.words += ["--config.train.steps=400", f"--coordinator=127.0.0.1:{self.port}"]
        limits = {"init": JOIN, "heartbeat": 30, "shutdown": JOIN} | limits
        self.words += [f"--{name}-timeout={seconds}" for name, seconds in limits.items()]
        self.pids, self.codes, self.ended, self._started = {}, {}, {}, set()
        self._first_second = time.monotonic()

    def start(self, ranks=None, *, words=(), fault="", workdir=None, cwd=".", **env):
        """Starts these ranks, all by default. words: further flags, which come last."""
        for rank in range(self.count) if ranks is None else ranks:
            arguments = [f"--process-id={rank}", f"--process-count={self.count}"]
            arguments += [f"--workdir={workdir or self.workdir}", *self.words, *words]
            self._started.add(rank)
            self._server.order(
                rank=f"{self.number}/{rank}",
                fault=fault,
                cwd=str(cwd),
                words=["train", *map(str, arguments)],
                env=env,
                stdout=str(self.folder / f"{rank}.out"),
                stderr=str(self.folder / f"{rank}.err"),
            )

    def note(self, kind, rank, value):
        if kind == "pid":
            self.pids[rank] = value
        else:
            self.codes[rank], self.ended[rank] = value, self.now()

    def now(self):
        return time.monotonic() - self._first_second

    def wait(self, seconds, ranks=None):
        """The exit codes by rank, once all have ended; fails after some seconds."""
        ranks = sorted(self._started if ranks is None else ranks)
        self.wait_until(lambda: all(rank in self.codes for rank in ranks), seconds)
        return [self.codes[rank] for rank in ranks]

    def wait_until(self, is_true, seconds):
        end = time.monotonic() + seconds
        while not is_true():
            assert time.monotonic() < end, self.report()
            time.sleep(0.02)

    def wait_for_line(self, rank, phrase, seconds):
        self.wait_until(lambda: phrase in self.read(rank, "out") + self.read(rank, "err"), seconds)

    def are_agreed(self):
        """Whether all processes have come to the training that a fault replaces."""
        return all("all agree" in self.read(rank, "out") for rank in self._started)

    def signal(self, rank, number=signal.SIGKILL):
        """Sends a signal; returns the second."""
        os.kill(self.pids[rank], number)
        return self.now()

    def kill(self):
        for rank in self._started - self.codes.keys():
            if rank in self.pids:
                os.kill(self.pids[rank], signal.SIGKILL)

    def read(self, rank, stream):
        path = self.folder / f"{rank}.{stream}"
        return path.read_text() if path.exists() else ""

    def errors(self, rank):
        """The lines of stderr but those of progress and notes."""
        lines = self.read(rank, "err").splitlines()
        return [line for line in lines if not re.search(r": \d+ s( \(|$)|^(note|warning): ", line)]

    def check_sentence(self, *phrases, ranks=None):
        """Each process printed one line, the same one, with these phrases, and no C++ frames."""
        lines = [self.errors(rank) for rank in sorted(self._started if ranks is None else ranks)]
        assert all(len(errors) == 1 for errors in lines), self.report()
        assert len({errors[0] for errors in lines}) == 1, self.report()
        sentence = lines[0][0]
        assert sentence.startswith("error: "), self.report()
        assert all(phrase in sentence for phrase in phrases), self.report()

    def report(self):
        """All that the processes printed, for a failed assertion."""
        parts = [f"codes {self.codes}, ended {self.ended}"]
        for rank in sorted(self._started):
            for stream in ("err", "out"):
                parts += [f"[{rank}] {line}" for line in self.read(rank, stream).splitlines()]
        return "\n".join(parts)
