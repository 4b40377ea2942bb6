"""The toy of the TTT-E2E paper's appendix A: can test-time training replace attention?

    tttjax train --config=toy:NAME --workdir=DIR

NAME      what                                                mean loss over 128 tokens [V]
full      attention                                                 5.196
none      no attention, TTT off                                     5.881
naive,1   the same model, with dynamic evaluation after each token  5.769
e2e,1     TTT-E2E, an update after each token                       5.242
e2e,16    TTT-E2E, mini-batches of 16 tokens                        5.439

[V]: read off the paper's figure. Two blocks, width 384, 6 heads, 128 tokens of DCLM with the
Llama 3 tokenizer, batches of 125K tokens; the learning rate is 3e-3 with attention, 5e-3 without.
`none` and `naive,1` are trained alike and differ in evaluation only.

Cost: 71M tokens each. The paper's "Chinchilla tokens" are read as 20 for each parameter outside
the embedding. It states neither MLP width, nor which MLPs are updated, nor the inner rate; ours:
1,024; those of both blocks, which makes all models without attention equal in size; and the step
of the main recipe, rate 1 clipped to norm 1.
"""

from ml_collections import ConfigDict

from tttjax.config import default_config, from_config_dict, parameter_count
from tttjax.recipes.sizes import THETA, VOCAB_SIZE, choose

CONTEXT = 128
BATCH = 976  # sequences: 124,928 tokens
NAMES = ("full", "none", "naive,1", "e2e,1", "e2e,16")
TOKENS_PER_PARAMETER = 20


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration of one row of the table above; default e2e,1."""
    kind, _, chunk = choose(arg or "e2e,1", NAMES, "The toy").partition(",")
    config = _model("full")
    full_size = parameter_count(from_config_dict(config).model)["non_embedding"]
    if kind != "full":
        config = _model("none")
        config.model.suffix_layers = config.model.num_layers
        config.optim.peak_lr = 5e-3
    if kind in ("naive", "e2e"):
        config.inner.fast_paths = ("suffix/**/mlp/**",)
        config.inner.chunk_size = int(chunk)
        config.inner.meta_gradient = "exact" if kind == "e2e" else "none"
    config.train.steps = round(TOKENS_PER_PARAMETER * full_size / (BATCH * CONTEXT))
    config.optim.warmup_steps = config.train.steps // 10
    return config


def recipes() -> list[str]:
    """The arguments of all toys."""
    return list(NAMES)


def _model(mixer: str) -> ConfigDict:
    config = default_config()
    config.model.update(
        vocab_size=VOCAB_SIZE,
        embed_dim=384,
        num_layers=2,
        num_heads=6,
        mlp_dim=1024,
        mixers=(mixer,),
        window_size=CONTEXT,
        rope_theta=THETA,
    )
    config.inner.chunk_size = CONTEXT
    config.optim.peak_lr = 3e-3
    config.train.update(batch_size=BATCH, seq_len=CONTEXT)
    config.data.sources = ("data/dclm",)
    config.eval.context_lengths = (CONTEXT,)
    return config
