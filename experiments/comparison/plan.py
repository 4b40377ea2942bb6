"""All runs of a comparison, planned as a pure function of the validation losses so far.

A task is one process: it trains or validates a run, converts it to another system, or sweeps the
learning rates of dynamic evaluation. It is done when its product is on disk. A task can start when
all tasks that it needs are done.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.comparison.scales import (
    DYNAMIC,
    EXTEND,
    PRETRAIN,
    PRETRAINED_AS,
    SCALES,
    SYSTEMS,
    Scale,
)
from tttjax.errors import UserError

RECIPES = Path(__file__).resolve().parents[1] / "compare_small.py"
CONVERT = Path(__file__).with_name("convert.py")
START = 15.0  # seconds to start, compile and save
DYNAMIC_EVAL_COST = 4  # of a token of dynamic evaluation, in training tokens


@dataclass(frozen=True)
class Task:
    """One process. command: empty until the rates it depends on are known.

    products: the task is done when any of these files exists; the first is that of a success.
    needs: names of tasks. tokens: training tokens. seconds: expected.
    """

    name: str
    command: tuple[str, ...]
    products: tuple[Path, ...]
    needs: tuple[str, ...] = ()
    tokens: int = 0
    seconds: float = START

    def is_done(self) -> bool:
        return any(path.exists() for path in self.products)


def rates_to_try(
    ladder: Sequence[float], tried: int, losses: Mapping[float, float]
) -> tuple[list[float], float | None]:
    """(rates to try, the best of them or None while a loss is missing).

    The rates are the `tried` ones in the middle of the ladder, extended by one while the best is at
    the edge. Raises UserError if no loss is finite.
    """
    first = (len(ladder) - tried) // 2
    low, high = first, first + tried - 1
    while True:
        chosen = list(ladder[low : high + 1])
        if any(rate not in losses for rate in chosen):
            return chosen, None
        best = min(chosen, key=lambda rate: losses[rate])
        if not math.isfinite(losses[best]):
            tried_words = ", ".join(f"{rate:g}" for rate in chosen)
            raise UserError(f"training diverged at every learning rate of {tried_words}")
        if best == chosen[0] and low:
            low -= 1
        elif best == chosen[-1] and high < len(ladder) - 1:
            high += 1
        else:
            return chosen, best


@dataclass(frozen=True)
class Plan:
    """The comparison at a scale in the folder `out`.

    rate_losses: system -> learning rate -> validation loss; None: read from disk on each access.
    share_losses: the same for extensions, by share of the best learning rate.
    """

    scale_name: str
    out: Path
    rate_losses: Mapping[str, Mapping[float, float]] | None = None
    share_losses: Mapping[str, Mapping[float, float]] | None = None

    @property
    def scale(self) -> Scale:
        return SCALES[self.scale_name]

    @property
    def data(self) -> Path:
        return self.out / "data"

    def workdir(self, run: str) -> Path:
        return self.out / "runs" / run

    # Results --------------------------------------------------------------------------------------

    def loss(self, run: str) -> float | None:
        """Validation loss of a run: infinite if it diverged, None if not available."""
        if self.diverged(run):
            return math.inf
        return read_losses(self.workdir(run) / "validation").get(0.0)

    def sweep(self, system: str) -> Mapping[float, float]:
        """Learning rate -> validation loss, so far."""
        if self.rate_losses is not None:
            return self.rate_losses[system]
        losses = {rate: self.loss(pretrained(system, rate)) for rate in self.scale.rates}
        return {rate: loss for rate, loss in losses.items() if loss is not None}

    def rate(self, system: str) -> float | None:
        """The best learning rate of a system's pretraining; None while undecided."""
        origin = PRETRAINED_AS.get(system, system)
        return rates_to_try(self.scale.rates, self.scale.tried, self.sweep(origin))[1]

    def share_sweep(self, system: str) -> Mapping[float, float]:
        """Share of the best rate -> validation loss of the longest extension, so far."""
        if self.share_losses is not None:
            return self.share_losses[system]
        longest = max(self.scale.windows)
        runs = {share: extended(system, longest, share) for share in self.scale.shares}
        losses = {share: self.loss(run) for share, run in runs.items()}
        return {share: loss for share, loss in losses.items() if loss is not None}

    def share(self, system: str) -> float | None:
        """The best share of a system's extensions; None while undecided."""
        return rates_to_try(self.scale.shares, self.scale.tried, self.share_sweep(system))[1]

    def run(self, system: str, windows: int, seed: int) -> str:
        """The name of a system's run for a context; undecided rates are question marks."""
        if windows > 1:
            return extended(system, windows, self.share(system), seed)
        if system in PRETRAINED_AS:
            return f"{system}-x1-seed{seed}"
        return pretrained(system, self.rate(system), seed)

    def dynamic(self) -> dict[tuple[str, float], float]:
        """(update rule, inner learning rate) -> validation loss of dynamic evaluation."""
        return {
            (rule, rate): loss
            for rule in self.scale.dynamic
            for rate, loss in read_losses(self.out / DYNAMIC / rule).items()
        }

    # Tasks ----------------------------------------------------------------------------------------

    def tasks(self) -> list[Task]:
        """Every task, in the order in which they should start."""
        with_pretraining = [system for system in SYSTEMS if system not in PRETRAINED_AS]
        rate_losses = {system: self.sweep(system) for system in with_pretraining}
        shares = {system: self.share_sweep(system) for system in SYSTEMS}
        return dataclasses.replace(self, rate_losses=rate_losses, share_losses=shares)._tasks()

    def _tasks(self) -> list[Task]:
        tasks = []
        for system in SYSTEMS:
            if system not in PRETRAINED_AS:
                tasks += self._pretraining(system)
        for system in SYSTEMS:
            for seed in range(self.scale.seeds):
                if self.has_diverged(system, 1, seed):
                    continue
                if system in PRETRAINED_AS:
                    tasks.append(self._conversion(system, seed))
                tasks += self._extensions(system, seed)
        return tasks + [self._dynamic(rule) for rule in self.scale.dynamic]

    def _pretraining(self, system: str) -> list[Task]:
        rates, best = rates_to_try(self.scale.rates, self.scale.tried, self.sweep(system))
        tasks = []
        for rate in rates:
            train = self._train(system, rate, 0)
            tasks += [train, self._validate(system, train.name)]
        return tasks + [self._train(system, best, seed) for seed in range(1, self.scale.seeds)]

    def _train(self, system: str, rate: float | None, seed: int) -> Task:
        run = pretrained(system, rate, seed)
        command = self._train_command(run, f"{system},{PRETRAIN}", rate, seed) if rate else ()
        return Task(
            run,
            command,
            self._products(run, "nonfinite.json"),
            () if seed == 0 else self._sweep_names(system),
            *self._cost(system, PRETRAIN),
        )

    def _sweep_names(self, system: str) -> tuple[str, ...]:
        rates, _ = rates_to_try(self.scale.rates, self.scale.tried, self.sweep(system))
        return tuple(f"{pretrained(system, rate)}/validation" for rate in rates)

    def _validate(self, system: str, run: str, windows: int = 1) -> Task:
        scale, folder = self.scale, self.workdir(run)
        command = self._evaluate_command(
            folder,
            folder / "validation",
            lengths=scale.window * windows,
            batch=scale.eval_batch * max(scale.windows) // windows,
            modes="on" if system == "ttt_e2e" else "off",
        )
        products = (folder / "validation" / "results.json", folder / "nonfinite.json")
        return Task(f"{run}/validation", command, products, (run,))

    def _conversion(self, system: str, seed: int) -> Task:
        origin = pretrained(PRETRAINED_AS[system], self.rate(system), seed)
        run = self.run(system, 1, seed)
        command = (
            *(sys.executable, str(CONVERT), str(self.workdir(origin)), str(self.workdir(run))),
            f"--config={RECIPES}:{self.scale_name},{system},{PRETRAIN}",
            *self._overrides(self.rate(system) or 0.0, seed),
        )
        is_decided = self.rate(system) is not None
        return Task(
            run, command if is_decided else (), self._products(run), self._origin(system, seed)
        )

    def _extensions(self, system: str, seed: int) -> list[Task]:
        """The extensions of one seed; the first seed also sweeps at the longest context."""
        longest, tasks = max(self.scale.windows), []
        windows = list(self.scale.windows)
        if seed == 0:
            for share in self._shares_to_try(system):
                extension = self._extension(system, longest, 0, share)
                tasks += [extension, self._validate(system, extension.name, longest)]
            windows.remove(longest)  # the sweep includes its best
        sweep = tuple(
            f"{extended(system, longest, share)}/validation"
            for share in self._shares_to_try(system)
        )
        best = self.share(system)
        return tasks + [self._extension(system, n, seed, best, sweep) for n in windows]

    def _shares_to_try(self, system: str) -> list[float]:
        return rates_to_try(self.scale.shares, self.scale.tried, self.share_sweep(system))[0]

    def _extension(
        self,
        system: str,
        windows: int,
        seed: int,
        share: float | None,
        needs: tuple[str, ...] = (),
    ) -> Task:
        run, rate = extended(system, windows, share, seed), self.rate(system)
        command: tuple[str, ...] = ()
        origin = self._origin(system, seed)
        if system in PRETRAINED_AS:
            origin = (self.run(system, 1, seed),)
        if rate is not None and share is not None:
            start = self.workdir(self.run(system, 1, seed))
            arg = f"{system},{EXTEND},{windows}"
            command = self._train_command(run, arg, rate * share, seed)
            command += (f"--config.train.init_from={start}",)
        products = self._products(run, "nonfinite.json")
        return Task(run, command, products, (*origin, *needs), *self._cost(system, EXTEND))

    def _origin(self, system: str, seed: int) -> tuple[str, ...]:
        """Names of the tasks needed by a run that starts from a pretrained model."""
        system = PRETRAINED_AS.get(system, system)
        sweep = self._sweep_names(system)
        return sweep if seed == 0 else (*sweep, pretrained(system, self.rate(system), seed))

    def _dynamic(self, rule: str) -> Task:
        """The window model of the longest context, first seed, at every rate of one rule."""
        scale = self.scale
        run = self.run("window", max(scale.windows), 0)
        rates = scale.dynamic[rule]
        folder = self.out / DYNAMIC / rule
        evaluate = self._evaluate_command(
            self.workdir(run), folder, lengths=scale.longest, batch=scale.eval_batch, modes=DYNAMIC
        )
        command = (
            *evaluate,
            f"--dynamic-lr={','.join(map(str, rates))}",
            f"--dynamic-layers={scale.suffix_layers}",
            f"--inner-rule={rule}",
        )
        if self.share("window") is None:
            command = ()
        tokens = DYNAMIC_EVAL_COST * len(rates) * scale.sequences * scale.longest
        seconds = START + tokens / 1000 / scale.speed[DYNAMIC]
        return Task(f"{DYNAMIC}/{rule}", command, (folder / "results.json",), (run,), 0, seconds)

    def _train_command(self, run: str, arg: str, rate: float, seed: int) -> tuple[str, ...]:
        return (
            *(sys.executable, "-m", "tttjax", "train"),
            f"--config={RECIPES}:{self.scale_name},{arg}",
            f"--workdir={self.workdir(run)}",
            *self._overrides(rate, seed),
        )

    def _overrides(self, rate: float, seed: int) -> tuple[str, ...]:
        return (
            f"--config.optim.peak_lr={rate:.6g}",
            f"--config.train.seed={seed}",
            f"--config.data.seed={seed}",
            f"--config.data.sources={self.data}",
        )

    def _evaluate_command(
        self, run: Path, out: Path, *, lengths: int, batch: int, modes: str
    ) -> tuple[str, ...]:
        number = self.scale.sequences * self.scale.longest // lengths
        return (
            *(sys.executable, "-m", "tttjax", "evaluate", str(run), f"--out={out}"),
            *(f"--data={self.data}", "--split=val", f"--modes={modes}"),
            *(f"--context-lengths={lengths}", f"--num-sequences={number}", f"--batch-size={batch}"),
        )

    def diverged(self, run: str) -> bool:
        """Whether a run ended because its losses were not finite."""
        return (self.workdir(run) / "nonfinite.json").exists()

    def has_diverged(self, system: str, windows: int, seed: int) -> bool:
        """Whether a run for a context diverged, or the run it starts from."""
        origin = pretrained(PRETRAINED_AS.get(system, system), self.rate(system), seed)
        return self.diverged(origin) or self.diverged(self.run(system, windows, seed))

    def _products(self, run: str, *alternatives: str) -> tuple[Path, ...]:
        return tuple(self.workdir(run) / name for name in ("summary.json", *alternatives))

    def _cost(self, system: str, stage: str) -> tuple[int, float]:
        """(tokens, seconds) of a training run."""
        tokens = self.scale.steps(stage) * self.scale.tokens_per_step
        return tokens, START + tokens / 1000 / self.scale.speed[system]


def pretrained(system: str, rate: float | None, seed: int = 0) -> str:
    """The name of a pretraining run; an undecided rate is a question mark."""
    return f"{system}-lr{'?' if rate is None else f'{rate:g}'}-seed{seed}"


def extended(system: str, windows: int, share: float | None, seed: int = 0) -> str:
    """The name of an extension; an undecided share is a question mark."""
    return f"{system}-x{windows}-share{'?' if share is None else f'{share:.2g}'}-seed{seed}"


def read_losses(folder: Path) -> dict[float, float]:
    """Inner learning rate (0 without) -> loss at the longest context evaluated."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    results = json.loads(path.read_text())
    longest = str(max(results["context_lengths"]))
    losses = {}
    for series in results["series"]:
        loss = series["contexts"][longest]["all"]["nats_per_token"]["mean"]
        rate = series["inner"]["lr"] if series["mode"] == DYNAMIC else 0.0
        losses[rate] = math.inf if loss is None else loss
    return losses
