"""Every path argument of every command expands `~` and rejects URLs, except of texts."""

import argparse
import importlib
from pathlib import Path

import pytest
from helpers.paths import TINY

from tttjax.cli import main
from tttjax.config import load_config
from tttjax.config.fields import field_info
from tttjax.config.schema import all_fields
from tttjax.data.preparation import prepare
from tttjax.data.shards import open_prepared
from tttjax.errors import UserError
from tttjax.inference.session_file import read_header
from tttjax.io.atomic import require_empty_dir, write_files
from tttjax.io.paths import absolute_path, local_path
from tttjax.runs.run import RunSpec, open_run
from tttjax.training import saved_weights
from tttjax.training.loop import train

# Text arguments and fields that are not paths. Text in neither list nor choices is a path.
TEXTS = {
    *("bench commands commands", "bench commands --figures", "prepare --text-key"),
    *("bench decode --batch", "bench decode --read", "bench prefill --lengths"),
    *("bench train --lengths", "evaluate --split", "generate --prompt", "generate --stop"),
    *(
        "import --gcs-project",
        "export --max-shard-size",
        "plan --topology",
        "prepare --pattern",
        "prepare --part",
    ),
    *(
        "recipes recipe",
        "report --baseline",
        "report --split",
        "report --title",
        "train --coordinator",
    ),
    *("sweep --set", "sweep --split", "sweep --baseline", "sweep --trial", "sweep --slurm"),
    *("sweep --image", "sweep --volume-claim", "launch --topology", "launch --set"),
}
# Of these, URLs are read (tests/data/test_remote.py).
INPUT_TEXTS = {
    *("prepare inputs", "read text", "sessions --text", "evaluate --needle-text"),
    *("generate --prompt-file", "generate --prompts"),
}
# These may be in buckets (tests/io/test_buckets.py).
BUCKET_ARGUMENTS = {
    *("prepare --out", "prepare --check", "train --workdir", "runs folder", "sessions --run"),
    *("evaluate workdirs", "evaluate --out", "evaluate --data"),
    *("export workdir", "generate workdir", "read workdir", "report runs"),
    *("launch --workdir", "status workdir"),
}
TEXT_FIELDS = {"data.val_split", "inner.code", "inner.fast_paths", "train.wandb_project"}


def arguments(parser, name):
    """(name of a command, an action that takes text, that and the required ones in order)."""
    actions = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inside in action.choices.items():
                yield from arguments(inside, f"{name} {word}")
        elif action.nargs != 0 and not action.choices and is_text(action):
            needed = [a for a in actions if a.required or a is action]
            yield name, action, needed


def is_text(action):
    return action.type is None or "path" in action.type.__qualname__


def all_arguments():
    for name, command in main.COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(command.module).add_arguments(parser)
        main._expand_path_arguments(parser)
        for words, action, needed in arguments(parser, name):
            label = f"{words} {(action.option_strings or [action.dest])[0]}"
            if label not in TEXTS:
                yield pytest.param(words, action, needed, id=label)


def given(action, value):
    if action.choices:
        value = next(iter(action.choices))
    spec = f"{value}.py" if "[:ARG]" in str(action.metavar) else value
    return f"{action.option_strings[0]}={spec}" if action.option_strings else spec


@pytest.mark.parametrize(("words", "action", "needed"), list(all_arguments()))
def test_path_arguments_reject_buckets_and_unknown_users(
    words, action, needed, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    refusals = {
        "s3://bucket/x": "not supported here; name a local",
        "gs://bucket/x": "not supported here; name a local",
        "~nobody-of-this-name/x": "does not exist; write ./~",
    }
    label = f"{words} {(action.option_strings or [action.dest])[0]}"
    if label in INPUT_TEXTS | BUCKET_ARGUMENTS:
        refusals = {"~nobody-of-this-name/x": "does not exist; write ./~"}
    if (words, action.dest) == ("import", "source"):  # it reads from Google's buckets, and no other
        refusals |= {"s3://bucket/x": "neither a folder nor a path like gs://"}
        del refusals["gs://bucket/x"]
    for value, sentence in refusals.items():
        line = [given(a, value if a is action else "unused") for a in needed]
        if words == "plan" and action.dest == "config":
            line.append("--topology=cpu:1")
        assert main.main([*words.split(), *line]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert value in error
        assert not any(tmp_path.iterdir())


def test_the_sweep_finds_path_arguments():
    found = {parameter.id for parameter in all_arguments()}
    assert found > {"train --workdir", "train --config", "prepare inputs", "prepare --out"}
    assert found > {
        "export --to",
        "import source",
        "report runs",
        "sessions files",
        "bench data --data",
    }


def test_every_path_field_is_declared(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = set()
    for name, field in all_fields().items():
        if field.type not in (str, tuple[str, ...]) or field_info(field).choices:
            continue
        if not field_info(field).path:
            found.add(name)
            continue
        with pytest.raises(UserError, match=f"{name}=hdfs://b/x is not a path on this machine"):
            load_config(str(TINY), [f"--config.{name}=hdfs://b/x"])
        section, key = name.split(".")
        value = getattr(getattr(load_config(str(TINY), [f"{name}=~/x"]), section), key)
        assert value in (str(tmp_path / "x"), (str(tmp_path / "x"),))
    assert found == TEXT_FIELDS


@pytest.mark.parametrize(
    "use",
    [
        lambda path: train(load_config(str(TINY)), path),
        lambda path: prepare([TINY], path, num_workers=0),
        lambda path: prepare([TINY], "out", tokenizer=path, num_workers=0),
        lambda path: open_prepared(path),
        lambda path: open_run(RunSpec(path)),
        lambda path: saved_weights.find_checkpoint(path),
        lambda path: read_header(path),
        lambda path: require_empty_dir(path, "--to"),
        lambda path: write_files(path, {}),
    ],
)
def test_functions_reject_buckets(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("hdfs://b/x", Path("hdfs://b/x")):
        with pytest.raises(UserError, match="not a path on this machine"):
            use(path)
    assert not any(tmp_path.iterdir())


def test_functions_expand_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "t.txt").write_text("good " * 100)
    assert main.main(["prepare", "~/t.txt", "--out=~/data", "--num-workers=0"]) == 0
    assert main.main(["prepare", "--check=~/data"]) == 0
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["data", "t.txt"]
    assert not any((tmp_path / "work").iterdir())


def test_a_path_is_expanded_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for text, expected in {
        "~/x": "/home/me/x",
        "x/~/y": "x/~/y",
        "./~/x": tmp_path / "~" / "x",
        "./gs:/x": tmp_path / "gs:" / "x",
        "a:b/c": "a:b/c",
        "-": "-",
    }.items():
        assert local_path(text) == Path(expected)
        assert local_path(local_path(text)) == Path(expected)
    assert absolute_path("./x/../y") == f"{tmp_path}/x/../y"  # x may be a link
