"""The network's fields."""

import dataclasses
from dataclasses import dataclass

from tttjax.config.fields import declare
from tttjax.config.mixer import MixerConfig
from tttjax.models.attention.config import AttentionConfig
from tttjax.models.gated_deltanet.config import GatedDeltaNetConfig
from tttjax.models.kda.config import KDAConfig
from tttjax.models.mamba2.config import Mamba2Config
from tttjax.models.ttt_layer.config import TTTLayerConfig

# A new mixer is added here, and as a field of `ModelConfig`.
MIXERS = (AttentionConfig, Mamba2Config, GatedDeltaNetConfig, KDAConfig, TTTLayerConfig)


@dataclass(frozen=True)
class ModelConfig:
    """The network. The two papers' sizes are in `tttjax/recipes/sizes.py`."""

    vocab_size: int = declare(
        32000, "Entries of the vocabulary; at least that of the tokenizer.", minimum=1
    )
    embed_dim: int = declare(256, "Width of the residual stream (D).", minimum=1)
    num_layers: int = declare(8, "Blocks, those of the suffix included (L).", minimum=1)
    num_heads: int = declare(4, "Attention heads (H).", minimum=1)
    head_dim: int = declare(
        0, "Entries of one head (K), even; 0: embed_dim / num_heads.", minimum=0
    )
    num_kv_heads: int = declare(
        0,
        "KV heads (G), a divisor of num_heads: each serves num_heads / G query heads, and KV "
        "caches and sessions hold only these; 0: num_heads.",
        minimum=0,
        omit_default_in_hash=True,
    )
    mlp_dim: int = declare(
        512,
        "Hidden entries of each SwiGLU MLP (F), static and fast alike; 0: blocks without an MLP.",
        minimum=0,
    )
    mixers: tuple[str, ...] = declare(
        ("window",),
        "Sequence mixer of each block, a pattern repeated over the layers. full: causal attention. "
        "window: sliding-window attention over window_size tokens. mamba2, gated_deltanet, "
        "kda, ttt_linear, ttt_mlp: recurrent layers. none: no mixer. Two mixers joined by + run "
        "one after the other, each with its own norms and residual: window+ttt_mlp is the papers' "
        "TTT-KVB.",
        choices=(*(kind for mixer in MIXERS for kind in mixer.kinds if kind != "local"), "none"),
        joined=True,
    )
    window_size: int = declare(
        512, "Keys a query attends to in window attention, its own included (k).", minimum=1
    )
    suffix_layers: int = declare(
        0, "Last blocks, run chunk by chunk, that may hold fast weights.", minimum=0
    )
    fast_mlp: bool = declare(
        False, "Whether suffix blocks have the extra fast MLP before the static one."
    )
    fast_mlp_heads: int = declare(
        0,
        "0: the fast MLP is a SwiGLU like the static one. Above: it is this many two-layer GELU "
        "MLPs, each from embed_dim / heads entries to 4 times as many and back, as in TTT-MLP.",
        minimum=0,
    )
    fast_mlp_init: str = declare(
        "normal",
        "Initialization of the fast MLP's last matrix. normal: like every matrix. zero: 0, so "
        "that a pretrained model with added fast MLPs is unchanged until their first update.",
        choices=("normal", "zero"),
        omit_default_in_hash=True,
    )
    tie_embeddings: bool = declare(True, "Whether logits use the embedding table.")
    rope_theta: float = declare(
        500000.0, "Base of the rotary position embedding (RoPE).", minimum=1
    )
    rope_scaling: tuple[float, ...] = declare(
        (),
        "Scaling of the RoPE frequencies for contexts longer than in pretraining. Empty: none. One "
        "number: all frequencies are divided by it. Four: as in Llama 3.1, factor, "
        "low_freq_factor, high_freq_factor and original_max_position_embeddings.",
        above=0,
        omit_default_in_hash=True,
    )
    norm_eps: float = declare(
        1e-6, "Epsilon of every norm except the gated ones, inside the root.", above=0
    )
    mixer_norm_eps: float = declare(
        1e-5, "Epsilon of the gated norms inside mamba2, gated_deltanet and kda.", above=0
    )
    init_std: float = declare(0.02, "Standard deviation of every initial matrix.", minimum=0)
    qk_norm: bool = declare(True, "RMSNorm of queries and keys, before RoPE.")
    pre_norm: bool = declare(True, "RMSNorm before mixers and MLPs.")
    post_norm: bool = declare(True, "RMSNorm after mixers and MLPs, before the residual sum.")
    param_dtype: str = declare(
        "float32", "Dtype of the parameters.", choices=("float32", "bfloat16", "float64")
    )
    compute_dtype: str = declare(
        "float32",
        "Dtype of activations and matrix products; losses, norms and softmax are float32 or wider.",
        choices=("float32", "bfloat16", "float64"),
    )
    remat: str = declare(
        "block",
        "Rematerialization: what the backward pass recomputes. block: the activations of each "
        "block. none: nothing.",
        choices=("none", "block"),
        mutable_on_resume=True,
    )
    attention_kernel: str = declare(
        "auto",
        "Attention implementation. auto: the platform's kernels where they apply (over a full "
        "sequence cuDNN on NVIDIA GPUs, splash attention on TPUs), otherwise XLA; training logs "
        "which and why. xla: XLA only. library: as auto, but training fails where the library's "
        "kernel does not apply to attention over a full sequence.",
        choices=("auto", "xla", "library"),
        mutable_on_resume=True,
    )
    pre_conv: bool = declare(
        False,
        "Whether a block begins with a residual causal convolution of its normed input, as the "
        "TTT papers' Mamba backbone does.",
    )
    conv_size: int = declare(
        4,
        "Taps of the causal convolutions of pre_conv and the recurrent mixers.",
        minimum=1,
        maximum=1024,
    )
    scan_chunk: int = declare(
        64,
        "Chunk length of the parallel scans of mamba2, gated_deltanet and kda; does not affect "
        "results.",
        minimum=1,
        mutable_on_resume=True,
    )
    mamba2: Mamba2Config = dataclasses.field(default_factory=Mamba2Config)
    gated_deltanet: GatedDeltaNetConfig = dataclasses.field(default_factory=GatedDeltaNetConfig)
    kda: KDAConfig = dataclasses.field(default_factory=KDAConfig)
    ttt_layer: TTTLayerConfig = dataclasses.field(default_factory=TTTLayerConfig)

    # --- derived from the fields ---

    @property
    def mixer_kinds(self) -> frozenset[str]:
        """Every mixer in use, joined ones separately."""
        return frozenset(kind for entry in self.mixers for kind in split_mixers(entry))

    @property
    def mixers_in_use(self) -> tuple[MixerConfig, ...]:
        """The configuration of every mixer in use, in the order of the blocks."""
        kinds = (kind for entry in self.mixers for kind in split_mixers(entry))
        return tuple(dict.fromkeys(map(self.mixer, kinds)))

    def mixer(self, kind: str) -> MixerConfig:
        """The configuration of the mixer that `kind` chooses. Raises ValueError for another."""
        sections = (getattr(self, field.name) for field in dataclasses.fields(self))
        mixers = [AttentionConfig(), *(s for s in sections if isinstance(s, MixerConfig))]
        name = kind.partition(":")[0]
        chosen = next((mixer for mixer in mixers if name in mixer.kinds), None)
        if chosen is None:
            raise ValueError(f"unknown mixer {kind!r}")
        return chosen

    @property
    def head_size(self) -> int:
        """Entries of one attention head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values in attention."""
        return self.num_kv_heads or self.num_heads


def split_mixers(entry: str) -> list[str]:
    """The mixers of a block, as `model.mixers` joins them."""
    return [kind for kind in entry.split("+") if kind != "none"]
