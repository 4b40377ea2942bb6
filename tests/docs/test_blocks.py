"""Every block of code in the documentation: commands parse, Python runs, files are what they say.

The language of a fence says what it is. bash: each command is parsed by the program it calls, here
without being run. python: runs, page by page, in a folder with tiny runs. py: Python that needs
what a test has not got; compiled only. json, jsonl, yaml, toml: parsed. text: anything else.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import dataclass

import pytest
import yaml
from helpers.official_files import official_arrays, official_config, write_official
from helpers.paths import ROOT
from markdown_it import MarkdownIt

from tttjax import recipes
from tttjax.cli import main, sweep
from tttjax.cli.bench import BENCHMARKS
from tttjax.config import default_config, load_config, write_run_info
from tttjax.config.files import apply_override, matching_specs
from tttjax.config.schema import SECTIONS
from tttjax.errors import UserError

PAGES = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
DOCTESTS = ("docs/api.md", "docs/custom.md")  # run by test_api.py and cli/test_custom_code.py


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    code: str


def tokens(name):
    return MarkdownIt("commonmark").enable("table").parse((ROOT / name).read_text())


def read_blocks(name):
    return [
        Block(name, token.map[0] + 1, token.info, token.content)
        for token in tokens(name)
        if token.type in ("fence", "code_block")
    ]


BLOCKS = [block for name in NAMES for block in read_blocks(name)]


def pages_with(language):
    return sorted({block.page for block in BLOCKS if block.language == language})


def code_of(page, language):
    return [block for block in BLOCKS if (block.page, block.language) == (page, language)]


def test_every_block_has_a_language():
    parse = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}
    parse["jsonl"] = lambda code: [json.loads(line) for line in code.splitlines()]
    known = {"bash", "python", "py", "text", *parse}
    assert [block for block in BLOCKS if block.language not in known] == []
    assert {"bash", "python", "text"} <= {block.language for block in BLOCKS}
    for block in BLOCKS:
        if block.language in parse:
            parse[block.language](block.code)


def test_lists_and_tables_follow_an_empty_line():
    """Which the site needs, and code hosts do not."""
    start = re.compile(r"([-*]|\d+\.) |\|")
    wrong = []
    for name in NAMES:
        lines = (ROOT / name).read_text().split("\n")
        for token in tokens(name):
            if token.type in ("bullet_list_open", "ordered_list_open", "table_open"):
                before = lines[token.map[0] - 1] if token.map[0] else ""
                nested = token.level > 0
                if before.strip() and not nested and not start.match(before):
                    wrong.append(f"{name}:{token.map[0] + 1}")
    assert wrong == []


# What commands are when the blocks of a page run. Each word of a line, then a record separator.
STUBS = r"""
set -euo pipefail
record() { printf '%s\0' "$@" $'\x1e' >>"$RECORD"; }
tttjax() { record tttjax "$@"; }
.venv/bin/tttjax() { record tttjax "$@"; }
python() { record python "$@"; }
bash() { record bash "$@"; }
hf() { :; }
gcloud() { :; }
docker() { :; }
kubectl() { :; }
sbatch() { SLURM_ARRAY_TASK_ID=0; for word; do [[ $word != --wrap=* ]] || eval "${word#*=}"; done; }
pip() { record pip "$@"; }
tensorboard() { :; }
source() { :; }
"""


def run_stubbed(page, folder):
    """The commands of a page's bash blocks, each a list of words, as bash makes them."""
    record = folder / "record"
    record.touch()
    script = STUBS + "\n".join(block.code for block in code_of(page, "bash"))
    environment = {"PATH": "/nowhere", "RECORD": str(record)}
    result = subprocess.run(
        [shutil.which("bash"), "-c", script], cwd=folder, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = record.read_text().split("\x1e\0")
    return [line.rstrip("\0").split("\0") for line in lines if line]


@pytest.fixture
def parse(monkeypatch):
    """parse(words): a tttjax command up to its configuration; raises UserError as the command."""
    parsed = []
    for command in main.COMMANDS.values():
        module = importlib.import_module(command.module)
        monkeypatch.setattr(module, "run", lambda args: parsed.append(args) or 0)
    monkeypatch.setattr(main, "use_code", lambda path: "")

    def check(words):
        assert main._dispatch(list(words)) == 0
        args = parsed.pop()
        specs = getattr(args, "config", None) or []
        specs = [specs] if isinstance(specs, str) else specs
        for spec in [spec for pattern in specs for spec in matching_specs(pattern)]:
            load_config(spec, args.overrides)
        if not specs:
            config = default_config()
            for override in args.overrides:
                apply_override(config, override)
        if args.command == "sweep" and specs:
            sweep._design(args, sweep.Path("nowhere"))
        if args.command == "recipes" and ":" in args.recipe:
            load_config(args.recipe)

    return check


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the files that the pages have the reader write."""
    recipe = (ROOT / "tttjax" / "recipes" / "quickstart.py").read_text()
    (tmp_path / "my.py").write_text(recipe.replace('arg or ""', 'arg or "ttt_e2e"'))
    for block in BLOCKS:
        if file := re.match(r"# (\w+\.(py|toml|yaml|json))\n", block.code):
            (tmp_path / file[1]).write_text(block.code)
    for name in ("base", "qwen-ttt", "qwen-window"):  # which recipes read
        system = "window" if name == "qwen-window" else "ttt_e2e"
        write_run_info(tmp_path / "runs" / name, recipes.get(f"paper:125m,{system},pretrain"))
    for name in ("experiments", "launch", "tests", "tttjax"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", pages_with("bash"))
def test_commands_are_what_the_programs_take(page, folder, parse):
    for program, *words in run_stubbed(page, folder):
        if program == "tttjax":
            try:
                parse(words)
            except UserError as error:
                pytest.fail(f"tttjax {' '.join(words)}: {error}")
        elif program == "pip":
            asked = {name for word in words for name in re.findall(r"\.\[([\w,-]+)\]", word)}
            assert asked <= EXTRAS.keys(), words
        elif words[0] == "-m":
            assert importlib.util.find_spec(words[1]), words
        else:
            assert (ROOT / words[0]).is_file(), words


def test_examples_of_the_help_are_commands(parse):
    """One to a line; a description follows after three spaces."""
    modules = [command.module for command in main.COMMANDS.values()]
    modules += [f"tttjax.cli.bench.{name.replace('-', '_')}" for name in BENCHMARKS]
    texts = [importlib.import_module(module).__doc__ for module in modules]
    texts = [re.sub(r" *\\\n +", " ", text) for text in texts]
    lines = [re.split(r" {3,}|>", line.strip())[0] for line in "\n".join(texts).splitlines()]
    examples = [line for line in lines if line.startswith("tttjax ") and "..." not in line]
    assert len(examples) > 50
    for line in examples:
        parse(shlex.split(line)[1:])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --config=quickstart --workdir=a --no-such-flag", "no argument '--no-such-flag'"),
        ("train --config=paper:125x --workdir=a", "125x"),
        ("train --config=quickstart --workdir=a --config.train.stepz=3", "stepz"),
        ("import hf --workdir=a --config.model.fast_mlps=true", "fast_mlps"),
        ("sweep --config=quickstart --out=a --data=b --set inner.chunk=3", "inner.chunk"),
        ("recipes paper:125x", "125x"),
    ],
)
def test_wrong_commands_are_noticed(line, words, parse):
    with pytest.raises(UserError, match=words):
        parse(line.split())


# Of launch/test.sh, tensorboard, lm-eval, sbatch, kubectl, docker.
OTHER_FLAGS = {"--fast", "--logdir", "--device", "--exclude", "--nodes", "--prefix", "--build-arg"}


def test_flags_and_fields_in_sentences_exist():
    flags = {"--help", *OTHER_FLAGS}
    for parser in main._build_parser(main.COMMANDS)[1].values():
        for action in parser._actions:
            flags |= set(action.option_strings)
            if action.nargs == "A...":  # of `bench`: its parsers
                flags |= {
                    flag for p in action.choices.values() for flag in p._option_string_actions
                }
    config = default_config()
    unknown = []
    for name in (name for name in NAMES if "results" not in name):
        spans = [
            c.content for t in tokens(name) for c in t.children or () if c.type == "code_inline"
        ]
        for word in re.split(r"[\s=]+", " ".join(spans)):
            section, _, field = word.removeprefix("--config.").partition(".")
            if section in SECTIONS and field.isidentifier() and field != "py":
                if field not in config[section]:
                    unknown.append((name, word))
            elif re.fullmatch(r"--[a-z-]+", word) and word not in flags:
                unknown.append((name, word))
    assert unknown == []


@pytest.fixture(scope="module")
def runs(make_run, data, tmp_path_factory):
    """A folder with what the examples in Python open: tiny runs, data, checkpoints of others."""
    folder = tmp_path_factory.mktemp("examples")
    ttt = {"suffix_layers": 1, "fast_mlp": True}
    made = {
        "first": make_run("docs-first", step=200, **ttt),
        "ttt_e2e": make_run("docs-ttt_e2e", **ttt),
        "window": make_run("docs-window"),
        "full": make_run("docs-full", mixers=("full",)),
    }
    for name, workdir in made.items():
        shutil.copytree(workdir, folder / "runs" / name)
    (folder / "data").mkdir()
    (folder / "data" / "books").symlink_to(data)
    write_official(folder / "checkpoints" / "125m-e2e", official_arrays(official_config()))
    return folder


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # by torch and transformers
@pytest.mark.parametrize("page", [p for p in pages_with("python") if p not in DOCTESTS])
def test_python_runs(page, runs, monkeypatch):
    monkeypatch.chdir(runs)
    names = {"__name__": "page"}
    for block in code_of(page, "python"):
        if "transformers" in block.code:
            pytest.importorskip("transformers")
            assert main.main(["export", "runs/first", "--to=hf/first"]) == 0
        code = "\n" * block.line + block.code
        exec(compile(code, ROOT / page, "exec"), names)


def test_other_tests_run_the_examples_of_their_pages():
    for block in (block for page in DOCTESTS for block in code_of(page, "python")):
        assert ">>> " in block.code or block.code.startswith("# my_"), block


def test_python_that_does_not_run_compiles():
    blocks = [block for block in BLOCKS if block.language == "py"]
    assert blocks
    for block in blocks:
        compile(block.code, block.page, "exec")
        for module, attribute in re.findall(r"from (tttjax[\w.]*) import (\w+)", block.code):
            path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            assert path.is_file(), module
            assert re.search(rf"\b{attribute}\b", path.read_text()), attribute
