"""Logits of a sample text by tttjax and by transformers, to compare a model with its export.

A model with test-time training updates its fast weights here too, chunk by chunk: the logits of
later chunks show whether the updates agree.
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
from tttjax.inference.prefill import (
    Context,
    InferenceModel,
    extend,
    init_context,
    logits,
    make_inference_model,
    read_chunks,
    split_weights,
)
from tttjax.models.stacking import combine
from tttjax.models.transformer import Transformer
from tttjax.ttt.outer_loss import InnerLoop
from tttjax.types import Array, Params

MAX_POSITIONS = 64  # positions compared in each chunk, or in the text if the model is static
TOLERANCE = 1e-4  # of float32 logits, relative to the largest one if that is above 1
STATIC_LENGTH = 512  # sample length of a static model, in tokens


def sample_chunk(chunk_size: int) -> int:
    """Chunk size in the comparison, in tokens; large chunks are shortened."""
    return min(chunk_size, MAX_POSITIONS)


def sample_length(chunk_size: int, *, learns: bool) -> int:
    """Length of the sample in tokens: four chunks if the model learns.

    Not more, because rounding differences grow with every update.
    """
    return 4 * sample_chunk(chunk_size) if learns else STATIC_LENGTH


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a.astype(np.float64) - b)))


def tttjax_logits(
    model: Transformer,
    inner: InnerLoop,
    lr: float,
    params: Params,
    token_T: np.ndarray,
    *,
    learn: bool,
) -> np.ndarray:
    """float32 logits [P, V] at `sample_positions` of all tokens but the last."""
    compute = _compiled(model, inner, lr, learn)
    return np.asarray(compute(params, jnp.asarray(token_T)), np.float32)


@lru_cache(maxsize=2)
def _compiled(model: Transformer, inner: InnerLoop, lr: float, learn: bool):
    def static(params: Params, token_T: Array) -> Array:
        return static_logits(model, params, token_T[:-1], _stride(len(token_T) - 1))

    inference_model = make_inference_model(model, inner, lr, learn=learn)
    return jax.jit(partial(_ttt_logits, inference_model) if learn else static)


def sample_positions(length: int, chunk_size: int, *, learn: bool) -> np.ndarray:
    """Positions [P], of `length` tokens, whose logits are compared."""
    size = chunk_size if learn else length
    return np.concatenate(
        [np.arange(start, start + size, _stride(size)) for start in range(0, length, size)]
    )


def _stride(size: int) -> int:
    return max(1, size // MAX_POSITIONS)


def static_logits(model: Transformer, params: Params, token_T: Array, stride: int = 1) -> Array:
    """Logits [T / stride, V] of every `stride`-th token, without inner updates."""
    weights = combine(params.slow, params.fast)
    x_TD = model.embed(params.slow, token_T)
    for part in ("prefix", "suffix"):
        x_TD, _ = model.run_part(part, weights, None, x_TD)
    return model.logits(weights, model.final_norm(weights, x_TD[::stride]))


def _ttt_logits(inference_model: InferenceModel, params: Params, token_T: Array) -> Array:
    weights, size = split_weights(inference_model, params), inference_model.chunk_size
    context = init_context(inference_model, params, batch=1, max_length=len(token_T) - 1)

    def read(context: Context, chunk: tuple[Array, Array]) -> tuple[Context, Array]:
        """The logits of a chunk before its update, and the context after it."""
        token_1C, next_1 = chunk
        _, h_1CD = extend(inference_model, weights, context, token_1C)
        logit_1PV = logits(inference_model, weights, context, h_1CD[:, :: _stride(size)])
        context, _ = read_chunks(inference_model, weights, context, token_1C, next_1)
        return context, logit_1PV[0]

    chunks = token_T[:-1].reshape(-1, 1, size), token_T[size::size, None]
    _, logit_NPV = jax.lax.scan(read, context, chunks)
    return logit_NPV.reshape(-1, logit_NPV.shape[-1])


def transformers_logits(
    folder: Path,
    token_T: np.ndarray,
    position_P: Sequence[int] | np.ndarray,
    *,
    chunk_size: int = 0,
    trust_code: bool = True,
) -> np.ndarray | None:
    """float32 logits [P, V] by transformers; None if transformers or torch is not installed.

    chunk_size: replaces the export's chunk size (0: keeps it). trust_code: whether to run modeling
    code in the folder. Raises UserError if transformers cannot load it.
    """
    with warnings.catch_warnings():  # by torch and transformers
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
                trust_remote_code=trust_code,
                # A config.json may name pickles or kernels to download: load neither.
                use_safetensors=True,
                attn_implementation="sdpa",
            )
        except Exception as error:  # transformers has no common base class of errors
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"transformers cannot open {folder}, so logits were not compared ({reason})"
            ) from error
        model.config.chunk_size = chunk_size or getattr(model.config, "chunk_size", 0)
        with torch.no_grad():
            ids = torch.from_numpy(token_T[None, :-1].astype(np.int64))
            logit_TV = model.eval()(ids).logits[0]
        if type(model).__module__.startswith("transformers_modules."):
            # Remove transformers' cached copy of the code, named after the temporary folder.
            parents = Path(inspect.getfile(type(model))).parents
            copy = next(path for path in parents if path.parent.name == "transformers_modules")
            shutil.rmtree(copy, ignore_errors=True)
        return logit_TV[torch.from_numpy(np.asarray(position_P))].numpy()


def same_tokens(folder: Path, tokenizer: Tokenizer, text: str) -> bool:
    """Whether transformers' tokenizer gives our tokens; True if the folder has no tokenizer."""
    if not (folder / "tokenizer.json").exists():
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        # AutoTokenizer would load our modeling code, only to pick this class.
        is_own = (folder / "modeling_tttjax.py").exists()
        loader = transformers.PreTrainedTokenizerFast if is_own else transformers.AutoTokenizer
        their_tokenizer = loader.from_pretrained(folder)
        return (
            their_tokenizer(text, add_special_tokens=False).input_ids
            == tokenizer.encode(text).tolist()
        )
