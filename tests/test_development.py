"""What editors, pre-commit and continuous integration read names what exists."""

import configparser
import tomllib

import yaml
from helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pre_commit_runs_programs_of_the_test_extra():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["entry"].split()[0] for hook in hooks} == {"mypy", "ruff"}
    extra = " ".join(PROJECT["project"]["optional-dependencies"]["test"])
    assert "mypy>=" in extra
    assert "ruff>=" in extra


def test_editors_wrap_where_the_linter_does():
    config = configparser.ConfigParser()
    config.read_string("[top]\n" + (ROOT / ".editorconfig").read_text())
    assert config["*"]["max_line_length"] == str(PROJECT["tool"]["ruff"]["line-length"])


def test_the_workflow_tests_the_oldest_and_the_newest():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["tests"]
    versions = job["strategy"]["matrix"]
    supported = [c.rpartition(" :: ")[2] for c in PROJECT["project"]["classifiers"]]
    supported = [version for version in supported if version.startswith("3.")]
    assert versions["python"] == [supported[0], supported[-1]]
    assert PROJECT["project"]["requires-python"] == f">={supported[0]}"
    newest, oldest = versions["jax"]
    assert newest in PROJECT["project"]["dependencies"]
    assert oldest == f"{newest.replace('>=', '==')}.0"
    (script,) = (s["run"].split()[1] for s in job["steps"] if s.get("run", "").startswith("bash"))
    assert (ROOT / script).is_file()
    (step,) = (s for s in job["steps"] if s.get("run", "").startswith("bash"))
    assert step["env"]["EXTRAS"] in PROJECT["project"]["optional-dependencies"]
