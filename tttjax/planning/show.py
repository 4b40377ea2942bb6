"""A plan as text for people, and several as one Markdown table."""

from collections.abc import Sequence
from typing import Any

from tttjax.planning.bounds import DAY
from tttjax.planning.make import Plan

GiB = 2**30


def show(plan: Plan) -> str:
    """The plan in lines of less than a hundred columns, the proposal after it."""
    lines = [
        *_head(plan),
        *_memory(plan),
        *_flops(plan),
        *_traffic(plan),
        *_bounds(plan),
        *_times(plan),
        *(f"note: {note}" for note in plan.notes),
    ]
    if plan.proposal:
        changes = " ".join(f"--config.{k}={v}" for k, v in plan.proposal.changes.items())
        lines += ["", f"fits with {changes}:", "", show(plan.proposal)]
    elif plan.fits is False and not plan.changes:
        lines.append(
            "No recipe was found that fits here with more accumulation, recomputation or another "
            "mesh; take more chips, or chips with more memory."
        )
    return "\n".join(lines)


def _head(plan: Plan) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    recipe = plan.recipe
    parts = f" in {recipe['accum_steps']} parts" if recipe["accum_steps"] > 1 else ""
    verdict = {True: "fits", False: "DOES NOT FIT", None: "nothing says whether it fits"}[plan.fits]
    of = f" of {_gib(plan.capacity)}" if plan.capacity else ""
    return [
        f"{plan.name} on {plan.topology}",
        f"{plan.parameters / 1e6:,.1f}M parameters; {recipe['batch_size']} sequences of "
        f"{recipe['seq_len']:,} tokens a step{parts}; mesh {mesh}",
        f"{verdict}: {_gib(plan.needed)}{of} GiB on a device"
        + (" (estimate)" if plan.memory.source == "estimate" else ""),
        *filter(None, (plan.attention,)),
    ]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    rows = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "fast-weight trajectory": memory.trajectory,
        "activations kept": memory.activations,
        "temporary": memory.temporary,
        "program and results": memory.program,
        "together": memory.total,
    }
    return ["", f"GiB on a device ({memory.source})", *_table(rows, lambda n: f"{n / GiB:12.3f}")]


def _flops(plan: Plan) -> list[str]:
    flops = plan.flops
    rows = {
        "prefix": flops.prefix,
        "suffix forward": flops.suffix,
        "inner backward": flops.inner_backward,
        "outer": flops.outer,
        "the method": flops.total,
        "the program": plan.program_flops,
    }
    lines = _table(rows, lambda n: f"{n / 1e12:12.3f}  {n / flops.total:6.1%}")
    return ["", "TFLOP of a step, all devices", *lines]


def _traffic(plan: Plan) -> list[str]:
    if not plan.traffic:
        return ["", "no collectives"]
    lines = [
        f"  {t.kind:22}{t.bytes / GiB:12.3f}  {t.sent / GiB:12.3f}  {t.count:6,}"
        for t in plan.traffic
    ]
    return ["", f"{'collectives of a step':24}{'GiB':>12}  {'GiB sent':>12}  {'times':>6}", *lines]


def _bounds(plan: Plan) -> list[str]:
    if not plan.bounds or not plan.cost:
        return []
    bounds, cost = plan.bounds, plan.cost
    fastest = plan.recipe["batch_size"] * plan.recipe["seq_len"] / bounds.step * DAY
    least = plan.recipe["steps"] * bounds.step
    rows = {name: getattr(bounds, name) for name in ("compute", "memory", "interconnect")}
    return [
        "",
        "seconds of a step at the least",
        *_table(rows, lambda n: f"{n:12.4f}"),
        f"  bound: MFU at most {bounds.mfu:.1%}, limited by {bounds.limit}; at most "
        f"{_short(fastest / 1e9)}B tokens a day, at least {duration(least)}",
        "",
        f"at {cost.mfu:.0%} MFU: {_short(cost.step_seconds)} s a step, "
        f"{_short(cost.tokens_per_day / 1e9)}B tokens a day; {plan.recipe['steps']:,} steps are "
        f"{duration(cost.days * DAY)}, {_short(cost.chip_hours)} chip-hours",
    ]


def _times(plan: Plan) -> list[str]:
    compiling = "" if plan.compile_seconds is None else f", compiled in {plan.compile_seconds:.0f}"
    return ["", f"traced in {plan.trace_seconds:.0f} s{compiling}{' s' * bool(compiling)}"]


def _table(rows: dict[str, float], form: Any) -> list[str]:
    return [f"  {name:22}{form(value)}" for name, value in rows.items()]


def _short(number: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """`42 min`, `3 h 20 min`, `12.3 days`: hours and minutes up to two days."""
    minutes = round(seconds / 60)
    if minutes >= 2 * 24 * 60:
        return f"{_short(seconds / DAY)} days"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{_short(seconds)} s"


def _gib(number: float) -> str:
    return f"{number / GiB:.2f}"


COLUMNS = (
    *("recipe", "pod", "mesh", "fits", "GiB", "of which working", "GFLOP / token"),
    *("program / method", "MFU at most", "B tokens / day", "time", "chip-hours", "compiled, s"),
)


def markdown(plans: Sequence[dict[str, Any]]) -> str:
    """A table of plans as `Plan.to_dict` gives them, the proposal instead of what did not fit."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for plan in plans:
        rows.append(_row(plan))
        if plan["proposal"]:
            rows.append(_row(plan["proposal"]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(plan: dict[str, Any]) -> tuple[str, ...]:
    memory, bounds, cost = plan["memory"], plan["bounds"], plan["cost"]
    working = memory["trajectory"] + memory["activations"] + memory["temporary"]
    tokens = plan["recipe"]["batch_size"] * plan["recipe"]["seq_len"]
    changes = "".join(f"; {name}={value}" for name, value in plan["changes"].items())
    verdict = {True: "yes", False: "no", None: "?"}[plan["fits"]]
    return (
        f"{plan['name']}{changes}",
        plan["topology"],
        " x ".join(str(size) for size in plan["mesh"].values()),
        verdict + (" (estimate)" if memory["source"] == "estimate" else ""),
        f"{plan['needed'] / GiB:.2f}",
        f"{working / GiB:.2f}",
        f"{plan['flops']['total'] / tokens / 1e9:.2f}",
        f"{plan['program_flops'] / plan['flops']['total']:.2f}",
        f"{bounds['mfu']:.0%}" if bounds else "?",
        _short(cost["tokens_per_day"] / 1e9) if cost else "?",
        duration(cost["days"] * DAY) if cost else "?",
        _short(cost["chip_hours"]) if cost else "?",
        "" if plan["compile_seconds"] is None else f"{plan['compile_seconds']:.0f}",
    )
