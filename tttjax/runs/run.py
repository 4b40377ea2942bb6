"""Opening trained runs: their configuration, weights and data."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from tttjax.config import (
    Config,
    check_weights_config,
    from_config_dict,
    has_fast_weights,
    read_config,
)
from tttjax.config.custom_code import check_run_code
from tttjax.config.run_info import candidate_paths
from tttjax.data.shards import content_id, read_manifest
from tttjax.data.splits import TRAIN
from tttjax.errors import UserError
from tttjax.io.paths import storage_path
from tttjax.parallel.mesh import make_mesh
from tttjax.training import checkpoint_format, checkpoints, saved_weights
from tttjax.training.checkpoint_integrity import first_nonfinite
from tttjax.types import Params


@dataclass(frozen=True)
class RunSpec:
    """A run to open: its work directory (or one checkpoint), label and modes.

    name: "" for the directory's name. modes: () for those requested for all runs.
    """

    workdir: Path | str
    name: str = ""
    modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A run whose configuration has been read; `weights` loads its weights.

    weights: template with shapes, dtypes and shardings -> the arrays. tokenizer: fingerprint of
    the training data's tokenizer; "" if not known. checkpoint, workdir: the folders that hold the
    weights; None for weights in memory.
    """

    name: str
    config: Config
    weights: Callable[[Params], Params]
    step: int | None = None
    source: str = ""
    modes: tuple[str, ...] = ()
    tokenizer: str = ""
    checkpoint: Path | None = None
    workdir: Path | None = None

    def describe(self) -> dict[str, Any]:
        """Name, step, source and window, for results."""
        return {"name": self.name, "step": self.step, "source": self.source, "window": self.window}

    @property
    def has_fast_weights(self) -> bool:
        return has_fast_weights(self.config.model, self.config.inner)

    @property
    def window(self) -> int:
        """Window size of its window attention in tokens; 0 if it has none."""
        model = self.config.model
        return model.window_size if "window" in model.mixer_kinds else 0


def open_run(spec: RunSpec) -> Run:
    """Opens the newest undamaged checkpoint of a run.

    Raises UserError if there is none, or if `config.json` does not match its weights. `Run.weights`
    raises UserError if they are not finite.
    """
    path = storage_path(spec.workdir)
    checkpoint = saved_weights.find_checkpoint(path)
    meta = checkpoint_format.read_meta(checkpoint)
    config = read_config(path)
    if config is not None:
        check_weights_config(meta["config"], config, str(checkpoint))
    else:
        values = meta["config"]
        if values is None:
            raise UserError(
                f"{spec.workdir} has no configuration: give the work directory of a run, with its "
                "config.json"
            )
        config = from_config_dict(values)
    workdir = storage_path(checkpoint.parent)
    if workdir.name == checkpoints.CHECKPOINT_DIR:
        workdir = workdir.parent
    check_run_code(config.inner, workdir)
    config = _resolve_data_paths(config, workdir, meta["data_state"])
    return Run(
        name=spec.name or path.resolve().name,
        config=config,
        weights=lambda template: _check_finite(
            checkpoint_format.read_item(checkpoint / "params", template), str(checkpoint)
        ),
        step=int(checkpoint.name) if checkpoint.name.isdigit() else None,
        source=str(path),
        modes=spec.modes,
        tokenizer=meta.get("tokenizer", ""),
        checkpoint=storage_path(checkpoint),
        workdir=workdir,
    )


def _resolve_data_paths(config: Config, workdir: Path, data_state: Any) -> Config:
    """The configuration with the present paths of data sets that were moved with the run."""
    sources = config.data.sources
    contents = data_state.get("data", ()) if isinstance(data_state, dict) else ()
    if len(contents) != len(sources):  # custom batches, or an imported checkpoint
        contents = (None,) * len(sources)
    resolved = tuple(
        str(_find_data(source, workdir, content))
        for source, content in zip(sources, contents, strict=True)
    )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=resolved))


def _find_data(source: str, workdir: Path, content: int | None) -> str | Path:
    """The present path of a data set of the run in `workdir`; `source` if it is not found.

    content: content id of its training split (None: not known); a moved data set must match it.
    """
    if storage_path(source).exists():
        return source
    for path in candidate_paths(source, workdir):
        with contextlib.suppress(UserError, KeyError):
            if content in (None, content_id(read_manifest(path), TRAIN)):
                return path.absolute()
    return source


def _check_finite(params: Params, path: str) -> Params:
    """`params`. Raises UserError if they are not finite."""
    if name := first_nonfinite(params):
        raise UserError(
            f"the weights in {path} are not finite ({name}): give an earlier checkpoint, or "
            "train again with a lower learning rate"
        )
    return params


def run_of_params(config: Config, params: Params, name: str = "model") -> Run:
    """A run from weights in memory."""

    def weights(template: Params) -> Params:
        return jax.device_put(params, jax.tree.map(lambda x: x.sharding, template))

    return Run(name=name, config=config, weights=weights)


def make_run_mesh(config: Config) -> Mesh:
    """A mesh of all devices, with the run's `fsdp` and `tensor` sizes if they divide the count."""
    mesh = config.mesh
    if jax.device_count() % (mesh.fsdp * mesh.tensor) == 0:
        return make_mesh(-1, mesh.fsdp, mesh.tensor)
    return make_mesh()
