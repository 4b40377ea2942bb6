"""The TTT-E2E paper's ablations at 760M, and those over inner rule and meta-gradient.

    tttjax train --config=ablations:NAME,VALUE[,...] --workdir=DIR

path,STEP                from window attention to TTT-E2E, one thing changed at a time:
  window                 window attention alone                                 2.827 [P]
  ttt_kvb                and TTT-MLP in every block: keys bound to values       2.818 [P]
  key_output             the inner model is applied to keys, with the weights   2.819 [P]
                         before the mini-batch; there are no queries
  end_loss               the inner loss is that of the next token, at the end   2.806 [P]
                         of the model: TTT-E2E, all blocks, multi-head MLPs
  ttt_e2e                the last quarter of the blocks only, single MLPs       2.805 [P]
window,K[,SYSTEM]        window of 1k, 2k, 4k, 8k tokens; SYSTEM ttt_e2e (default), window or
                         gated_deltanet
chunk,B[,SYSTEM]         mini-batch of 1k, 2k, 4k, 8k tokens; at 8k, the whole sequence, no update
                         precedes a loss; SYSTEM ttt_e2e (default) or ttt_kvb
layers,N                 last 1, 3, 6 or 12 of 24 blocks updated; pretraining
layers,N,extend,CONTEXT  the same, extended to 8k, 16k, 32k, 64k or 128k
rule,NAME                sgd, momentum, normalized_sgd, adam, muon
meta,NAME                exact, truncated2, truncated4, first_order, none
learn_lr,UNIT            learned inner rates, one for each: none, model, layer, weight
small,rule,NAME          the last three at the size of `small:0.3m,ttt_e2e`, which a laptop trains;
small,meta,NAME          windows, mini-batches and rates by `tttjax sweep --set`
small,learn_lr,UNIT

Each of 760M is `paper:760m,SYSTEM,pretrain` with one thing changed, and costs 15.2B tokens (an
extension 0.76B). Expected numbers: `PATH`, `BY_WINDOW`, `BY_CHUNK`, `BY_LAYERS` in results.py, for
example loss on DCLM at 8K 2.805 with b = 1K against 2.814 with 4K [V]; nothing is published for
rules, meta-gradients and learned rates at this size.

Where the paper is silent, our choices: MLP widths of `layers` are solved so that all have the
parameters of the published one (6 blocks, width 3328). The outer batch of `layers` is doubled in
the extension, as the paper says, at half the steps, so that the tokens stay the same. The rates
of `rule` are such that a step has about the length of the paper's (global norm 1, which is an RMS
of 1e-4 per weight at 760M, 5e-3 at the small size). The steps of `path` before the last, published
one have the MLP width that makes them as large as full attention; the multi-head MLPs have 64
entries a head, which gives the paper's state of 18M (2^20) weights. TTT-KVB reads its queries after
their own update, with the running mean over the mini-batch of the second paper, so at 8k its
weights still change within the only mini-batch, where those of `key_output` and of TTT-E2E do not.
"""

import inspect
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from tttjax.config import from_config_dict, match_parameters, parameter_count
from tttjax.config.schema import LEARNED_LRS
from tttjax.errors import UserError
from tttjax.recipes.baselines import HEAD_KVB
from tttjax.recipes.results import PATH
from tttjax.recipes.sizes import (
    CONTEXTS,
    choose,
    extension,
    match_full_attention,
    pretraining,
    run_name,
)
from tttjax.recipes.small import small

SIZE = "760m"
LENGTHS = {"1k": 1024, "2k": 2048, "4k": 4096, "8k": 8192}
LAYERS = ("1", "3", "6", "12")
WINDOW_SYSTEMS = ("ttt_e2e", "window", "gated_deltanet")
CHUNK_SYSTEMS = ("ttt_e2e", "ttt_kvb")
RULE_CHANGES: dict[str, dict[str, float]] = {
    "sgd": {"lr": 1.0},
    "momentum": {"lr": 0.1},  # 1 / (1 - momentum) steps add up
    "normalized_sgd": {"lr": 1.0},
    "adam": {"lr": 1e-4, "clip": 0.0},
    "muon": {"lr": 6e-3, "clip": 0.0},
}
SMALL_RULE_CHANGES = RULE_CHANGES | {
    "adam": {"lr": 5e-3, "clip": 0.0},
    "muon": {"lr": 5e-2, "clip": 0.0},
}
META_CHANGES: dict[str, dict[str, str | int]] = {
    "exact": {"meta_gradient": "exact"},
    "truncated2": {"meta_gradient": "truncated", "truncate_chunks": 2},
    "truncated4": {"meta_gradient": "truncated", "truncate_chunks": 4},
    "first_order": {"meta_gradient": "first_order"},
    "none": {"meta_gradient": "none"},
}


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of the ablation named `arg`, as `window,2k`."""
    name, *words = (arg or "").split(",")
    choose(name, ABLATIONS, "The ablation")
    try:
        inspect.signature(ABLATIONS[name]).bind(*words)
    except TypeError:
        raise UserError(
            f"{arg!r} has too many or too few parts; see the docstring of "
            "tttjax/recipes/ablations.py."
        ) from None
    return ABLATIONS[name](*words)


def recipes() -> list[str]:
    """The arguments of all ablations."""
    return [
        *(f"path,{step}" for step in PATH),
        *(f"window,{k},{system}" for system in WINDOW_SYSTEMS for k in LENGTHS),
        *(f"chunk,{b},{system}" for system in CHUNK_SYSTEMS for b in LENGTHS),
        *(f"layers,{n}" for n in LAYERS),
        *(f"layers,{n},extend,{context}" for n in LAYERS for context in CONTEXTS),
        *(f"rule,{rule}" for rule in RULE_CHANGES),
        *(f"meta,{meta}" for meta in META_CHANGES),
        *(f"learn_lr,{unit}" for unit in LEARNED_LRS),
        *(f"small,rule,{rule}" for rule in RULE_CHANGES),
        *(f"small,meta,{meta}" for meta in META_CHANGES),
        *(f"small,learn_lr,{unit}" for unit in LEARNED_LRS),
    ]


def _path(step: str) -> ConfigDict:
    choose(step, PATH, "The step")
    if step == "end_loss":
        config = pretraining(SIZE, "ttt_e2e")
        config.model.suffix_layers = config.model.num_layers
        config.model.fast_mlp_heads = config.model.embed_dim // HEAD_KVB
        match_full_attention(config, SIZE)
        return config
    config = pretraining(SIZE, "ttt_kvb" if step == "key_output" else step)
    if step == "key_output":
        config.model.ttt_layer.output = "key"
        match_full_attention(config, SIZE)
    return config


def _window(length: str, system: str = "ttt_e2e") -> ConfigDict:
    config = pretraining(SIZE, choose(system, WINDOW_SYSTEMS, "The system"))
    config.model.window_size = LENGTHS[choose(length, LENGTHS, "The window")]
    return config


def _chunk(length: str, system: str = "ttt_e2e") -> ConfigDict:
    config = pretraining(SIZE, choose(system, CHUNK_SYSTEMS, "The system"))
    tokens = LENGTHS[choose(length, LENGTHS, "The mini-batch")]
    if system == "ttt_kvb":
        config.model.ttt_layer.chunk_size = tokens
    else:
        config.inner.chunk_size = tokens
    return config


def _layers(number: str, stage: str = "pretrain", context: str = "") -> ConfigDict:
    choose(number, LAYERS, "The number of layers")
    if choose(stage, ("pretrain", "extend"), "The stage") == "pretrain":
        config = pretraining(SIZE, "ttt_e2e")
    else:
        config = extension(SIZE, "ttt_e2e", choose(context, CONTEXTS, "The context length"))
        config.train.batch_size *= 2
        config.train.steps //= 2
        config.optim.warmup_steps = config.train.steps // 10
        config.train.init_from = f"runs/{run_name(SIZE, f'layers{number}', 'pretrain')}"
    published = parameter_count(from_config_dict(config).model)["total"]
    config.model.suffix_layers = int(number)
    model = from_config_dict(config).model
    config.model.mlp_dim = match_parameters(model, published, multiple_of=64)
    return config


def _rule(name: str) -> ConfigDict:
    return _with_rule(pretraining(SIZE, "ttt_e2e"), RULE_CHANGES, name)


def _meta(name: str) -> ConfigDict:
    return _with_meta(pretraining(SIZE, "ttt_e2e"), name)


def _learn_lr(unit: str) -> ConfigDict:
    return _with_learned_lr(pretraining(SIZE, "ttt_e2e"), unit)


def _small(kind: str, name: str) -> ConfigDict:
    config = small("0.3m", "ttt_e2e")
    kind = choose(kind, ("rule", "meta", "learn_lr"), "The small ablation")
    if kind == "rule":
        return _with_rule(config, SMALL_RULE_CHANGES, name)
    return _with_meta(config, name) if kind == "meta" else _with_learned_lr(config, name)


def _with_rule(
    config: ConfigDict, changes: Mapping[str, Mapping[str, float]], name: str
) -> ConfigDict:
    config.inner.rule = choose(name, changes, "The rule")
    config.inner.update(changes[name])
    config.inner.lr_init = 0.1 * config.inner.lr
    return config


def _with_meta(config: ConfigDict, name: str) -> ConfigDict:
    config.inner.update(META_CHANGES[choose(name, META_CHANGES, "The meta-gradient")])
    return config


def _with_learned_lr(config: ConfigDict, unit: str) -> ConfigDict:
    config.inner.learn_lr = choose(unit, LEARNED_LRS, "The unit of a learned rate")
    return config


ABLATIONS: dict[str, Callable[..., ConfigDict]] = {
    "path": _path,
    "window": _window,
    "chunk": _chunk,
    "layers": _layers,
    "rule": _rule,
    "meta": _meta,
    "learn_lr": _learn_lr,
    "small": _small,
}
