"""How long a context takes to read, and how much has to be kept of it afterwards.

Both are of one sequence on one device, read as the system reads at test time. A system that does
not learn runs once over all tokens and gives the logits that follow the last; one that learns
scores every chunk and takes its steps, so the logits of all tokens are part of its work.
"""

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.config import InnerConfig, config_fingerprint
from tttjax.evaluate.runs import learning_rates, reading_model
from tttjax.meta import make_inner_loop, read_learning
from tttjax.models import Transformer, combine
from tttjax.precision import as_configured
from tttjax.report.entries import Member
from tttjax.types import Array, Params
from tttjax.whole_files import whole_file

FORMAT = 1
ROUNDS, MORE_ROUNDS, QUICK = 5, 50, 0.5


def state_bytes(member: Member, length: int) -> int:
    """Bytes that one sequence of `length` tokens leaves for the next token.

    What the mixers carry (keys and values, recurrent states), and where it learns its own fast
    weights with the state of their update rule. Weights that all sequences share are not counted.
    """
    with as_configured(member.config):
        model, inner = reading_model(member.run, member.mode, member.learning)
        shapes = [jax.eval_shape(lambda: model.init_state(length))]
        if member.mode != "off":
            shapes.append(jax.eval_shape(lambda: _fast_state(model, inner)))
    leaves = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _fast_state(model: Transformer, inner: InnerConfig) -> tuple[Any, Any]:
    loop = make_inner_loop(inner)
    fast = model.init(jax.random.key(0)).fast
    fast = jax.tree.map(lambda w: w.astype(loop.fast_dtype), fast)
    return fast, loop.rule.init(fast)


def measure_prefill(
    members: Mapping[str, Member], length: int, cache: Path, progress: TextIO | None = None
) -> dict[str, float]:
    """Median seconds for 1,000 tokens of a context of `length`, by label.

    All are compiled first, then run in turn, round after round, so that a busy machine slows all
    alike. Weights and tokens are random: the time does not depend on them. What was measured of
    the same members on the same device is not measured again.
    """
    path = cache / f"prefill-{_key(members, length)}.json"
    if path.exists():
        return json.loads(path.read_text())
    if progress is not None and jax.process_index() == 0:
        progress.write(f"report: prefill of {length:,} tokens, {len(members)} systems\n")
        progress.flush()
    readers = {label: _prepare(member, length) for label, member in members.items()}
    seconds: dict[str, list[float]] = {label: [] for label in readers}
    begun = time.perf_counter()
    while _goes_on(len(next(iter(seconds.values()))), time.perf_counter() - begun):
        for label, read in readers.items():
            start = time.perf_counter()
            jax.block_until_ready(read())
            seconds[label].append(time.perf_counter() - start)
    found = {
        # The first round warms caches and is left out.
        label: statistics.median(times[1:]) / length * 1000
        for label, times in seconds.items()
    }
    if jax.process_index() == 0:
        cache.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(found))
    return found


def _goes_on(rounds: int, seconds: float) -> bool:
    """At least 5 rounds after the first, and more of them while they are quick."""
    return rounds <= ROUNDS or (rounds <= MORE_ROUNDS and seconds < QUICK)


def _key(members: Mapping[str, Member], length: int) -> str:
    device = jax.local_devices()[0]
    facts = [FORMAT, ROUNDS, length, device.platform, device.device_kind, jax.__version__]
    facts += [
        [label, config_fingerprint(m.config), m.mode, repr(m.learning)]
        for label, m in members.items()
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _prepare(member: Member, length: int) -> Callable[[], Any]:
    """A compiled prefill with its weights and tokens in place."""
    config = member.config
    with as_configured(config):
        model, inner = reading_model(member.run, member.mode, member.learning)
        lr = learning_rates(member.run, member.mode, member.learning)[0]
        prefill = _learning_prefill(model, inner, lr) if member.mode != "off" else _plain(model)
        rng = np.random.default_rng(0)

        def random(x: jax.ShapeDtypeStruct) -> np.ndarray:
            return (0.02 * rng.standard_normal(x.shape, np.float32)).astype(x.dtype)

        token_T = rng.integers(0, model.vocab_size, length, dtype=np.int32)
        inputs = jax.tree.map(random, model.abstract_params()), token_T
        params, token_T = jax.device_put(inputs, jax.local_devices()[0])
        compiled = jax.jit(prefill).lower(params, token_T).compile()
    return lambda: compiled(params, token_T)


Prefill = Callable[[Params, Array], Any]


def _plain(model: Transformer) -> Prefill:
    def prefill(params: Params, token_T: Array) -> Array:
        weights = combine(params.slow, params.fast)
        x_TD = model.embed(params.slow, token_T)
        for part in ("prefix", "suffix"):
            x_TD, _ = model.run_part(part, weights, None, x_TD)
        return model.final_norm(weights, x_TD[-1:]) @ model.head(weights)

    return prefill


def _learning_prefill(model: Transformer, inner: InnerConfig, lr: float) -> Prefill:
    loop = make_inner_loop(inner)._replace(exact_chunks=None, remat=False)

    def prefill(params: Params, token_T: Array) -> tuple[Any, Array]:
        target_T, mask_T = jnp.roll(token_T, -1), jnp.ones(token_T.shape, bool)
        reading = read_learning(model, loop, params, token_T, target_T, mask_T, lr)
        return reading.fast, reading.token_nll_T

    return prefill


def device_name() -> str:
    """What speed is measured on, in words."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return f"the CPU ({os.cpu_count()} cores)"
    return device.device_kind
