"""Benchmark of the two forms of the meta-gradient against static models of equal size."""

from collections.abc import Sequence
from dataclasses import replace

from tttjax.benchmarks.timing import cell, quotient
from tttjax.benchmarks.train import TrainBenchmark, bench_train
from tttjax.config import Config, parameter_count
from tttjax.config.counts import match_parameters
from tttjax.errors import UserError

FORMS = ("fast", "reference")
CONTROLS = ("window", "full")


def variants(config: Config) -> list[tuple[str, Config]]:
    """(name, configuration) of the four train steps.

    Raises UserError unless the fast weights of the configuration are its fast MLPs.
    """
    if not config.model.fast_mlp or config.inner.fast_paths:
        raise UserError(
            "The controls are this configuration without its fast MLPs, but it has "
            f"model.fast_mlp = {config.model.fast_mlp} and inner.fast_paths = "
            f"{config.inner.fast_paths}; use one whose fast weights are the fast MLPs."
        )
    return [(form, _with_form(config, form)) for form in FORMS] + [
        (mixer, control(config, mixer)) for mixer in CONTROLS
    ]


def control(config: Config, mixer: str) -> Config:
    """A static model with this mixer in all blocks and as many parameters."""
    model = replace(config.model, mixers=(mixer,), suffix_layers=0, fast_mlp=False)
    size = parameter_count(config.model)["total"]
    return replace(config, model=replace(model, mlp_dim=match_parameters(model, size)))


def bench_meta_gradient(config: Config, rounds: int = 5) -> list[TrainBenchmark]:
    """Measures the four train steps; ratios are to the last, full attention."""
    return bench_train(variants(config), rounds)


def _with_form(config: Config, form: str) -> Config:
    return replace(config, inner=replace(config.inner, form=form))


def format_form_ratios(results: Sequence[TrainBenchmark]) -> str:
    """Time and memory of the fast form relative to the reference form."""
    fast, reference = (next(r for r in results if r.name == form) for form in FORMS)
    memory = ""
    if fast.temporary_bytes and reference.temporary_bytes:
        memory = f", temporary memory {fast.temporary_bytes / reference.temporary_bytes:.2f}"
    time = cell(quotient(fast.step_seconds, reference.step_seconds), ".2f")
    return f"fast / reference: time {time}{memory}"
