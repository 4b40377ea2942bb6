"""The network's fields."""

from dataclasses import dataclass

from tttjax.config.fields import declare

MIXERS = (
    *("full", "window", "local", "none"),
    *("mamba2", "gated_deltanet", "ttt_linear", "ttt_mlp"),
)


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
        "window: sliding-window attention over window_size tokens. local: causal inside blocks of "
        "inner.chunk_size tokens (the official code's full attention in meta mode; for "
        "verification). mamba2, gated_deltanet, ttt_linear, ttt_mlp: recurrent layers. none: no "
        "mixer. Two mixers joined by + run one after the other, each with its own "
        "norms and residual: window+ttt_mlp is the papers' TTT-KVB.",
        choices=MIXERS,
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
        1e-5, "Epsilon of the gated norms inside mamba2 and gated_deltanet.", above=0
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
        "Chunk length of the parallel scan of mamba2 and gated_deltanet; does not affect results.",
        minimum=1,
        mutable_on_resume=True,
    )
    mamba_expand: int = declare(2, "Total width of mamba2's heads / embed_dim.", minimum=1)
    mamba_head_dim: int = declare(64, "Entries of one head of mamba2 (P).", minimum=1)
    mamba_state: int = declare(128, "State entries of mamba2 per head entry (N).", minimum=1)
    mamba_groups: int = declare(
        1, "Groups of mamba2's heads that share B, C and the norm (G).", minimum=1
    )
    mamba_dt_limits: tuple[float, ...] = declare(
        (), "Smallest and largest time step of mamba2; empty: no limits.", minimum=0
    )
    delta_heads: int = declare(0, "Key heads of gated_deltanet; 0: num_heads.", minimum=0)
    delta_value_heads: int = declare(
        0, "Value heads of gated_deltanet, a multiple of delta_heads; 0: delta_heads.", minimum=0
    )
    delta_key_dim: int = declare(
        0, "Entries of a key of gated_deltanet; 0: those of an attention head.", minimum=0
    )
    delta_value_dim: int = declare(
        0, "Entries of a value of gated_deltanet; 0: twice those of a key.", minimum=0
    )
    delta_negative: bool = declare(
        False, "Whether gated_deltanet's beta is in (0, 2) instead of (0, 1): negative eigenvalues."
    )
    ttt_heads: int = declare(
        0, "Heads of the TTT layers, embed_dim / heads entries each; 0: num_heads.", minimum=0
    )
    ttt_chunk: int = declare(16, "Tokens of one inner mini-batch of the TTT layers.", minimum=1)
    ttt_lr: float = declare(
        0.0,
        "Base inner learning rate; 0: the paper's, 1 for ttt_linear, 0.1 for ttt_mlp.",
        minimum=0,
    )
    ttt_rope_theta: float = declare(
        10000.0, "Base of the rotary embedding inside each mini-batch of a TTT layer.", minimum=1
    )
    ttt_backbone: str = declare(
        "mamba",
        "Projections around the inner model of TTT layers. mamba: one projection and two "
        "convolutions for queries and keys, and an output gate. plain: three projections.",
        choices=("mamba", "plain"),
    )
    ttt_output: str = declare(
        "query",
        "Output of a TTT layer for a token. query: the inner model applied to its query, with the "
        "weights after its own update. key: applied to its key, with the weights before the "
        "mini-batch (the simplified rule of the TTT-E2E paper; there are no queries then).",
        choices=("query", "key"),
    )

    # --- derived from the fields ---

    @property
    def mixer_kinds(self) -> frozenset[str]:
        """Every mixer in use, joined ones separately."""
        return frozenset(kind for entry in self.mixers for kind in entry.split("+"))

    @property
    def head_size(self) -> int:
        """Entries of one attention head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values in attention."""
        return self.num_kv_heads or self.num_heads

    @property
    def mamba_heads(self) -> int:
        return self.mamba_expand * self.embed_dim // self.mamba_head_dim

    @property
    def delta_sizes(self) -> tuple[int, int, int, int]:
        """Of gated_deltanet: key heads, value heads, entries of a key, entries of a value."""
        key_heads = self.delta_heads or self.num_heads
        key_dim = self.delta_key_dim or self.head_size
        return (
            *(key_heads, self.delta_value_heads or key_heads),
            *(key_dim, self.delta_value_dim or 2 * key_dim),
        )

    @property
    def ttt_num_heads(self) -> int:
        return self.ttt_heads or self.num_heads

    def ttt_base_lr(self, inner: str) -> float:
        """Of the TTT layer with the inner model "linear" or "mlp"."""
        return self.ttt_lr or {"linear": 1.0, "mlp": 0.1}[inner]
