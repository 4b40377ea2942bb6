"""`tttjax plan` from the command line to JSON, on CPU, by calculation, for a TPU and for a GPU."""

import dataclasses
import importlib.util
import json

import pytest
from helpers.small import small_config

from tttjax.cli import main
from tttjax.planning import flops, topologies
from tttjax.planning import make as make_module
from tttjax.planning.accelerators import ACCELERATORS
from tttjax.planning.bounds import make_bounds, wire_bytes
from tttjax.planning.kernels import Kernel, count_launches, roofline
from tttjax.planning.make import make_plan
from tttjax.planning.memory import Memory
from tttjax.planning.primitives import Transfer
from tttjax.planning.program import _out_of_memory, available_bytes, compile_program, trace
from tttjax.planning.show import duration, markdown, show
from tttjax.planning.topologies import open_mesh, parse_topology

pytestmark = pytest.mark.slow

GIB = 2**30
CONFIG = """\
from helpers.small import SMALL
from tttjax.config import default_config


def get_config():
    config = default_config()
    for section, values in SMALL.items():
        config[section].update(values)
    return config
"""
SHALLOW = {"model": {"num_layers": 1}, "train": {"batch_size": 4}}


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Plans of one configuration for one topology, with any accelerator, share their programs."""
    programs, steps = {}, {}

    def trace_once(config, topology, mesh):
        key = config, topology.name
        if key not in programs:
            programs[key] = trace(config, topology, mesh)
        return dataclasses.replace(programs[key], topology=topology)

    def compile_once(program):
        key = program.config, program.topology.name
        if key not in steps:
            steps[key] = compile_program(program)
        return dataclasses.replace(steps[key], available=available_bytes(program.topology))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_module, "trace", trace_once)
        patch.setattr(make_module, "compile_program", compile_once)
        yield


def here(memory=80e9):
    """Two devices of this machine, with the rates of an H100 and this memory."""
    accelerator = dataclasses.replace(ACCELERATORS["h100"], memory=memory)
    return dataclasses.replace(parse_topology("cpu:2"), accelerator=accelerator)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def plan():
    """Two devices of this machine, compiled."""
    config = small_config(**SHALLOW, mesh={"fsdp": 2})
    return make_plan(config, parse_topology("cpu:2"), name="small")


def test_memory_is_the_compilers_and_adds_up(plan):
    memory = plan.memory
    assert memory.optimizer == pytest.approx(2 * memory.parameters, rel=0.02)
    assert memory.working > 0
    assert memory.total == plan.needed
    assert memory.trajectory + memory.activations > 0
    assert (plan.fits, plan.bounds) == (None, None)  # this machine is not in the table


def test_flops_of_the_method_and_of_the_program(plan):
    config = small_config(**SHALLOW)
    tokens = config.train.batch_size * config.train.seq_len
    per_token = flops.train_flops_per_token(config.model, config.inner, config.train.seq_len)
    assert plan.flops.total == pytest.approx(per_token * tokens)
    assert 1 < plan.program_flops / plan.flops.total < 3


def test_fsdp_gathers_and_reduces_every_weight(plan):
    kinds = {t.kind: t for t in plan.traffic}
    weights = 2 * plan.memory.parameters
    gathered = sum(t.bytes for t in plan.traffic)
    assert "all-gather" in kinds
    assert 1.9 * weights < gathered < 3 * weights


@pytest.mark.exhaustive
def test_gathering_per_layer_needs_less_memory():
    """Only one of the eleven prefix blocks, and its gradient, is all-gathered at a time."""
    sizes = {"num_layers": 12, "suffix_layers": 1, "embed_dim": 32, "mlp_dim": 128}
    sizes |= {"qk_norm": False, "post_norm": False}
    per_layer, per_step = (
        make_plan(
            small_config(
                model={**sizes, "remat": "block"},
                train={"batch_size": 4},
                mesh={"fsdp": 2, "gather": gather},
            ),
            parse_topology("cpu:2"),
        )
        for gather in ("layer", "step")
    )
    weights = 2 * per_layer.memory.parameters
    assert per_layer.memory.working < per_step.memory.working - 0.5 * weights
    gathers = [{t.kind: t.bytes for t in p.traffic}["all-gather"] for p in (per_layer, per_step)]
    assert gathers[0] > 1.5 * gathers[1]  # the prefix again in the backward pass


def test_text_has_all_sections(plan):
    text = show(plan)
    for words in (
        "optimizer",
        "inner backward",
        "model FLOPs",
        "\n  program  ",
        "all-gather",
        "compiled in",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) < 120


def test_kernels_are_listed_by_operation():
    config = small_config(**SHALLOW)
    plan = make_plan(config, here())
    topology = parse_topology("gpu:h100:2")
    launched = [
        Kernel("__triton_gemm", "td,dv->tv/dot_general", 4, flops=989e12, bytes=1e9),
        Kernel("__triton_gemm", "td,dv->tv/dot_general", 2, flops=2 * 989e12, bytes=2e9),
        Kernel("all-gather", "all_gather", 1, sent=450e9, group_size=2),
    ]
    plan = dataclasses.replace(
        plan,
        launches=count_launches(launched),
        kernels=roofline(launched, topology, 0.0),
    )
    lines = [line.split() for line in show(plan, kernels=True).splitlines()]
    gemm = ["td,dv->tv/dot_general,", "triton_gemm", "6", "3.0000", "75.0%", "compute"]
    assert [*gemm, "2967.00", "3.0"] in lines
    assert ["all", "limited", "by", "interconnect", "1.0000", "25.0%"] in lines
    assert ["__triton_gemm", "6"] in lines
    assert "one after the other: 4.0000 s" in show(plan)
    assert "triton_gemm, " not in show(plan)
    values = plan.to_dict(kernels=True)
    assert values["kernels"][0]["seconds"] == 2.0
    assert (plan.to_dict()["kernels"], values["kernel_seconds"]) == ([], 4.0)
    assert " 7 |" in markdown([plan.to_dict()])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.25, "0.25 s"),
        (29.9, "29.9 s"),
        (42 * 60 - 20, "42 min"),
        (3599.9, "1 h 0 min"),
        (12_000, "3 h 20 min"),
        (86_399, "24 h 0 min"),
        (2 * 86_400 - 1, "2 days"),
        (12.34 * 86_400, "12.3 days"),
        (1234 * 86_400, "1,234 days"),
    ],
)
def test_durations_have_readable_units(seconds, expected):
    assert duration(seconds) == expected


def test_short_runs_are_not_given_in_days():
    plan = make_plan(small_config(**SHALLOW), here())
    plan = dataclasses.replace(plan, cost=dataclasses.replace(plan.cost, days=12_000 / 86_400))
    assert " steps take 3 h 20 min, " in show(plan)
    assert " 3 h 20 min |" in markdown([plan.to_dict()])
    assert "days" not in show(plan)


def test_json_and_table(file, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(topologies, "parse_topology", lambda name: here())
    words = [f"--config={file}", "--config.model.num_layers=1", "--config.train.batch_size=4"]
    assert main.main(["plan", *words, "--topology=cpu:2", "--json"]) == 0
    text = capsys.readouterr().out
    plan = json.loads(text)
    assert (plan["fits"], plan["launches"], plan["chips"]) == (True, {}, 2)
    assert plan["bounds"]["step"] == plan["bounds"][plan["bounds"]["limit"]]
    assert plan["cost"]["chip_hours"] == pytest.approx(2 * 24 * plan["cost"]["days"])
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert main.main(["plan", f"--table={tmp_path}/*.json"]) == 0
    assert capsys.readouterr().out == markdown([plan]) + "\n"
    assert "cpu:2" in markdown([plan]).splitlines()[2]
    path.write_text("{}")
    assert main.main(["plan", f"--table={path}"]) == main.USER_ERROR
    assert "is not a plan" in capsys.readouterr().err


def test_recipe_that_does_not_fit_has_proposal():
    config = small_config(**SHALLOW)
    needed = make_plan(config, here()).needed
    plan = make_plan(config, here(memory=0.8 * needed))
    assert plan.fits is False
    assert plan.proposal.fits
    assert plan.proposal.needed <= 0.8 * needed
    assert plan.proposal.changes
    assert "fits with --config." in show(plan)
    assert make_plan(config, here(memory=0.8 * needed), propose=False).proposal is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology=v5q:2x2"], "unknown accelerator 'v5q'"),
        (["--topology=gpu:h100:3"], "cannot be divided among"),
        (["--topology=gpu:h100:2", "--config.mesh.fsdp=3"], "does not divide"),
        (["--topology=gpu:h100:2", "--mfu=2"], "--mfu=2"),
        ([], "needs --config=FILE and --topology=NAME"),
    ],
)
def test_errors(file, capsys, words, message):
    assert main.main(["plan", f"--config={file}", *words]) == main.USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bounds_by_hand():
    topology = parse_topology("v5p:2x2x1")
    accelerator = topology.accelerator
    memory = Memory(3 * GIB, 6 * GIB, 0, GIB, 0, 5 * GIB, 0)
    transfers = [Transfer("all-reduce", 8e9, group_size=4, times=3)]
    bounds = make_bounds(topology, 4e15, 2e15, memory, transfers)
    assert bounds.compute == pytest.approx(4e15 / (4 * 459e12))
    assert bounds.memory == pytest.approx(2 * 10 * GIB / 2765e9)
    assert bounds.interconnect == pytest.approx(3 * 2 * 8e9 * 3 / 4 / accelerator.link)
    assert (bounds.limit, bounds.mfu) == ("compute", pytest.approx(0.5))


def test_bytes_sent_by_collectives():
    assert wire_bytes(Transfer("all-gather", 80, group_size=8)) == 70
    assert wire_bytes(Transfer("all-reduce", 80, group_size=8)) == 140
    assert wire_bytes(Transfer("collective-permute", 80, group_size=8)) == 80


def test_the_compilers_out_of_memory_error_is_parsed():
    known = Memory(GIB, 2 * GIB, GIB, 5 * GIB, GIB, 0, 0)
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm."
    memory, available = _out_of_memory(message, known, 80 * GIB)
    assert (memory.total, memory.temporary, available) == (20.5 * GIB, 10.5 * GIB, 15.75 * GIB)
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (51.85G) exceeds available HBM (31.25G)."
    )
    memory, available = _out_of_memory(message, known, 80 * GIB)
    assert (memory.total, available) == (55.85 * GIB, 31.25 * GIB)
    for capacity, needed in ((80 * GIB, 80 * GIB), (5 * GIB, known.total)):
        memory, available = _out_of_memory("RESOURCE_EXHAUSTED: no numbers", known, capacity)
        assert (memory.total, available) == (needed, capacity)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_plan_for_an_absent_tpu():
    config = small_config(model={"num_layers": 1, "suffix_layers": 0, "fast_mlp": False})
    plan = make_plan(config, parse_topology("v5e:1x1"))
    assert plan.fits
    assert plan.needed > plan.memory.state
    assert plan.compile_seconds > 0


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_step_for_a_tpu_has_its_kernel():
    model = {"vocab_size": 12, "embed_dim": 16, "window_size": 130, "compute_dtype": "bfloat16"}
    config = small_config(
        model=model,
        inner={"chunk_size": 64},
        train={"batch_size": 8, "seq_len": 256},
        mesh={"fsdp": 2, "tensor": 2},
    )
    topology = parse_topology("v5p:2x2x2")
    mesh = open_mesh(topology, config.mesh)
    with_kernel = trace(config, topology, mesh)
    assert "splash_mha" in with_kernel.traced.lower().compile().as_text()
    in_xla = dataclasses.replace(config.model, attention_kernel="xla")
    without = trace(dataclasses.replace(config, model=in_xla), topology, mesh)
    assert "tpu_custom_call" not in without.traced.lower().as_text()
    assert with_kernel.count.flops == without.count.flops
