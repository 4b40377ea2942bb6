"""How a start of a run is spread over hosts and devices, and what changes when their number does.

The global batch and the order of the data stay. With fewer devices a step takes more micro-batches
(`train.accum_steps`), so that no device holds more sequences at a time than it did at first.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tttjax.config.checks import check_mesh
from tttjax.config.run_info import ENVIRONMENT, read_environments
from tttjax.config.schema import Config
from tttjax.errors import UserError


@dataclass(frozen=True)
class Placement:
    """Processes, sizes of the mesh axes, and micro-batches per step of one start."""

    hosts: int
    data: int
    fsdp: int
    tensor: int
    accum_steps: int

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    def applied_to(self, config: Config) -> Config:
        """The configuration with this mesh and accumulation."""
        mesh = dataclasses.replace(config.mesh, data=self.data)
        train = dataclasses.replace(config.train, accum_steps=self.accum_steps)
        return dataclasses.replace(config, mesh=mesh, train=train)


def choose_placement(config: Config, workdir: str | Path, devices: int, hosts: int) -> Placement:
    """The placement of a start. Raises UserError if the mesh does not fit, naming what would."""
    limit, accum_steps = most_sequences(config, workdir), config.train.accum_steps
    if limit is None:
        mesh = check_mesh(config, devices, hosts)
    else:
        whole = dataclasses.replace(config.train, accum_steps=1)
        mesh = check_mesh(dataclasses.replace(config, train=whole), devices, hosts)
        per_device = config.train.batch_size // (mesh.data * mesh.fsdp)
        divisors = (n for n in range(1, per_device + 1) if per_device % n == 0)
        accum_steps = next(n for n in divisors if per_device // n <= limit)
    return Placement(hosts, mesh.data, mesh.fsdp, mesh.tensor, accum_steps)


def most_sequences(config: Config, workdir: str | Path) -> int | None:
    """Sequences of a micro-batch per device that `train.accum_steps` meant; None if not known.

    They are those of the run's first start with this `train.accum_steps`: another value than before
    is taken as it is.
    """
    for accum_steps, placement in _recorded(workdir):
        if accum_steps == config.train.accum_steps:
            shards = placement.data * placement.fsdp
            return config.train.batch_size // (shards * placement.accum_steps)
    return None


def describe_change(now: Placement, workdir: str | Path) -> str:
    """A line on what differs from the run's last start; "" if nothing does."""
    recorded = _recorded(workdir)
    if not recorded or (before := recorded[-1][1]) == now:
        return ""
    forms = {"hosts": "{} hosts", "devices": "{} devices"}
    forms |= {axis: f"mesh.{axis} = {{}}" for axis in ("data", "fsdp", "tensor")}
    forms |= {"accum_steps": "train.accum_steps = {}"}
    changes = [
        f"{form.format(getattr(now, name))} instead of {getattr(before, name)}"
        for name, form in forms.items()
        if getattr(now, name) != getattr(before, name)
    ]
    return f"continuing on {', '.join(changes)}; batch and order of the data stay"


def _recorded(workdir: str | Path) -> list[tuple[int, Placement]]:
    """(`train.accum_steps` of the configuration, placement) of every start that took a step."""
    try:
        return [
            (start["config"]["train"]["accum_steps"], Placement(**start["placement"]))
            for start in read_environments(workdir)
            if "placement" in start
        ]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{workdir}/{ENVIRONMENT} is damaged ({error!r}); restore it from a copy, or remove it"
        ) from None
