"""What the TTT-E2E paper reports, in nats per token, for the recipes that it reports on.

Each number comes with its source: [P] the paper's text or tables; [V] read off its vector figures
(to about 0.0005); [R] an independent replication with the official code at 125M and 760M.
"""

# 3B after 3x tokens, loss on held-out books by context of extension and evaluation [V].
BOOKS_3B_3X = {
    "full": {"8k": 2.328, "16k": 2.301, "32k": 2.283, "64k": 2.270, "128k": 2.261},
    "window": {"8k": 2.328, "16k": 2.307, "32k": 2.299, "64k": 2.301, "128k": 2.309},
    "hybrid": {"8k": 2.328, "16k": 2.304, "32k": 2.288, "64k": 2.280, "128k": 2.276},
    "mamba2": {"8k": 2.312, "16k": 2.291, "32k": 2.283, "64k": 2.285, "128k": 2.293},
    "gated_deltanet": {"8k": 2.322, "16k": 2.301, "32k": 2.291, "64k": 2.289, "128k": 2.295},
    "ttt_kvb": {"8k": 2.319, "16k": 2.298, "32k": 2.291, "64k": 2.293, "128k": 2.305},
    "ttt_e2e": {"8k": 2.314, "16k": 2.288, "32k": 2.270, "64k": 2.258, "128k": 2.249},
}
# Minus full attention by size, 1x tokens [V].
DELTA_DCLM_8K = {
    "ttt_e2e": {"125m": -0.043, "350m": -0.034, "760m": -0.022, "1b": -0.021, "3b": -0.019},
    "gated_deltanet": {"125m": -0.053, "350m": -0.027, "760m": -0.018, "1b": -0.014, "3b": -0.014},
}
DELTA_BOOKS_32K = {
    "ttt_e2e": {"125m": -0.060, "350m": -0.042, "760m": -0.027, "1b": -0.024, "3b": -0.022},
    "gated_deltanet": {"125m": -0.044, "350m": -0.017, "760m": -0.003, "1b": 0.001, "3b": 0.001},
}
# Minus full attention at 760M by token multiple [V].
DELTA_DCLM_8K_760M = {
    "ttt_e2e": {1: -0.022, 2: -0.019, 3: -0.016, 4: -0.016, 5: -0.016},
    "gated_deltanet": {1: -0.018, 2: -0.010, 3: -0.003, 4: -0.003, 5: -0.003},
}
DELTA_BOOKS_32K_760M = {
    "ttt_e2e": {1: -0.027, 2: -0.021, 3: -0.018, 4: -0.017, 5: -0.017},
    "gated_deltanet": {1: -0.003, 2: 0.007, 3: 0.013, 4: 0.013, 5: 0.013},
}
# Pretraining loss on held-out DCLM at 8K, 1x tokens.
DCLM_8K = {
    ("125m", "full"): "3.524 [R]",
    ("125m", "window"): "3.524 [R], as full attention: the window is as long as the sequence",
    ("125m", "ttt_e2e"): "3.481 [R]",
    ("760m", "full"): "2.827 [V]",
    ("760m", "window"): "2.827 [P, Table 1]",
    ("760m", "gated_deltanet"): "2.809 [P] (2.814 without QK-norm)",
    ("760m", "ttt_kvb"): "2.818 [P, Table 1]",
    ("760m", "ttt_e2e"): "2.805 [P, Table 1]",
}
BOOKS_32K = {
    ("125m", "ttt_e2e"): "3.273 [R]",
    ("760m", "gated_deltanet"): "2.683 [P] (2.691 without QK-norm)",
    ("760m", "ttt_e2e"): "2.675 [R]",
}
# Training FLOPs per token at 3B when pretrained at 8K and extended to 128K, in 1e10 [V].
TRAIN_FLOPS_3B = {
    "full": {"8k": 2.12, "128k": 8.16},
    "window": {"8k": 2.12, "128k": 2.50},
    "hybrid": {"8k": 2.12, "128k": 3.39},
    "mamba2": {"8k": 1.71, "128k": 2.09},
    "gated_deltanet": {"8k": 1.75, "128k": 2.13},
    "ttt_kvb": {"8k": 2.18, "128k": 2.56},
    "ttt_e2e": {"8k": 2.99, "128k": 3.36},
}

# Ablations at 760M, pretrained at 8K, loss on DCLM [V].
BY_WINDOW = {
    "window": {"1k": 2.860, "2k": 2.840, "4k": 2.831, "8k": 2.827},
    "gated_deltanet": {"1k": 2.823, "2k": 2.818, "4k": 2.812, "8k": 2.809},
    "ttt_e2e": {"1k": 2.827, "2k": 2.813, "4k": 2.806, "8k": 2.805},
}
BY_CHUNK = {
    "ttt_kvb": {"1k": 2.818, "2k": 2.820, "4k": 2.822, "8k": 2.826},
    "ttt_e2e": {"1k": 2.805, "2k": 2.807, "4k": 2.814, "8k": 2.825},
}
# From window attention to TTT-E2E, one thing changed at a time [P, Table 1].
PATH = {"window": 2.827, "ttt_kvb": 2.818, "key_output": 2.819, "end_loss": 2.806, "ttt_e2e": 2.805}
# By blocks updated: minus full attention, on books, at the context of extension [V].
BY_LAYERS = {
    1: {"8k": -0.026, "16k": -0.025, "32k": -0.023, "64k": -0.020, "128k": -0.017},
    3: {"8k": -0.029, "16k": -0.029, "32k": -0.027, "64k": -0.024, "128k": -0.022},
    6: {"8k": -0.027, "16k": -0.027, "32k": -0.026, "64k": -0.026, "128k": -0.026},
    12: {"8k": -0.026, "16k": -0.027, "32k": -0.027, "64k": -0.026, "128k": -0.028},
}


def expected(size: str, system: str, stage: str, context: str, multiple: int) -> str:
    """The published results to expect of a recipe, with sources; says so if there are none."""
    result = []
    recipe = size, system, multiple
    if stage == "pretrain":
        if multiple == 1 and (size, system) in DCLM_8K:
            result.append(f"loss on DCLM at 8K {DCLM_8K[size, system]}")
        delta = _delta(recipe, DELTA_DCLM_8K, DELTA_DCLM_8K_760M)
        if delta is not None:
            result.append(f"{delta:+.3f} against full attention on DCLM at 8K [V]")
    else:
        if (size, multiple) == ("3b", 3) and system in BOOKS_3B_3X:
            result.append(f"loss on books at {context} {BOOKS_3B_3X[system][context]:.3f} [V]")
        if context == "32k" and multiple == 1 and (size, system) in BOOKS_32K:
            result.append(f"loss on books at 32k {BOOKS_32K[size, system]}")
        delta = _delta(recipe, DELTA_BOOKS_32K, DELTA_BOOKS_32K_760M)
        if context == "32k" and delta is not None:
            result.append(f"{delta:+.3f} against full attention on books at 32k [V]")
    return "; ".join(result) or "no number is published"


def _delta(recipe: tuple[str, str, int], by_size: dict, at_760m: dict) -> float | None:
    size, system, multiple = recipe
    if system not in by_size:
        return None
    if multiple == 1:
        return by_size[system][size]
    return at_760m[system].get(multiple) if size == "760m" else None
