"""Payloads and messages of heartbeats, by a store in memory."""

from types import SimpleNamespace

import pytest

from tttjax.errors import UserError
from tttjax.parallel import heartbeats
from tttjax.parallel.agreement import gather
from tttjax.parallel.heartbeats import Heartbeats


class MemoryStore:
    """What `store.Store` does, for one of the processes that share `keys`."""

    def __init__(self, keys, process_id, process_count=3):
        self.keys, self.process_id, self.process_count = keys, process_id, process_count

    def put(self, key, value):
        self.keys[key] = value

    def peek(self, key):
        return self.keys.get(key)

    def get(self, key, seconds):
        return self.keys.get(key)

    def items(self, folder):
        return {k.partition("/")[2]: v for k, v in self.keys.items() if k.startswith(f"{folder}/")}


@pytest.fixture
def beats():
    """Of three processes."""
    keys = {}
    return [Heartbeats(MemoryStore(keys, process)) for process in range(3)]


def test_the_first_process_receives_payloads_with_their_age(beats, monkeypatch):
    now = beats[0].answered
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: now)
    beats[1].payload = lambda: {"input": 0.5}
    for beat in (beats[1], beats[2], beats[0]):
        beat.beat()
    now += 7
    beats[2].beat()
    beats[0].beat()
    assert beats[0].received() == [
        ({"beat": 2}, 0),
        ({"beat": 1, "input": 0.5}, 7),
        ({"beat": 2}, 0),
    ]
    assert [values for values, _ in beats[1].received()] == [{}, {}, {}]


def test_a_process_that_collects_receives_them_too(beats):
    beats[2].collects = True
    for beat in beats:
        beat.beat()
    assert [values for values, _ in beats[2].received()] == [{"beat": 1}] * 3


def test_a_message_reaches_all_with_their_next_beat(beats):
    beats[0].broadcast("120")
    assert [beat.message for beat in beats] == ["", "", ""]
    for beat in beats:
        beat.beat()
    assert [beat.message for beat in beats] == ["120", "120", "120"]


def test_values_are_gathered_where_they_are_wanted():
    keys = {}
    pods = [
        SimpleNamespace(
            store=MemoryStore(keys, process),
            limits=SimpleNamespace(init=7),
            name=lambda process: f"process {process} on node",
        )
        for process in range(3)
    ]
    assert gather(pods[2], "devices", "c", receives=False) == []
    with pytest.raises(UserError, match="process 1 on node has no devices after 7 s"):
        gather(pods[0], "devices", "a", receives=True)
    gather(pods[1], "devices", "b", receives=False)
    assert gather(pods[0], "devices", "a", receives=True) == ["a", "b", "c"]
