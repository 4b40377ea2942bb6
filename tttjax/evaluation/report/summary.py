"""Summary sentences of a report; within two standard errors a difference is not significant."""

from collections.abc import Iterator, Sequence

from tttjax.evaluation.plots import find_e2e
from tttjax.evaluation.report.results import Report, SystemResult, systems_at
from tttjax.evaluation.statistics import Estimate, change_with_position, loss
from tttjax.evaluation.tables import describe_difference, format_difference, join_words


def summarise(report: Report) -> tuple[str, ...]:
    """The lowest loss, differences from the baseline, trends beyond the window, state size."""
    best = (_best(report, length) for length in report.lengths)
    standing = (_difference_from_baseline(report, system) for system in report.others())
    costs = (_state_cost(report, system) for system in report.others())
    sentences = [*best, *standing, *_beyond_the_window(report), *costs]
    return tuple(filter(None, sentences))


def highlights(report: Report) -> tuple[str, ...]:
    """The three most important sentences of the summary.

    The lowest loss at the longest context, and difference and state size of the main system: the
    one that TTT-E2E's colour is for, else the best other than the baseline.
    """
    others = {system.label: system for system in report.others()}
    candidates = [_best(report, report.longest)]
    if others:
        label = find_e2e(others, [s.label for s in report.others() if s.mode == "on"])
        losses = {
            name: float(value.mean)
            for name, system in others.items()
            if (value := report.loss(system, report.longest))
        }
        main = others[label or min(losses, key=losses.__getitem__, default=next(iter(others)))]
        candidates += [_difference_from_baseline(report, main), _state_cost(report, main)]
    sentences = dict.fromkeys(filter(None, [*candidates, *report.summary[::-1]]))
    return tuple(sentences)[:3]


def _best(report: Report, length: int) -> str:
    systems = systems_at(report, length)
    if len(systems) < 2:
        return ""
    values = {system.label: loss(system.sums[length]) for system in systems}
    ranked = sorted(systems, key=lambda system: values[system.label].mean)
    first, others = ranked[0], ranked[1:]
    against = [(other, report.difference(other, length, first)) for other in others]
    same = [(other.label, value) for other, value in against if value and value.is_insignificant()]
    lowest = format_difference(values[first.label])
    text = f"At {length:,} tokens {first.label} has the lowest loss, {lowest} nats per token; "
    if same:
        return text + f"not significantly different from it: {_with_differences(same)}."
    second, value = against[0]
    assert value is not None  # both were evaluated at this length
    return text + f"the next, {second.label}, is {describe_difference(value)}."


def _with_differences(values: Sequence[tuple[str, Estimate]]) -> str:
    """`a (+0.012 ± 0.003) and b (+0.034 ± 0.003)`."""
    return join_words([f"{name} ({format_difference(v, signed=True)})" for name, v in values])


def _difference_from_baseline(report: Report, system: SystemResult) -> str:
    """Difference from the baseline at every length, and its change with the context."""
    values = [(length, report.difference(system, length)) for length in report.lengths]
    known = [(length, value) for length, value in values if value is not None]
    if not known:
        return ""
    groups: dict[str, list[tuple[int, Estimate]]] = {}
    for length, value in known:
        none, better = value.is_insignificant(), value.mean < 0
        words = "not significantly different" if none else "lower" if better else "higher"
        groups.setdefault(words, []).append((length, value))
    parts = []
    for words, differences in groups.items():
        length, value = differences[-1]
        at = f"at {length:,}" if len(differences) > 1 else "there"
        lengths = join_words([f"{n:,}" for n, _ in differences])
        amount = format_difference(value, signed=True)
        parts.append(f"{words} at {lengths} tokens ({amount} {at})")
    how = " (with TTT)" if system.mode == "on" else ""
    return (
        f"The loss of {system.label}{how} against that of {report.baseline.label} is "
        f"{', '.join(parts)}{_scaling(report, system)}."
    )


def _scaling(report: Report, system: SystemResult) -> str:
    value = report.change(system)
    if value is None:
        return ""
    short, long = min(report.lengths), report.longest
    between = f"from {short:,} to {long:,} tokens"
    amount = format_difference(value, signed=True)
    if value.is_insignificant():
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
    falls = [(name, v) for name, v in changes if not v.is_insignificant() and v.mean < 0]
    rises = [(name, v) for name, v in changes if not v.is_insignificant() and v.mean > 0]
    same = [(name, v) for name, v in changes if v.is_insignificant()]
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


def _state_cost(report: Report, system: SystemResult) -> str:
    """State size of a system with TTT, as a multiple of the baseline's."""
    length, base = report.longest, report.baseline
    mine, theirs = system.state_bytes.get(length), base.state_bytes.get(length)
    if not (system.learns and mine and theirs):
        return ""
    times = f"{mine / theirs:.3g} times as much state"
    return f"At {length:,} tokens {system.label} needs {times} as {base.label}."
