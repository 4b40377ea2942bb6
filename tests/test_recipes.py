"""Every recipe resolves, has the paper's budget and size, and can be built (shapes only)."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tttjax.config import Config, from_config_dict, load_config, parameter_count, to_flat_dict
from tttjax.config.files import load_config_dict
from tttjax.errors import UserError
from tttjax.models import build_model

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
GOLDEN = Path(__file__).parent / "golden_configs"


def _recipe_words() -> list[str]:
    """Every recipe of the golden dump, as `paper.py:125m,full,pretrain`."""
    texts = [path.read_text() for path in sorted(GOLDEN.glob("*.txt"))]
    return [word for text in texts for word in re.findall(r"^\[(.+)\]$", text, re.MULTILINE)]


RECIPES = _recipe_words()


@functools.cache
def resolve(word: str) -> Config:
    return load_config(str(EXPERIMENTS / word))


def tokens(word: str) -> int:
    train = resolve(word).train
    return train.steps * train.batch_size * train.seq_len


def test_the_dump_is_current(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from experiments.all_recipes import dumps

    command = "run: python experiments/all_recipes.py tests/golden_configs, and review the diff"
    assert {path.name for path in GOLDEN.glob("*.txt")} == set(dumps()), command
    for name, text in dumps().items():
        assert (GOLDEN / name).read_text() == text, command


@pytest.mark.parametrize("system", ["full", "window", "hybrid", "ttt_e2e"])
@pytest.mark.parametrize(
    ("size", "billions"),
    [("125m", 2.5), ("350m", 7.1), ("760m", 15.2), ("1b", 26.2), ("3b", 54.5)],
)
def test_pretraining_budgets_are_the_papers(size, system, billions):
    pretraining = tokens(f"paper.py:{size},{system},pretrain")
    assert pretraining / 1e9 == pytest.approx(billions, abs=0.05)
    for context in ("8k", "16k", "32k", "64k", "128k"):
        share = tokens(f"paper.py:{size},{system},extend,{context}") / pretraining
        assert share == pytest.approx(0.05, rel=0.002)


def test_the_large_run_has_164_billion_tokens():
    assert tokens("paper.py:3b,ttt_e2e,pretrain,3x") / 1e9 == pytest.approx(163.6, abs=0.05)
    assert tokens("paper.py:3b,ttt_e2e,extend,128k,3x") / 1e9 == pytest.approx(3 * 2.73, abs=0.02)


@pytest.mark.parametrize(
    ("word", "values"),
    [
        (
            "paper.py:125m,ttt_e2e,pretrain",
            {
                "train.steps": 4800,
                "train.batch_size": 64,
                "train.seq_len": 8192,
                "optim.peak_lr": 3e-3,
                "optim.end_lr": 1e-5,
                "optim.warmup_steps": 480,
                "inner.lr_init": 0.1,
                "inner.lr_warmup_steps": 480,
                "inner.lr": 1.0,
                "inner.chunk_size": 1024,
                "model.window_size": 8192,
                "model.rope_theta": 5e5,
                "model.suffix_layers": 3,
            },
        ),
        (
            "paper.py:3b,ttt_e2e,extend,128k",
            {
                "train.steps": 1300,
                "train.batch_size": 16,
                "train.seq_len": 131072,
                "train.init_from": "runs/3b-ttt_e2e-pretrain",
                "optim.peak_lr": 4e-4,
                "optim.warmup_steps": 130,
                "inner.lr_init": 1.0,
                "inner.lr_warmup_steps": 0,
                "model.rope_theta": 5e5,
            },
        ),
        ("paper.py:3b,full,extend,32k", {"train.batch_size": 64, "model.rope_theta": 2e6}),
        ("paper.py:760m,full,extend,128k", {"train.batch_size": 8, "model.rope_theta": 1e7}),
        ("paper.py:760m,window,extend,128k", {"model.rope_theta": 5e5, "model.window_size": 8192}),
        ("paper.py:760m,hybrid,extend,16k", {"model.rope_theta": 1e6}),
        ("paper.py:3b,full,extend,128k,3x", {"train.init_from": "runs/3b-full-pretrain-3x"}),
        ("ablations.py:layers,6", {"model.mlp_dim": 3328}),
        ("ablations.py:layers,6,extend,32k", {"train.batch_size": 64, "train.steps": 362}),
        ("ablations.py:rule,muon", {"inner.rule": "muon"}),
        ("toy.py:e2e,16", {"inner.chunk_size": 16, "optim.peak_lr": 5e-3}),
        ("toy.py:full", {"optim.peak_lr": 3e-3, "model.mixers": ["full"]}),
    ],
)
def test_recipes_have_the_published_values(word, values):
    found = to_flat_dict(resolve(word))
    assert {name: found[name] for name in values} == values


def test_a_hybrid_has_one_full_layer_in_six():
    model = build_model(*_model_of("paper.py:760m,hybrid,pretrain"))
    assert [i for i, kind in enumerate(model.kinds) if kind == "full"] == [5, 11, 17, 23]


@pytest.mark.parametrize("number", [1, 3, 12])
def test_ablations_over_layers_keep_the_parameters(number):
    total = parameter_count(resolve("paper.py:760m,ttt_e2e,pretrain").model)["total"]
    count = parameter_count(resolve(f"ablations.py:layers,{number}").model)["total"]
    assert count == pytest.approx(total, rel=0.005)


def test_the_quickstarts_control_is_equally_large():
    counts = [
        parameter_count(resolve(f"quickstart.py:{system}").model)["total"]
        for system in ("ttt_e2e", "window")
    ]
    assert counts[0] == pytest.approx(counts[1], rel=0.005)


def _model_of(word: str):
    config = resolve(word)
    return config.model, config.inner


_ONE_WORD_PER_MODEL = {
    (model, inner.chunk_size, inner.fast_paths): word
    for word in RECIPES
    for model, inner in [_model_of(word)]
}


@pytest.mark.parametrize("word", _ONE_WORD_PER_MODEL.values())
def test_every_model_can_be_built(word):
    """Its arrays, by shape alone, are as many scalars as the formula says."""
    model, inner = _model_of(word)
    params = build_model(model, inner).abstract_params()

    def size(tree):
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    count = parameter_count(model)
    assert size(params) == count["total"]
    if inner.fast_paths:
        assert 0 < size(params.fast) < count["total"]
    else:
        assert size(params.fast) == count["fast"]


@pytest.mark.parametrize("word", RECIPES)
def test_every_recipe_resolves(word):
    config = resolve(word)
    assert from_config_dict(load_config_dict(str(EXPERIMENTS / word))) == config
    assert config.optim.warmup_steps < config.train.steps


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("paper.py", "needs SIZE,SYSTEM"),
        ("paper.py:125m", "needs SIZE,SYSTEM"),
        ("paper.py:125M,full,pretrain", "'125M' is not one of.*Did you mean '125m'"),
        ("paper.py:125m,swa,pretrain", "The system 'swa' is not one of"),
        ("paper.py:125m,full,extended,8k", "The stage 'extended' is not.*Did you mean 'extend'"),
        ("paper.py:125m,full,extend", "The context length '' is not one of 8k"),
        ("paper.py:125m,full,extend,8k,9x", "ends with '9x'"),
        ("paper.py:125m,full,pretrain,2x,8k", "ends with '2x,8k'"),
        ("ablations.py", "The ablation '' is not one of window"),
        ("ablations.py:window", "too many or too few parts"),
        ("ablations.py:rule,lion", "The rule 'lion' is not one of"),
        ("toy.py:e2e,2", "The toy 'e2e,2' is not one of"),
        ("quickstart.py:full", "The system 'full' is not one of ttt_e2e, window"),
    ],
)
def test_a_recipe_that_does_not_exist_says_so(word, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve(word)


def test_a_description_gives_command_cost_and_expectation(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from experiments.paper import describe

    text = describe("3b,ttt_e2e,extend,128k,3x")
    assert "--config=experiments/paper.py:3b,ttt_e2e,extend,128k,3x" in text
    assert "8.18B tokens" in text
    assert "2.249 [V]" in text
