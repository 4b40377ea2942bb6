"""Summary sentences of a report; within two standard errors a difference is not significant."""

from collections.abc import Iterator, Sequence

from tttjax.evaluation.report.results import Report, SystemResult, systems_at
from tttjax.evaluation.report.statistics import Value, change_with_position
from tttjax.evaluation.report.tables import change
from tttjax.evaluation.tables import describe_difference, format_difference, is_insignificant


def summarise(report: Report) -> tuple[str, ...]:
    """The lowest loss, differences from the baseline, trends beyond the window, state size."""
    best = (_best(report, length) for length in report.lengths)
    standing = (_difference_from_baseline(report, system) for system in report.others())
    sentences = [*best, *standing, *_beyond_the_window(report), *_state_costs(report)]
    return tuple(filter(None, sentences))


def _best(report: Report, length: int) -> str:
    systems = systems_at(report, length)
    if len(systems) < 2:
        return ""
    values = {system.label: report.loss(system, length) for system in systems}
    ranked = sorted(systems, key=lambda s: values[s.label].mean)  # type: ignore[union-attr]
    first, others = ranked[0], ranked[1:]
    against = [(other, report.difference(other, length, first)) for other in others]
    same = [
        (other.label, value)
        for other, value in against
        if value and is_insignificant(value.estimate)
    ]
    loss = format_difference(values[first.label].estimate)  # type: ignore[union-attr]
    text = f"At {length:,} tokens {first.label} has the lowest loss, {loss} nats per token; "
    if same:
        return text + f"not significantly different from it: {_with_differences(same)}."
    second, value = against[0]
    assert value is not None  # both were evaluated at this length
    return text + f"the next, {second.label}, is {describe_difference(value.estimate)}."


def _with_differences(values: Sequence[tuple[str, Value]]) -> str:
    """`a (+0.012 ± 0.003) and b (+0.034 ± 0.003)`."""
    return several([f"{name} ({format_difference(v.estimate, signed=True)})" for name, v in values])


def _difference_from_baseline(report: Report, system: SystemResult) -> str:
    """Difference from the baseline at every length, and its change with the context."""
    values = [(length, report.difference(system, length)) for length in report.lengths]
    known = [(length, value) for length, value in values if value is not None]
    if not known:
        return ""
    groups: dict[str, list[tuple[int, Value]]] = {}
    for length, value in known:
        none, better = is_insignificant(value.estimate), value.mean < 0
        words = "not significantly different" if none else "lower" if better else "higher"
        groups.setdefault(words, []).append((length, value))
    parts = []
    for words, differences in groups.items():
        length, value = differences[-1]
        at = f"at {length:,}" if len(differences) > 1 else "there"
        lengths = several([f"{n:,}" for n, _ in differences])
        amount = format_difference(value.estimate, signed=True)
        parts.append(f"{words} at {lengths} tokens ({amount} {at})")
    how = " (with TTT)" if system.mode == "on" else ""
    return (
        f"The loss of {system.label}{how} against that of {report.baseline.label} is "
        f"{', '.join(parts)}{_scaling(report, system)}."
    )


def _scaling(report: Report, system: SystemResult) -> str:
    value = change(report, system)
    if value is None:
        return ""
    short, long = min(report.lengths), report.longest
    between = f"from {short:,} to {long:,} tokens"
    amount = format_difference(value.estimate, signed=True)
    if is_insignificant(value.estimate):
        return f"; {between} the difference does not change significantly ({amount})"
    direction = "in its favour" if value.mean < 0 else "against it"
    return f"; {between} the difference moves {direction} ({amount})"


def _beyond_the_window(report: Report) -> Iterator[str]:
    """Change of the losses between the two halves of the positions beyond the window."""
    first, stop = report.window, report.longest
    if stop - first < 2:
        return
    middle = (first + stop) // 2
    first_half, second_half = (first, middle), (middle, stop)
    changes = [
        (s.label, change_with_position(s.sums[stop], first_half, second_half))
        for s in systems_at(report, stop)
    ]
    falls = [(name, v) for name, v in changes if not is_insignificant(v.estimate) and v.mean < 0]
    rises = [(name, v) for name, v in changes if not is_insignificant(v.estimate) and v.mean > 0]
    same = [(name, v) for name, v in changes if is_insignificant(v.estimate)]
    parts = [
        f"{words} {_with_differences(group)}"
        for words, group in (
            ("it keeps falling for", falls),
            ("it rises for", rises),
            ("it does not change significantly for", same),
        )
        if group
    ]
    yield (
        f"Beyond the window of {first:,} tokens, comparing the loss on tokens {middle + 1:,}-"
        f"{stop:,} with that on {first + 1:,}-{middle:,}: {'; '.join(parts)}. The tokens "
        "differ, so a change that all systems share may come from the text."
    )


def _state_costs(report: Report) -> Iterator[str]:
    """State size of systems with TTT, as a multiple of the baseline's."""
    length = report.longest
    base = report.baseline
    for system in report.others():
        mine, theirs = system.state_bytes.get(length), base.state_bytes.get(length)
        if system.learns and mine and theirs:
            times = f"{mine / theirs:.3g} times as much state"
            yield f"At {length:,} tokens {system.label} needs {times} as {base.label}."


def several(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
