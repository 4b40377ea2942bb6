"""What the numbers say, in sentences. Within two standard errors of zero, a difference is none."""

from collections.abc import Iterator, Sequence

from tttjax.evaluation.report.results import Report, SystemResult, systems_at
from tttjax.evaluation.report.statistics import Value, change_with_position
from tttjax.evaluation.report.tables import change
from tttjax.evaluation.tables import is_none, side, size


def summarise(report: Report) -> tuple[str, ...]:
    """Who is best, how each stands to the baseline, and whose loss falls beyond the window."""
    best = (_best(report, length) for length in report.lengths)
    standing = (_standing(report, system) for system in report.others())
    sentences = [*best, *standing, *_beyond_the_window(report), *_price(report)]
    return tuple(filter(None, sentences))


def _best(report: Report, length: int) -> str:
    found = systems_at(report, length)
    if len(found) < 2:
        return ""
    values = {system.label: report.loss(system, length) for system in found}
    ranked = sorted(found, key=lambda system: values[system.label].mean)  # type: ignore[union-attr]
    first, rest = ranked[0], ranked[1:]
    against = [(other, report.difference(other, length, first)) for other in rest]
    same = [(other.label, value) for other, value in against if value and is_none(value.estimate)]
    loss = size(values[first.label].estimate)  # type: ignore[union-attr]
    text = f"At {length:,} tokens {first.label} has the lowest loss, {loss} nats per token; "
    if same:
        names = several([f"{name} ({size(v.estimate, signed=True)})" for name, v in same])
        return text + f"not significantly different from it: {names}."
    second, value = against[0]
    assert value is not None  # both were read at this length
    return text + f"the next, {second.label}, is {side(value.estimate)}."


def _standing(report: Report, system: SystemResult) -> str:
    """How it stands to the baseline at every length, and whether that changes with the context."""
    values = [(length, report.difference(system, length)) for length in report.lengths]
    known = [(length, value) for length, value in values if value is not None]
    if not known:
        return ""
    groups: dict[str, list[tuple[int, Value]]] = {}
    for length, value in known:
        none, better = is_none(value.estimate), value.mean < 0
        words = "not significantly different" if none else "lower" if better else "higher"
        groups.setdefault(words, []).append((length, value))
    parts = []
    for words, found in groups.items():
        length, value = found[-1]
        at = f"at {length:,}" if len(found) > 1 else "there"
        lengths = several([f"{n:,}" for n, _ in found])
        amount = size(value.estimate, signed=True)
        parts.append(f"{words} at {lengths} tokens ({amount} {at})")
    how = " (learning while it reads)" if system.mode == "on" else ""
    return (
        f"The loss of {system.label}{how} against that of {report.baseline.label} is "
        f"{', '.join(parts)}{_scaling(report, system)}."
    )


def _scaling(report: Report, system: SystemResult) -> str:
    found = change(report, system)
    if found is None:
        return ""
    short, long = min(report.lengths), report.longest
    between = f"from {short:,} to {long:,} tokens"
    amount = size(found.estimate, signed=True)
    if is_none(found.estimate):
        return f"; {between} the difference does not change significantly ({amount})"
    direction = "in its favour" if found.mean < 0 else "against it"
    return f"; {between} the difference moves {direction} ({amount})"


def _beyond_the_window(report: Report) -> Iterator[str]:
    """Which losses are lower in the later half of what lies beyond the window."""
    first, stop = report.window, report.longest
    if stop - first < 2:
        return
    middle = (first + stop) // 2
    early, late = (first, middle), (middle, stop)
    changes = [
        (s.label, change_with_position(s.readings[stop], early, late))
        for s in systems_at(report, stop)
    ]
    falls = [(name, v) for name, v in changes if not is_none(v.estimate) and v.mean < 0]
    rises = [(name, v) for name, v in changes if not is_none(v.estimate) and v.mean > 0]
    same = [(name, v) for name, v in changes if is_none(v.estimate)]
    parts = [
        f"{words} {several([f'{name} ({size(v.estimate, signed=True)})' for name, v in group])}"
        for words, group in (
            ("it keeps falling for", falls),
            ("it rises for", rises),
            ("it does not change significantly for", same),
        )
        if group
    ]
    yield (
        f"Beyond the window of {first:,} tokens, comparing the loss on tokens {middle + 1:,}-"
        f"{stop:,} with that on {first + 1:,}-{middle:,}: {'; '.join(parts)}. These are different "
        "tokens, so what all systems have in common may be due to the text."
    )


def _price(report: Report) -> Iterator[str]:
    """State of the systems that learn, as a multiple of the baseline's."""
    length = report.longest
    base = report.baseline
    for system in report.others():
        mine, theirs = system.state_bytes.get(length), base.state_bytes.get(length)
        if system.learns and mine and theirs:
            times = f"{mine / theirs:.3g} times as much state"
            yield f"At {length:,} tokens {system.label} takes {times} as {base.label}."


def several(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
