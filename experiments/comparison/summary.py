"""The report of a finished comparison, with its sweeps and training budget."""

from typing import TextIO

from experiments.comparison.plan import Plan
from experiments.comparison.scales import (
    DYNAMIC,
    PRETRAINED_AS,
    SYSTEMS,
    parameters,
)
from tttjax.evaluation.report.entries import ReportEntry
from tttjax.evaluation.report.make import make_report
from tttjax.evaluation.report.results import Report
from tttjax.runs.eval_setup import LearningOptions


def write_report(plan: Plan, *, command: str, progress: TextIO | None = None) -> Report:
    """Evaluates all runs on the test documents; writes plan.out/report."""
    scale = plan.scale
    return make_report(
        entries(plan),
        plan.out / "report",
        data=plan.data,
        split="test",
        lengths=[scale.window * n for n in (1, *scale.windows)],
        num_sequences=scale.sequences,
        baseline="full",
        title=f"Nine systems at the scale {plan.scale_name}",
        progress=progress,
        notes=notes(plan, command),
    )


def entries(plan: Plan) -> list[ReportEntry]:
    """Every system at every context and seed, dynamic evaluation before TTT-E2E."""
    rule, rate = best_dynamic(plan)
    learning = LearningOptions(
        inner={"rule": rule}, dynamic_lrs=(rate,), dynamic_layers=plan.scale.suffix_layers
    )

    def entries_of(label: str, system: str, **options) -> list[ReportEntry]:
        return [
            ReportEntry(
                label,
                plan.workdir(plan.run(system, windows, seed)),
                context=plan.scale.window * windows,
                seed=seed,
                **options,
            )
            for windows in (1, *plan.scale.windows)
            for seed in range(plan.scale.seeds)
            if not plan.has_diverged(system, windows, seed)
        ]

    result = [entry for system in SYSTEMS[:-1] for entry in entries_of(system, system)]
    result += entries_of(DYNAMIC, "window", mode="dynamic", learning=learning)
    return result + entries_of(SYSTEMS[-1], SYSTEMS[-1])


def diverged(plan: Plan) -> list[str]:
    """Names of the runs missing from the report because training diverged."""
    return [
        plan.run(system, windows, seed)
        for system in SYSTEMS
        for windows in (1, *plan.scale.windows)
        for seed in range(plan.scale.seeds)
        if plan.has_diverged(system, windows, seed)
    ]


def best_dynamic(plan: Plan) -> tuple[str, float]:
    """The update rule and inner learning rate with the least validation loss."""
    losses = plan.dynamic()
    return min(losses, key=lambda key: losses[key])


def notes(plan: Plan, command: str) -> str:
    """Markdown: the command, the budget, both sweeps."""
    scale = plan.scale
    pretraining = scale.pretrain_steps * scale.tokens_per_step
    extension = scale.extension_steps * scale.tokens_per_step
    missing = diverged(plan)
    shared = ", ".join([*PRETRAINED_AS, *set(PRETRAINED_AS.values())])
    parts = [
        f"Made by `{command}`.",
        f"Each system was pretrained on {pretraining:,} tokens at one window of {scale.window} and "
        f"each of its models extended separately, on {extension:,} tokens more, to "
        f"{', '.join(map(str, scale.windows))} windows. {shared} share one "
        "pretraining: within one window they are the same computation.",
        *([f"Not in the report because they diverged: {', '.join(missing)}."] if missing else []),
        "### Learning rates\n\nValidation loss (nats per token at one window, first seed) by peak "
        "learning rate; the best is bold. While the best was at the edge of the rates tried, the "
        "next rate was tried, up to the ends of the table.\n\n" + _sweeps(plan),
        "### Learning rates of extensions\n\nValidation loss at the longest context, first seed, "
        "by peak learning rate as a share of the best one of pretraining; the best is bold, and is "
        "used at every context and seed. Searched as above.\n\n" + _share_sweeps(plan),
        "### Dynamic evaluation\n\nValidation loss of `window` at the longest context, first seed, "
        f"with the MLPs of its last {scale.suffix_layers} blocks as fast weights, by update rule "
        "and inner learning rate; the best is used at every context and seed. Only these were "
        "tried.\n\n" + _dynamic(plan),
    ]
    return "\n\n".join(parts)


def _sweeps(plan: Plan) -> str:
    rates = plan.scale.rates
    head = ["system", "parameters", *(f"{rate:g}" for rate in rates)]
    rows = []
    for system in SYSTEMS:
        if system in PRETRAINED_AS:
            continue
        losses, best = plan.sweep(system), plan.rate(system)
        cells = ["" if r not in losses else _cell(losses[r], r == best) for r in rates]
        rows.append([system, f"{parameters(plan.scale_name, system):,}", *cells])
    return _table(head, rows)


def _share_sweeps(plan: Plan) -> str:
    shares = plan.scale.shares
    rows = []
    for system in SYSTEMS:
        losses, best = plan.share_sweep(system), plan.share(system)
        cells = ["" if s not in losses else _cell(losses[s], s == best) for s in shares]
        rows.append([system, *cells])
    return _table(["system", *(f"{share:.2g}" for share in shares)], rows)


def _dynamic(plan: Plan) -> str:
    best = best_dynamic(plan)
    rows = [
        [rule, f"{rate:g}", _cell(loss, (rule, rate) == best)]
        for (rule, rate), loss in plan.dynamic().items()
    ]
    return _table(["rule", "rate", "loss"], rows)


def _cell(loss: float, is_best: bool) -> str:
    return f"**{loss:.4f}**" if is_best else f"{loss:.4f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
