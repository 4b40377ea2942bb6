"""Formats a plan as text, and several plans as one Markdown table."""

from collections.abc import Callable, Sequence
from typing import Any

from tttjax.planning.bounds import DAY, Bounds
from tttjax.planning.kernels import LIMITS, by_operation
from tttjax.planning.make import Plan

GiB = 2**30
LISTED = 25  # operations in the table of kernels


def show(plan: Plan, kernels: bool = False) -> str:
    """The plan as lines of less than 100 columns, followed by its proposal.

    kernels: also a table of the operations that take longest on a GPU.
    """
    lines = [
        *_head(plan),
        *_memory(plan),
        *_flops(plan),
        *_traffic(plan),
        *_launches(plan),
        *_bounds(plan),
        *(_kernels(plan) if kernels else []),
        *_times(plan),
        *(f"note: {note}" for note in plan.notes),
    ]
    if plan.proposal:
        lines += ["", f"fits with {_changes(plan.proposal)}:", "", show(plan.proposal, kernels)]
    elif plan.fits is False and not plan.changes:
        lines.append(
            "No recipe fits this pod, even with gradient accumulation, recomputation or another "
            "mesh; use more devices, or devices with more memory."
        )
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """One clause for a plan that does not fit: how much is needed, and which change would fit."""
    change = "no change of accumulation, recomputation or mesh makes it fit"
    if plan.proposal:
        change = f"it would with {_changes(plan.proposal)}"
    return (
        f"{plan.name} does not fit {plan.topology}: it needs {_gib(plan.needed)} GiB per device of "
        f"{_gib(plan.capacity)}; {change}"
    )


def _changes(proposal: Plan) -> str:
    return " ".join(f"--config.{k}={v}" for k, v in proposal.changes.items())


def _head(plan: Plan) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    recipe = plan.recipe
    steps = recipe["accum_steps"]
    accumulation = f" in {steps} accumulation steps" if steps > 1 else ""
    verdict = {True: "fits", False: "DOES NOT FIT", None: "memory capacity unknown"}[plan.fits]
    of = f" of {_gib(plan.capacity)}" if plan.capacity else ""
    return [
        f"{plan.name} on {plan.topology}",
        f"{plan.parameters / 1e6:,.1f}M parameters; {recipe['batch_size']} sequences of "
        f"{recipe['seq_len']:,} tokens per step{accumulation}; mesh {mesh}",
        f"{verdict}: {_gib(plan.needed)}{of} GiB per device",
        *filter(None, (plan.attention,)),
    ]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    rows = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "batch": memory.batch,
        "fast-weight trajectory": memory.trajectory,
        "activations saved": memory.activations,
        "temporary": memory.temporary,
        "program and outputs": memory.program,
        "total": memory.total,
    }
    return ["", "GiB per device", *_table(rows, lambda n: f"{n / GiB:12.3f}")]


def _flops(plan: Plan) -> list[str]:
    flops = plan.flops
    rows = {
        "prefix": flops.prefix,
        "suffix forward": flops.suffix,
        "inner backward": flops.inner_backward,
        "outer": flops.outer,
        "model FLOPs": flops.total,
        "program": plan.program_flops,
    }
    lines = _table(rows, lambda n: f"{n / 1e12:12.3f}  {n / flops.total:6.1%}")
    return ["", "TFLOP per step, all devices", *lines]


def _traffic(plan: Plan) -> list[str]:
    if not plan.traffic:
        return ["", "no collectives"]
    lines = [
        f"  {t.kind:22}{t.bytes / GiB:12.3f}  {t.sent / GiB:12.3f}  {t.count:6,}"
        for t in plan.traffic
    ]
    return ["", f"{'collectives per step':24}{'GiB':>12}  {'GiB sent':>12}  {'count':>6}", *lines]


def _launches(plan: Plan) -> list[str]:
    if not plan.launches:
        return []
    rows = {**plan.launches, "total": sum(plan.launches.values())}
    width = max(map(len, rows))
    lines = [f"  {name:{width}}  {number:12,}" for name, number in rows.items()]
    return ["", "launches per step on each GPU", *lines]


def _bounds(plan: Plan) -> list[str]:
    if not plan.bounds or not plan.cost:
        return []
    bounds, cost = plan.bounds, plan.cost
    max_tokens_per_day = plan.recipe["batch_size"] * plan.recipe["seq_len"] / bounds.step * DAY
    min_seconds = plan.recipe["steps"] * bounds.step
    rows = {name: getattr(bounds, name) for name in ("compute", "memory", "interconnect")}
    return [
        "",
        "lower bounds on seconds per step",
        *_table(rows, lambda n: f"{n:12.4f}"),
        f"  MFU at most {bounds.mfu:.1%}, limited by {bounds.limit}; at most "
        f"{_short(max_tokens_per_day / 1e9)}B tokens per day, at least {duration(min_seconds)}",
        *_serial(plan, bounds),
        "",
        f"at {cost.mfu:.0%} MFU: {_short(cost.step_seconds)} s per step, "
        f"{_short(cost.tokens_per_day / 1e9)}B tokens per day; {plan.recipe['steps']:,} steps take "
        f"{duration(cost.days * DAY)}, {_short(cost.chip_hours)} chip-hours",
    ]


def _serial(plan: Plan, bounds: Bounds) -> list[str]:
    if not plan.kernels:
        return []
    mfu = bounds.mfu * bounds.step / plan.kernel_seconds
    return [
        f"  every kernel at its own limit, one after the other: {plan.kernel_seconds:.4f} s, "
        f"MFU {mfu:.1%}"
    ]


def _kernels(plan: Plan) -> list[str]:
    """The operations that take longest, and seconds by limit."""
    if not plan.kernels:
        return []
    total = plan.kernel_seconds
    lines = [
        "",
        f"{'kernels, on one GPU':40}{'launches':>10}{'seconds':>10}{'share':>7}  "
        f"{'limit':12}{'TFLOP':>9}{'GB':>9}",
    ]
    for group in by_operation(plan.kernels)[:LISTED]:
        kernels = [time.kernel for time in group]
        seconds = sum(time.seconds for time in group)
        limits = {name: sum(t.seconds for t in group if t.limit == name) for name in LIMITS}
        name = f"{kernels[0].operation or '?'}, {kernels[0].kind.strip('_')}"
        lines.append(
            f"  {name[:38]:38}{sum(k.times for k in kernels):10,}{seconds:10.4f}"
            f"{seconds / total:7.1%}  {max(limits, key=limits.__getitem__):12}"
            f"{sum(k.flops for k in kernels) / 1e12:9.2f}{sum(k.bytes for k in kernels) / 1e9:9.1f}"
        )
    for limit in LIMITS:
        seconds = sum(time.seconds for time in plan.kernels if time.limit == limit)
        lines.append(
            f"  {f'all limited by {limit}':38}{'':10}{seconds:10.4f}{seconds / total:7.1%}"
        )
    return lines


def _times(plan: Plan) -> list[str]:
    return [
        "",
        f"traced in {plan.trace_seconds:.0f} s, compiled in {plan.compile_seconds:.0f} s",
    ]


def _table(rows: dict[str, float], fmt: Callable[[float], str]) -> list[str]:
    return [f"  {name:22}{fmt(value)}" for name, value in rows.items()]


def _short(number: float) -> str:
    """Three significant digits, or all digits of the integer part."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """`42 min`, `3 h 20 min`, `12.3 days`: hours and minutes below two days."""
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
    *("program / model FLOPs", "max. MFU", "MFU of kernels in turn", "launches"),
    *("B tokens / day", "time", "chip-hours", "compiled, s"),
)


def markdown(plans: Sequence[dict[str, Any]]) -> str:
    """A table of plans from `Plan.to_dict`, each followed by its proposal."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for plan in plans:
        rows.append(_row(plan))
        if plan["proposal"]:
            rows.append(_row(plan["proposal"]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(plan: dict[str, Any]) -> tuple[str, ...]:
    memory, bounds, cost = plan["memory"], plan["bounds"], plan["cost"]
    serial = bounds and plan["kernel_seconds"]  # of GPUs
    working = memory["trajectory"] + memory["activations"] + memory["temporary"]
    tokens = plan["recipe"]["batch_size"] * plan["recipe"]["seq_len"]
    changes = "".join(f"; {name}={value}" for name, value in plan["changes"].items())
    verdict = {True: "yes", False: "no", None: "?"}[plan["fits"]]
    return (
        f"{plan['name']}{changes}",
        plan["topology"],
        " x ".join(str(size) for size in plan["mesh"].values()),
        verdict,
        f"{plan['needed'] / GiB:.2f}",
        f"{working / GiB:.2f}",
        f"{plan['flops']['total'] / tokens / 1e9:.2f}",
        f"{plan['program_flops'] / plan['flops']['total']:.2f}",
        f"{bounds['mfu']:.0%}" if bounds else "?",
        f"{bounds['mfu'] * bounds['step'] / plan['kernel_seconds']:.0%}" if serial else "",
        f"{sum(plan['launches'].values()):,}" if serial else "",
        _short(cost["tokens_per_day"] / 1e9) if cost else "?",
        duration(cost["days"] * DAY) if cost else "?",
        _short(cost["chip_hours"]) if cost else "?",
        f"{plan['compile_seconds']:.0f}",
    )
