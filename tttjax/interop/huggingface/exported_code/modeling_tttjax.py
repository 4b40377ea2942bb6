# Copyright The tttjax authors. SPDX-License-Identifier: Apache-2.0
"""A Transformer that keeps learning while it reads (TTT-E2E, arXiv 2512.23675), in PyTorch.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=100)

After every chunk of `config.chunk_size` tokens the parameters in `config.fast_parameters` take a
gradient step on the chunk's own loss: what was read is learned, and memory does not grow with it
(but for full attention). A chunk is learned from once the token after it, its last target, is
known; logits are always those from before the step. Each sequence of a batch has fast weights of
its own, in float32, which live in the cache: the model's own parameters never change. So a new
cache is a new reader, and any split of a text into calls with one cache gives the same numbers.

`learn=False` in `forward` and `generate` reads tokens without learning from them. Tokens that the
attention mask leaves out are not read at all; their logits are 0.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tttjax import TTTJaxConfig

PIECE = 1024  # tokens at a time where nothing is learned


# --- layers: activations are [batch, tokens, ...], and weights are cast to their dtype ---------


class TTTJaxLinear(nn.Linear):
    """Its weight may be wider than the activations, as fast weights are."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class TTTJaxRMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 up to the last rounding."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class TTTJaxMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = TTTJaxLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = TTTJaxLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = TTTJaxLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_frequencies(config, device):
    """Radians per token of each pair of entries of a head; "default", "linear" or "llama3"."""
    rope = config.rope_parameters
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency = rope["rope_theta"] ** (-exponent / config.head_dim)
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return frequency / rope["factor"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * ((1 - kept) / rope["factor"] + kept)
    return frequency


def rotate(x, position, frequency):
    """Turns pairs of entries (i, i + K/2) of every head by position * frequency[i]."""
    angle = (position[:, None] * frequency)[:, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class TTTJaxAttention(nn.Module):
    """Causal attention to everything, or to the last `window` tokens.

    The past is kept as keys (normed, not yet rotated) and values. Positions are counted from the
    first key that is kept: rotary attention depends on distances alone.
    """

    def __init__(self, config, layer):
        super().__init__()
        width, size = config.hidden_size, config.head_dim
        into = config.num_attention_heads * size, config.num_key_value_heads * size
        self.q_proj = TTTJaxLinear(width, into[0], bias=False)
        self.k_proj = TTTJaxLinear(width, into[1], bias=False)
        self.v_proj = TTTJaxLinear(width, into[1], bias=False)
        self.o_proj = TTTJaxLinear(into[0], width, bias=False)
        if config.qk_norm:
            self.q_norm = TTTJaxRMSNorm(size, config.rms_norm_eps)
            self.k_norm = TTTJaxRMSNorm(size, config.rms_norm_eps)
        self.config = config
        slides = config.layer_types[layer] == "sliding_attention"
        self.window = config.sliding_window if slides else None

    def forward(self, x, past):
        config, (batch, length, _) = self.config, x.shape
        shape = batch, length, -1, config.head_dim
        q, k, v = (p(x).view(shape) for p in (self.q_proj, self.k_proj, self.v_proj))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=1), torch.cat((past[1], v), dim=1)
        keys = k.shape[1]
        new_past = tuple(_last(x, (self.window or keys + 1) - 1) for x in (k, v))

        position = torch.arange(keys, device=x.device)
        frequency = rope_frequencies(config, x.device)
        query, k = position[-length:], rotate(k, position, frequency)
        q = rotate(q, query, frequency)
        seen = position <= query[:, None]
        if self.window is not None:
            seen &= position > query[:, None] - self.window
        groups = config.num_attention_heads // config.num_key_value_heads
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        k, v = (a.repeat_interleave(groups, dim=1) for a in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1)), new_past


class TTTJaxLayer(nn.Module):
    """Attention, fast MLP (in the last layers), MLP: each x += post_norm(branch(norm(x)))."""

    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = TTTJaxAttention(config, layer)
        self.mlp, branches = TTTJaxMLP(config), ["mixer", "mlp"]
        if layer >= config.num_hidden_layers - config.fast_mlp_layers:
            self.fast_mlp = TTTJaxMLP(config)
            branches.append("fast_mlp")
        for branch in branches:
            for name, on in (("norm", config.pre_norm), ("post_norm", config.post_norm)):
                norm = TTTJaxRMSNorm(config.hidden_size, config.rms_norm_eps)
                setattr(self, f"{branch}_{name}", norm if on else nn.Identity())

    def forward(self, x, past):
        y, past = self.self_attn(self.mixer_norm(x), past)
        x = x + self.mixer_post_norm(y)
        if hasattr(self, "fast_mlp"):
            x = x + self.fast_mlp_post_norm(self.fast_mlp(self.fast_mlp_norm(x)))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x))), past


class TTTJaxModel(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [TTTJaxLayer(config, layer) for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = TTTJaxRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, past, first, last):
        """Layers first..last-1 of token ids or hidden states: (hidden states, new past)."""
        if first == 0:
            x = self.embed_tokens(x)
        past = list(past)
        for i in range(first, last):
            x, past[i] = self.layers[i](x, past[i])
        return (self.norm(x) if last == len(self.layers) else x), past


# --- what was read ----------------------------------------------------------------------------


@dataclass
class Reading:
    """What sequences that are read together have left behind. Tensors are replaced, not changed.

    past: (keys, values) of every layer after all tokens. Of one sequence that learns also: fast,
    its weights; learned, the past after the last chunk that was learned from; pending, the tokens
    since then, and whether each is a target to learn from (counted).
    """

    past: list
    fast: dict = field(default_factory=dict)
    learned: list | None = None
    pending: torch.Tensor | None = None
    counted: torch.Tensor | None = None

    def row(self, i):
        """Sequence i alone, of several that do not learn."""
        return Reading([layer and tuple(x[i : i + 1] for x in layer) for layer in self.past])


class TTTJaxCache:
    """The readings of a batch, and how many tokens it was given, padding included."""

    is_compileable = False
    is_croppable = False

    def __init__(self, readings):
        self.readings, self.length = readings, 0

    def get_seq_length(self, layer_idx=0):
        return self.length

    def reorder_cache(self, beam_idx):
        """Sequences in another order, some of them several times, for beam search."""
        rows = beam_idx.tolist()
        if len(self.readings) == 1 and len(rows) > 1:
            self.readings = [self.readings[0].row(i) for i in range(len(rows))]
        self.readings = [Reading(**vars(self.readings[i])) for i in rows]


class TTTJaxForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model; see the top of this file."""

    config_class = TTTJaxConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _is_stateful = True  # nothing that was read can be taken back
    _no_split_modules = ["TTTJaxLayer"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = TTTJaxModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = TTTJaxLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        """The tokens that the cache has not been given yet."""
        new = kwargs.pop("next_sequence_length", None)
        if new is None and past_key_values is not None:
            new = input_ids.shape[1] - past_key_values.get_seq_length()
        ids = input_ids if new is None else input_ids[:, -new:]
        names = ("attention_mask", "use_cache", "logits_to_keep", "learn")
        kept = {name: kwargs[name] for name in names if name in kwargs}
        return {"input_ids": ids, "past_key_values": past_key_values, **kept}

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        learn=None,
        **kwargs,
    ):
        """Reads further tokens [B, T] of every sequence; logits [B, T or logits_to_keep, V].

        learn: whether these tokens are learned from, now or once their chunk is full (default:
        `config.learn`). With learn=False and use_cache=False, or without fast parameters, logits
        can be differentiated; else they are constants.
        labels: as everywhere in transformers: shifted here, -100 where nothing counts.
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("this model reads input_ids: it needs them as targets to learn from")
        learn = self.config.learn if learn is None else learn
        use_cache = self.config.use_cache if use_cache is None else use_cache
        batch, length = input_ids.shape
        seen = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            seen = attention_mask[:, -length:].bool()
            if seen.shape != input_ids.shape:
                raise ValueError("this model takes attention masks [batch, tokens] only")

        cache, learns = past_key_values, self.config.fast_parameters and (learn or use_cache)
        if cache is None:
            apart = batch if learns or not seen.all() else 1
            cache = TTTJaxCache([self._new_reading(learns) for _ in range(apart)])
        rows = batch // len(cache.readings)
        if rows > 1 and not seen.all():
            raise ValueError("sequences that began without padding cannot go on with it")
        kept = logits_to_keep or length
        logits = []
        for i, reading in enumerate(cache.readings):
            ids, mask = input_ids[i * rows : (i + 1) * rows], seen[i * rows]
            shown = self._read(reading, ids[:, mask], learn, int(mask[-kept:].sum()))
            if not mask.all():
                padded = shown.new_zeros(rows, len(mask[-kept:]), shown.shape[-1])
                padded[:, mask[-kept:]] = shown
                shown = padded
            logits.append(shown)
        cache.length += length
        logits = torch.cat(logits)
        loss = None
        if labels is not None:
            targets = _last(labels, logits.shape[1] - 1)
            flat = logits[:, :-1].flatten(0, 1).float(), targets.flatten()
            loss = F.cross_entropy(*flat, ignore_index=-100)
        kept_cache = cache if use_cache else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=kept_cache)

    def _new_reading(self, learns):
        past = [None] * self.config.num_hidden_layers
        if not learns:
            return Reading(past)
        fast = {name: self.get_parameter(name) for name in self.config.fast_parameters}
        fast = {name: weight.detach().float() for name, weight in fast.items()}
        none = torch.zeros(1, 0, dtype=torch.long, device=self.device)
        return Reading(past, fast, past, none, none[0].bool())

    def _read(self, reading, ids, learn, kept):
        """Reads tokens [B, T]; the logits of the last `kept` of them [B, kept, V]."""
        shown = [torch.zeros(*ids.shape[:1], 0, self.config.vocab_size).to(ids.device, self.dtype)]

        def show(logits):
            enough = logits.shape[1] >= kept
            shown[:] = [_last(logits, kept)] if enough else [*shown, logits]

        if not reading.fast:
            for piece in ids.split(PIECE, dim=1) if ids.shape[1] else ():
                hidden, reading.past = self.model(piece, reading.past, 0, len(self.model.layers))
                show(self._logits(hidden))
            return _last(torch.cat(shown, dim=1), kept)
        with torch.inference_mode(False), torch.no_grad():
            size, old = self.config.chunk_size, reading.pending.shape[1]
            known = torch.cat((reading.pending, ids.clone()), dim=1)
            marks = torch.full(ids.shape[1:], bool(learn), device=ids.device)
            counted = torch.cat((reading.counted, marks))
            while known.shape[1] > size:  # of the pending tokens, logits are out already
                logits = self._read_chunk(reading, known[:, : size + 1], counted[1 : size + 1])
                show(logits[:, old:])
                known, counted, old = known[:, size:], counted[size:], 0
            if known.shape[1] > old:
                logits, reading.past = self._run(reading.fast, known[:, old:], reading.past)
                show(logits)
            reading.pending, reading.counted = known, counted
        return _last(torch.cat(shown, dim=1), kept)

    def _read_chunk(self, reading, known, counted):
        """Reads a chunk from where the last one was learned from, and learns from it.

        known: its tokens and the one after it, [1, chunk + 1]; counted: which targets count.
        Returns the logits from before the step.
        """
        config, learns = self.config, bool(counted.any())
        fast = {name: w.detach().requires_grad_(learns) for name, w in reading.fast.items()}
        with torch.set_grad_enabled(learns):
            logits, past = self._run(fast, known[:, :-1], reading.learned)
        if learns:
            with torch.enable_grad():
                nll = F.cross_entropy(logits[0].float(), known[0, 1:], reduction="none")
                loss = nll[counted].mean()
            gradient = torch.autograd.grad(loss, list(fast.values()))
            norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
            clip = config.inner_clip
            if config.inner_normalize:
                scale = torch.where(norm > 0, (clip or 1.0) / norm, 0.0)
            else:
                scale = torch.where(norm < (clip or math.inf), 1.0, clip / norm)
            pairs = zip(fast.items(), gradient, strict=True)
            reading.fast = {n: w.detach() - config.inner_lr * scale * g for (n, w), g in pairs}
        reading.past = reading.learned = [tuple(x.detach() for x in layer) for layer in past]
        return logits.detach()

    def _run(self, fast, ids, past):
        """(logits, new past) of tokens with the fast weights; layers below them are constant."""
        layers = len(self.model.layers)
        first = min((int(n.split(".")[2]) for n in fast if ".layers." in n), default=layers - 1)
        x = ids
        if first:
            with torch.no_grad():
                x, past = self.model(ids, past, 0, first)
        inside = {n.removeprefix("model."): w for n, w in fast.items() if n.startswith("model.")}
        hidden, past = functional_call(self.model, inside, (x, past, first, layers))
        return self._logits(hidden, fast.get("lm_head.weight")), past

    def _logits(self, hidden, head=None):
        if head is None:
            head = (self.lm_head if hasattr(self, "lm_head") else self.model.embed_tokens).weight
        return F.linear(hidden, head.to(hidden.dtype))


def _last(x, count):
    """The last `count` of [batch, tokens, ...]."""
    return x[:, max(0, x.shape[1] - count) :]
