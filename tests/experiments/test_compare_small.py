"""The comparison of nine systems: sizes, plan, processes, splits."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.paths import ROOT
from helpers.small import random_batch

from experiments import compare_small
from experiments.comparison import convert, summary, text
from experiments.comparison.plan import Plan, Task, rates_to_try, read_losses
from experiments.comparison.runner import Stop, run_tasks
from experiments.comparison.scales import SCALES, SYSTEMS, parameters, recipe
from tttjax.config import from_config_dict, load_config, read_config, write_run_info
from tttjax.data.inputs import list_inputs
from tttjax.errors import UserError
from tttjax.models.transformer import build_model
from tttjax.training import checkpoint_format, checkpoints
from tttjax.ttt.outer_loss import make_inner_loop, make_outer_loss

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "experiments" / "compare_small.py"


def write(path: Path, values: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values or {}))


def results(losses: dict[float, float | None], mode: str) -> dict:
    """The part of an evaluation's results.json that is read."""
    series = [
        {
            "mode": mode,
            "inner": {"lr": rate} if mode == "dynamic" else None,
            "contexts": {"64": {"all": {"nats_per_token": {"mean": loss}}}},
        }
        for rate, loss in losses.items()
    ]
    return {"context_lengths": [32, 64], "series": series}


# Sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_all_systems_have_equal_parameters_and_tokens(scale, system):
    assert parameters(scale, system) == pytest.approx(parameters(scale, "full"), rel=0.02)
    table = SCALES[scale]
    for windows in (1, *table.windows):
        config = from_config_dict(recipe(scale, system, "extend", windows))
        assert config.train.batch_size * config.train.seq_len == table.tokens_per_step
        assert config.train.seq_len == windows * table.window


def test_gpu_scale_has_10_to_50_million_parameters():
    assert 10e6 < parameters("gpu", "full") < 50e6


def test_it_is_an_experiment_file():
    config = load_config(f"{SCRIPT}:cpu,gated_deltanet,extend,8")
    assert config.model.mixers == ("gated_deltanet+window",)
    assert config.train.seq_len == 8 * config.model.window_size
    with pytest.raises(UserError, match="SCALE,SYSTEM,pretrain"):
        load_config(f"{SCRIPT}:cpu,window")


# The plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "rates", "best"),
    [
        ({}, [2, 3, 4], None),
        ({2: 1.0, 3: 0.5}, [2, 3, 4], None),
        ({2: 1.0, 3: 0.5, 4: 0.7}, [2, 3, 4], 3),
        ({2: 0.4, 3: 0.5, 4: math.inf}, [1, 2, 3, 4], None),
        ({1: 0.3, 2: 0.4, 3: 0.5, 4: math.inf}, [1, 2, 3, 4], 1),
        ({2: 1.0, 3: 0.9, 4: 0.8, 5: 0.85}, [2, 3, 4, 5], 4),
    ],
)
def test_sweep_continues_while_best_is_at_its_edge(losses, rates, best):
    assert rates_to_try([1, 2, 3, 4, 5], 3, losses) == (rates, best)


def test_divergence_at_every_rate_is_an_error():
    with pytest.raises(UserError, match="every learning rate of 1, 2"):
        rates_to_try([1, 2], 2, {1: math.inf, 2: math.inf})


def finish(task: Task, plan: Plan, losses: dict[str, float]) -> None:
    """Writes what the task's process would write."""
    name = task.name
    if name.endswith("/validation"):
        run = name.removesuffix("/validation")
        write(task.products[0], results({0.0: losses.get(run, 3.0)}, "off"))
    elif name.startswith("dynamic/"):
        rates = plan.scale.dynamic[name.partition("/")[2]]
        write(task.products[0], results({r: 3 - r for r in rates} | {rates[0]: None}, "dynamic"))
    elif losses.get(name) == math.inf:
        write(task.products[-1])
    else:
        write(task.products[0])


def test_the_plan_covers_every_system_seed_and_context(tmp_path):
    plan = Plan("cpu", tmp_path)
    losses = {"mamba2-lr0.02-seed0": 2.0, "full-lr0.01-seed0": 2.5, "full-lr0.02-seed0": math.inf}
    losses |= {"mamba2-x8-share0.33-seed0": 2.9, "hybrid-x8-share0.1-seed0": 2.9}
    losses |= {f"{system}-x8-share0.01-seed0": 3.1 for system in SYSTEMS}
    order: list[str] = []
    while waiting := [task for task in plan.tasks() if not task.is_done()]:
        ready = [t for t in waiting if t.command and set(order).issuperset(t.needs)]
        assert ready, f"nothing can start, {waiting[0].name} waits"
        for task in ready:
            finish(task, plan, losses)
        # A diverged run is done, and its validation with it.
        order = [task.name for task in plan.tasks() if task.is_done()]
    assert plan.rate("full") == plan.rate("hybrid") == 0.01
    assert plan.rate("mamba2") == 0.02
    assert "mamba2-lr0.04-seed0" in order  # beyond the best
    assert "full-lr0.04-seed0" not in order
    assert plan.share("mamba2") == 1 / 3
    assert "mamba2-x8-share1-seed0" in order  # beyond the best
    assert "hybrid-x8-share1-seed0" not in order
    assert "hybrid-x8-share0.01-seed0" not in order
    assert plan.share("full") == 1 / 30
    commands = {task.name: task.command for task in plan.tasks()}
    extension = commands["mamba2-x8-share0.33-seed1"]
    assert f"--config.train.init_from={plan.workdir('mamba2-lr0.02-seed1')}" in extension
    assert "--config.optim.peak_lr=0.00666667" in extension
    assert (
        f"--config.train.init_from={plan.workdir('hybrid-x1-seed0')}"
        in commands["hybrid-x4-share0.1-seed0"]
    )
    entries = summary.entries(plan)
    assert len(entries) == 9 * 4 * 2
    assert {entry.context for entry in entries} == {128, 256, 512, 1024}
    assert len({(entry.workdir, entry.mode) for entry in entries}) == len(entries)
    assert all(entry.workdir.name in order for entry in entries)
    (learning,) = {repr(entry.learning) for entry in entries if entry.mode == "dynamic"}
    assert "1.0" in learning
    assert "sgd" in learning
    notes = summary.notes(plan, "the command")
    assert "| full | 267,584 |  | 3.0000 | **2.5000** | inf |  |  |" in notes
    assert "| sgd | 0.01 | inf |" in notes


def test_runs_that_diverge_later_are_named_in_report(tmp_path):
    plan = Plan("cpu", tmp_path)
    losses = {"mamba2-lr0.01-seed1": math.inf, "ttt_e2e-x8-share0.033-seed1": math.inf}
    losses |= {"window-x8-share0.033-seed0": math.inf}
    losses |= {f"{system}-x8-share0.01-seed0": 3.1 for system in SYSTEMS}
    losses |= {f"{system}-lr0.01-seed0": 2.5 for system in SYSTEMS}
    while waiting := [task for task in plan.tasks() if not task.is_done()]:
        for task in waiting:
            if task.command:
                finish(task, plan, losses)
    runs = {(entry.system, entry.context, entry.seed) for entry in summary.entries(plan)}
    assert len(runs) == 9 * 4 * 2 - 4 - 1
    assert ("mamba2", 256, 1) not in runs  # it starts from the diverged run
    assert ("ttt_e2e", 1024, 1) not in runs
    assert plan.share("window") == 1 / 10
    notes = summary.notes(plan, "the command")
    missing = "mamba2-lr0.01-seed1, mamba2-x2-share0.033-seed1"
    assert f"Not in the report because they diverged: {missing}" in notes
    assert "| window |  | inf | **3.0000** | 3.0000 |  |" in notes


def test_losses_are_read_at_the_longest_context(tmp_path):
    assert read_losses(tmp_path) == {}
    write(tmp_path / "results.json", results({0.1: 2.0, 1.0: None}, "dynamic"))
    assert read_losses(tmp_path) == {0.1: 2.0, 1.0: math.inf}


# Processes ---------------------------------------------------------------------------------------


def python(name: str, out: Path, body: str, needs: tuple[str, ...] = ()) -> Task:
    path = out / name
    body = f"from pathlib import Path; import sys, time; path = Path({str(path)!r}); {body}"
    return Task(name, (sys.executable, "-S", "-c", body), (path,), needs)


def test_tasks_wait_for_the_tasks_they_need(tmp_path):
    lines: list[str] = []
    tasks = [
        python("last", tmp_path, f"path.write_text(open({str(tmp_path / 'a')!r}).read())", ("a",)),
        python("a", tmp_path, "path.write_text('from a')"),
        python("b", tmp_path, "path.touch()"),
    ]
    assert run_tasks(lambda: tasks, tmp_path, jobs=2, stop=Stop(), log=lines.append)
    assert (tmp_path / "last").read_text() == "from a"
    assert lines[-1].startswith("[3/3] ")
    assert "0:00:00 remaining" in lines[-1]
    seconds = json.loads((tmp_path / "progress.json").read_text())["seconds"]
    assert set(seconds) == {"last", "a", "b"}


def test_error_has_last_line_of_failed_task(tmp_path):
    task = python("a", tmp_path, "sys.exit('error: no such luck')")
    with pytest.raises(UserError, match=r"a failed with exit code 1: no such luck .*logs/a\.log"):
        run_tasks(lambda: [task], tmp_path, jobs=1, stop=Stop(), log=print)


def test_processes_are_stopped_and_the_same_call_continues(tmp_path):
    waits = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
    waits += "Path(str(path) + '.up').touch(); "
    slow = python("slow", tmp_path, waits + "[time.sleep(0.05) for _ in range(1200)]")
    stop, up = Stop(), tmp_path / "slow.up"

    def send_sigterm() -> None:
        while not up.exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send_sigterm)
    thread.start()
    with stop.listening():
        assert not run_tasks(lambda: [slow], tmp_path, jobs=1, stop=stop, log=print)
    thread.join()
    quick = python("slow", tmp_path, "path.touch()")
    assert run_tasks(lambda: [quick], tmp_path, jobs=1, stop=Stop(), log=print)


# One pretraining for three systems ----------------------------------------------------------------


def test_converted_run_computes_same_within_window(tmp_path, monkeypatch):
    full, hybrid = (
        from_config_dict(recipe("smoke", system, "pretrain")) for system in ("full", "hybrid")
    )
    rng = np.random.default_rng(0)
    full_params = jax.tree.map(
        lambda x: (0.25 * rng.normal(size=x.shape)).astype(x.dtype),
        build_model(full.model, full.inner).abstract_params(),
    )
    write_run_info(tmp_path / "full", full)
    saver = checkpoints.Checkpointer(tmp_path / "full" / checkpoints.CHECKPOINT_DIR)
    saver.save(4, {"params": full_params}, tokenizer="t")
    saver.close()
    for name in ("metrics.jsonl", "summary.json"):
        write(tmp_path / "full" / name)
    relayout = convert.relayout  # as one program
    monkeypatch.setattr(
        convert, "relayout", lambda params, *models: jax.jit(lambda x: relayout(x, *models))(params)
    )
    convert.convert_run(tmp_path / "full", tmp_path / "hybrid", hybrid)
    assert read_config(tmp_path / "hybrid") == hybrid
    assert (tmp_path / "hybrid" / "summary.json").exists()
    converted = checkpoints.find_checkpoint(tmp_path / "hybrid")
    assert converted.name == "4"
    assert checkpoint_format.read_meta(converted)["tokenizer"] == "t"
    batch = jax.tree.map(lambda x: x[:1], random_batch(full, masked=0.0))

    def loss(config, params):
        model = build_model(config.model, config.inner)
        outer_loss = make_outer_loss(model, make_inner_loop(config.inner), learn=False)
        return jax.jit(outer_loss)(params, batch, 0.0)[0]

    model = build_model(hybrid.model, hybrid.inner)
    template = model.abstract_params()
    params = checkpoints.restore_params(tmp_path / "hybrid", template)
    assert loss(hybrid, params) == pytest.approx(float(loss(full, full_params)), rel=1e-6)


# The text and the command ------------------------------------------------------------------------


def test_only_long_documents_are_held_out(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text("x" * (600 if number % 2 else 40))
    split_of = text.split_documents(list_inputs([tmp_path]), longest=64)
    assert len(split_of) == 20
    held_out = {name: split for name, split in split_of.items() if split != "train"}
    assert sorted(held_out.values()) == ["test", "test", "val", "val"]
    assert all(int(Path(name).stem) % 2 for name in held_out)
    (tmp_path / "more.txt").write_text("short")
    again = text.split_documents(list_inputs([tmp_path]), longest=64)
    assert {name: again[name] for name in split_of} == split_of


def run_here(monkeypatch, *arguments: str) -> int:
    """The script's exit code, run in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    return compare_small.main()


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "one.txt").write_text("only one document " * 100)
    command = [sys.executable, SCRIPT, "--text", tmp_path / "one.txt", "--out", tmp_path / "out"]
    few = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert few.returncode == 2
    assert few.stderr.startswith("error: --text has 0 documents of more than")
    assert few.stderr.count("\n") == 1
    other = ("--text", str(tmp_path / "one.txt"), "--out", str(tmp_path / "out"))
    assert run_here(monkeypatch, *other, "--scale", "smoke") == 2
    assert "has a comparison with --scale cpu, not smoke" in capsys.readouterr().err


def test_the_plan_is_printed(tmp_path, monkeypatch, capsys):
    assert run_here(monkeypatch, "--out", str(tmp_path / "out"), "--plan", "--jobs=2") == 0
    out = capsys.readouterr().out
    assert "ttt_mlp-x8-share?-seed1" in out
    assert f"{SCALES['cpu'].pretrain_steps * 2048:,} tokens" in out
    assert not (tmp_path / "out").exists()
