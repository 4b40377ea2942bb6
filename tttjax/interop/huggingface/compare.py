"""Logits of one text, by our model and by an export under transformers, to be compared.

A model that learns while it reads does so here too, chunk by chunk: the logits of later chunks
show whether its updates are the same.
"""

import inspect
import logging
import shutil
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tttjax.data.tokenizers.base import Tokenizer
from tttjax.errors import UserError
from tttjax.models import Transformer, advance, combine
from tttjax.ops.cross_entropy.nll import masked_mean
from tttjax.ttt import inner_loop
from tttjax.ttt.outer_loss import InnerLoop, split_chunks
from tttjax.types import Array, Params

PLACES = 64  # of a chunk, or of a text that is not learned from, whose logits are compared
TOLERANCE = 1e-4  # of logits in float32, in units of the largest one if that is above 1
ROOM = 512  # tokens of a text that nothing is learned from


def sample_chunk(chunk_size: int) -> int:
    """Tokens of a chunk in the comparison: of a large one, a part shows all that is computed."""
    return min(chunk_size, PLACES)


def sample_length(chunk_size: int, *, learns: bool) -> int:
    """Tokens that show everything; of chunks, four.

    Not more: each update is computed from the one before, and differences of rounding grow.
    """
    return 4 * sample_chunk(chunk_size) if learns else ROOM


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a.astype(np.float64) - b)))


def our_logits(
    model: Transformer,
    inner: InnerLoop,
    lr: float,
    params: Params,
    token_T: np.ndarray,
    *,
    learn: bool,
) -> np.ndarray:
    """Logits [P, V] at `places` of all tokens but the last, in float32."""
    read = _compiled(model, inner, lr, learn)
    inputs, targets = token_T[:-1], token_T[1:]
    return np.asarray(read(params, jnp.asarray(inputs), jnp.asarray(targets)), np.float32)


@lru_cache(maxsize=2)
def _compiled(model: Transformer, inner: InnerLoop, lr: float, learn: bool):
    return jax.jit(partial(_read_and_learn, model, inner, lr) if learn else partial(_read, model))


def places(length: int, chunk_size: int, *, learn: bool) -> np.ndarray:
    """At which of `length` tokens logits are compared."""
    size = chunk_size if learn else length
    return np.concatenate(
        [np.arange(start, start + size, _stride(size)) for start in range(0, length, size)]
    )


def _stride(size: int) -> int:
    return max(1, size // PLACES)


def _read(model: Transformer, params: Params, input_T: Array, target_T: Array) -> Array:
    del target_T
    weights = combine(params.slow, params.fast)
    x_TD = model.embed(params.slow, input_T)
    for part in ("prefix", "suffix"):
        x_TD, _ = model.run_part(part, weights, None, x_TD)
    x_PD = x_TD[:: _stride(len(input_T))]
    return model.logits(weights, model.final_norm(weights, x_PD))


def _read_and_learn(
    model: Transformer,
    inner: InnerLoop,
    lr: float,
    params: Params,
    input_T: Array,
    target_T: Array,
) -> Array:
    weights = combine(params.slow, params.fast)
    x_TD, _ = model.run_part("prefix", weights, None, model.embed(params.slow, input_T))

    def chunk_loss(fast, state, chunk):
        x_CD, target_C = chunk
        now = combine(params.slow, fast)
        x_CD, state = model.run_part("suffix", now, state, x_CD, remat=False)
        nll_C = model.nll(now, x_CD, target_C)
        x_PD = x_CD[:: _stride(inner.chunk_size)]
        shown = model.logits(now, model.final_norm(now, x_PD))
        is_target_C = jnp.ones(target_C.shape, bool)
        loss = masked_mean(nll_C, is_target_C)
        return loss, (advance(state, len(x_CD)), jnp.any(is_target_C), shown)

    fast = jax.tree.map(lambda w: w.astype(inner.fast_dtype), params.fast)
    state = model.init_state(len(input_T), parts=["suffix"])
    chunks = tuple(split_chunks(x, inner.chunk_size) for x in (x_TD, target_T))
    start = inner_loop.start(inner.rule, fast, state)
    _, records = inner_loop.adapt(chunk_loss, inner.rule, lr, start, chunks, remat=False)
    return records.aux.reshape(-1, records.aux.shape[-1])


def their_logits(
    folder: Path,
    token_T: np.ndarray,
    at_P: Sequence[int] | np.ndarray,
    *,
    chunk_size: int = 0,
    trusted: bool = True,
) -> np.ndarray | None:
    """Logits [P, V] by transformers, in float32; None if transformers or torch is not installed.

    chunk_size: at which a model that learns does so (0: its own). trusted: whether code that lies
    in the folder may be run. Raises UserError if transformers cannot open it.
    """
    with warnings.catch_warnings():  # of other libraries, about themselves
        warnings.simplefilter("ignore")
        try:
            import torch
            import transformers
        except ImportError:
            return None
        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                trust_remote_code=trusted,
                # Neither pickles nor kernels fetched by name, which a config.json may ask for.
                use_safetensors=True,
                attn_implementation="sdpa",
            )
        except Exception as error:  # the library has no common kind of errors
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"transformers cannot open {folder}, so nothing could be compared ({reason})"
            ) from error
        model.config.chunk_size = chunk_size or getattr(model.config, "chunk_size", 0)
        with torch.no_grad():
            ids = torch.from_numpy(token_T[None, :-1].astype(np.int64))
            logit_TV = model.eval()(ids).logits[0]
        if type(model).__module__.startswith("transformers_modules."):
            # transformers keeps a copy of the code under the folder's name, which is temporary.
            above = Path(inspect.getfile(type(model))).parents
            copy = next(path for path in above if path.parent.name == "transformers_modules")
            shutil.rmtree(copy, ignore_errors=True)
        return logit_TV[torch.from_numpy(np.asarray(at_P))].numpy()


def same_tokens(folder: Path, tokenizer: Tokenizer, text: str) -> bool:
    """Whether transformers cuts a text into our tokens; True where it has no tokenizer to load."""
    if not (folder / "tokenizer.json").exists():
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        # Beside code of ours, which AutoTokenizer would load too, this is what it comes to.
        is_own = (folder / "modeling_tttjax.py").exists()
        loader = transformers.PreTrainedTokenizerFast if is_own else transformers.AutoTokenizer
        theirs = loader.from_pretrained(folder)
        return theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text).tolist()
