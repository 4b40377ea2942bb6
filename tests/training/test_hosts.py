"""What the hosts of a run say of themselves, and what process 0 makes of it."""

from types import SimpleNamespace

import pytest

from tttjax.training import hosts as hosts_module
from tttjax.training.hosts import Host, HostFigures, Hosts, describe_hosts, describe_stragglers
from tttjax.training.start_account import StartAccount


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def figures(waiting, other=0.0, age=1.0, seconds=10.0):
    return HostFigures(9, seconds, 0.3, waiting, other, waiting, 100, 200, "process", age)


def received(*said):
    """A pod in whose process 0 each process has said these figures."""
    values = [({} if f is None else {**vars(f), "beat": 1}, f.age if f else 1.0) for f in said]
    return SimpleNamespace(heartbeats=SimpleNamespace(received=lambda: values))


def make_hosts(*said, clock=None):
    hosts = Hosts(StartAccount(), clock or Clock())
    hosts._pod = received(*said)
    hosts.hosts = [Host(f"node-{i}", "1 x cpu", "1", "2") for i in range(len(said))]
    return hosts


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ((None, None), (0.1, "")),
        ((figures(0.1), figures(0.99)), (0.99, " (host 1)")),
        ((figures(0.1), figures(0.2), figures(0.9)), (0.9, " (host 2)")),
        ((figures(0.1), figures(0.05)), (0.1, "")),
        ((figures(0.1), figures(0.9, age=34)), (0.9, " (host 1, 34 s ago)")),
    ],
)
def test_the_line_names_the_host_with_worst_input(said, shown):
    assert make_hosts(*said).worst_input(0.1) == shown


def test_a_process_alone_shows_its_own_input():
    assert Hosts(StartAccount()).worst_input(0.4) == (0.4, "")


def test_figures_are_shares_of_the_last_steps():
    clock = Clock()
    account = StartAccount(clock=clock)
    hosts = Hosts(account, clock)
    assert hosts.figures() == [None]
    account.begin_steps(100)
    clock.now += 1000  # the first step
    assert hosts.figures() == [None]
    account.finish(101)
    assert hosts.figures() == [None]
    for step in range(102, 131):
        with account.phase("input"):
            clock.now += 3 if step > 115 else 0
        with account.phase("device"):
            clock.now += 1
        account.finish(step)
        (own,) = hosts.figures()
        if step == 110:
            assert (own.step, own.step_seconds, own.input, own.other) == (110, 1, 0, 0)
    assert (own.step_seconds, own.input) == (4, 0.75)  # the steps before have left the window
    assert own.memory_bytes > 1e6


def test_figures_of_long_steps_hold_two_of_them():
    clock = Clock()
    account = StartAccount(clock=clock)
    hosts = Hosts(account, clock)
    account.begin_steps(0)
    for step in range(1, 5):
        for _ in range(50):
            with account.phase("device"):
                clock.now += 2
            own = hosts.own_figures()
        account.finish(step)
    assert own["step_seconds"] == pytest.approx(100, rel=0.5)


def test_a_straggler_is_named_once_in_a_while():
    clock = Clock()
    hosts = make_hosts(figures(0.01), figures(0.02), figures(0.1, 0.5), figures(0.02), clock=clock)
    (line,) = hosts.stragglers()
    assert line.startswith("host 2 (node-2) holds up the others: of its time, 10% is waiting")
    for seconds in (1, hosts_module.PAUSE_SECONDS - 2):
        clock.now += seconds
        assert hosts.stragglers() == []
    clock.now += hosts_module.WINDOW_SECONDS
    assert len(hosts.stragglers()) == 1


@pytest.mark.parametrize(
    "said",
    [
        {0: figures(0.9)},
        {0: figures(0.9), 1: figures(0.9)},  # input is slow everywhere
        {0: figures(0.0), 1: figures(0.15)},
    ],
)
def test_equal_hosts_have_no_straggler(said):
    assert describe_stragglers(said) == {}


@pytest.mark.parametrize("figure", [figures(0.9, age=60), figures(0.9, seconds=1), None])
def test_old_and_short_figures_name_no_straggler(figure):
    assert make_hosts(figures(0.0), figure).stragglers() == []


def test_many_hosts_are_described_in_groups():
    def hosts(count, devices):
        return [Host(f"node-{i}", devices, "1.0", "0.12") for i in range(count)]

    assert describe_hosts(hosts(2, "4 x H100")) == [
        "host 0 (node-0): 4 x H100; tttjax 1.0, jax 0.12",
        "host 1 (node-1): 4 x H100; tttjax 1.0, jax 0.12",
    ]
    assert describe_hosts([*hosts(256, "4 x H100"), *hosts(1, "3 x H100")]) == [
        "hosts 0-255 (node-0 to node-255): 4 x H100 each; tttjax 1.0, jax 0.12",
        "host 256 (node-0): 3 x H100; tttjax 1.0, jax 0.12",
    ]
