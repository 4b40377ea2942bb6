"""Descriptions of GPUs for XLA's compiler, and a compilation for one that is not here."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib

import pytest
from helpers.paths import ROOT

from tttjax.config import MeshConfig
from tttjax.errors import UserError
from tttjax.planning import topologies
from tttjax.planning.accelerators import ACCELERATORS
from tttjax.planning.gpu_targets import GPU_TARGETS, WHEELS, missing_wheels, target_config
from tttjax.planning.topologies import open_mesh, parse_topology


def test_every_gpu_has_a_description(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.12.0.46")
    gpus = {name for name, accelerator in ACCELERATORS.items() if accelerator.network}
    assert set(GPU_TARGETS) == gpus
    for name, target in GPU_TARGETS.items():
        accelerator = ACCELERATORS[name]
        assert target.description.startswith(accelerator.kinds)
        assert target.memory == pytest.approx(accelerator.memory, rel=0.08)
        assert target.bandwidth == pytest.approx(accelerator.bandwidth, rel=0.02)
        text = target_config(name)
        assert text.count("{") == text.count("}")
        assert "dnn_version_info { major: 9 minor: 12 patch: 0 }" in text


def test_the_extra_has_the_wheels():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]["plan-gpu"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in extra}
    assert names - {"jax"} == set(WHEELS) - {"jax-cuda13-plugin"}  # of jax[cuda13-local]
    assert "jax[cuda13-local]" in extra


def test_without_the_wheels_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topologies, "missing_wheels", lambda: ["nvidia-nvvm"])
    with pytest.raises(UserError, match=r"not installed \(nvidia-nvvm\).*\[plan-gpu\]"):
        open_mesh(parse_topology("gpu:h100:4"), MeshConfig(data=4))


@pytest.mark.exhaustive
@pytest.mark.skipif(bool(missing_wheels()), reason=f"needs {', '.join(missing_wheels())}")
@pytest.mark.parametrize("gpu", ["a100", "b200"])
def test_plan_for_an_absent_gpu(gpu):
    """In a process of its own: the plugin is loaded by a JAX that is told to look for no GPU."""
    code = f"""
from helpers.small import small_config
from tttjax.planning.topologies import parse_topology, use_cpu_backend
use_cpu_backend(1)
from tttjax.planning.make import make_plan
model = {{"suffix_layers": 2, "num_layers": 3, "embed_dim": 96, "window_size": 512,
         "compute_dtype": "bfloat16", "qk_norm": False, "post_norm": False}}
config = small_config(model=model, train={{"batch_size": 2, "seq_len": 512}},
                      inner={{"chunk_size": 128}}, mesh={{"fsdp": 2}})
plan = make_plan(config, parse_topology("gpu:{gpu}:2"))
shown = sum(time.kernel.flops for time in plan.kernels)
print(plan.fits, plan.memory.working > 0, plan.notes, shown / (plan.program_flops / 2))
print(sorted(plan.launches), [t.kind for t in plan.traffic])
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": ""}
    environment.pop("JAX_PLATFORMS", None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    first, second = result.stdout.splitlines()[-2:]
    assert first.startswith("True True () ")  # also the length of every loop over tiles is known
    # Of products as small as these, some are compiled to sums.
    assert 0.85 < float(first.split()[-1]) <= 1.01
    for kind in ("__cudnn$fmhaSoftmax'", "__cudnn$fmhaSoftmaxBackward", "all-gather"):
        assert kind in second
