"""`tttjax bench commands` runs commands alternately and compares their figures."""

import json
import shlex
import sys

import pytest

from tttjax.benchmarks.commands import bench_commands
from tttjax.cli import main
from tttjax.errors import UserError


def program(text: str) -> str:
    return f"{sys.executable} -c {shlex.quote(text)}"


WRITE = "import json, os; os.mkdir('{out}'); json.dump({'s': %s}, open('{out}/f.json', 'w'))"


def test_commands_alternate_in_new_folders(tmp_path):
    log = tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write('%s {{out}}\\n')"
    bench_commands([program(note % "a"), program(note % "b")], rounds=2)
    names, folders = zip(*(line.split() for line in log.read_text().splitlines()), strict=True)
    assert names == ("a", "b") * 3  # the first round is not counted
    assert len(set(folders)) == 6


def test_ratios_are_to_the_first_command():
    commands = [program(WRITE % 2.0), program(WRITE % 5.0)]
    figures = {
        (result.command, result.name): result
        for result in bench_commands(commands, rounds=2, figures="{out}/f.json:s")
    }
    assert figures[commands[1], "s"].median == 5.0
    assert figures[commands[1], "s"].ratios == (2.5, 2.5)
    assert figures[commands[0], "s"].ratio == 1.0
    assert figures[commands[0], "wall_seconds"].median > 0
    assert figures[commands[0], "peak_bytes"].median > 1 << 20


def test_a_busy_command_has_more_cpu_time():
    busy = program("sum(range(20_000_000))")
    figures = bench_commands([program("pass"), busy], rounds=1)
    assert next(r for r in figures if r.command == busy and r.name == "cpu_seconds").ratio > 2


def test_command_line_prints_table_and_json(capsys):
    words = ["bench", "commands", program("pass"), program("1"), "--rounds=1"]
    assert main.main(words) == 0
    assert "peak_bytes" in capsys.readouterr().out
    assert main.main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 6


@pytest.mark.parametrize(
    ("commands", "figures", "words"),
    [
        (["true"], "", "at least two"),
        (["true", program("import sys; sys.exit('broken')")], "", "exit code 1: broken"),
        (["true", "no-such-program"], "", "cannot be started"),
        (["true", "echo 'open"], "", "cannot be split"),
        (["true", ""], "", "is empty"),
        (["true", "true"], "{out}/f.json:s", "no numbers"),
        (["true", "true"], "seconds", "FILE:KEY"),
        ([program(WRITE % 0), "true"], "{out}/f.json:s", "not positive"),
    ],
)
def test_unusable_commands_are_refused(commands, figures, words):
    with pytest.raises(UserError, match=words):
        bench_commands(commands, rounds=1, figures=figures)
