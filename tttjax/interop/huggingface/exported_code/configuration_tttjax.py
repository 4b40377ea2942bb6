# Copyright The tttjax authors. SPDX-License-Identifier: Apache-2.0
"""Configuration of a Transformer that keeps learning while it reads (TTT-E2E, arXiv 2512.23675)."""

from transformers import PretrainedConfig


class TTTJaxConfig(PretrainedConfig):
    """Sizes, and how the model learns.

    sliding_window: keys that a query of a `sliding_attention` layer sees, its own included.
    pre_norm, post_norm: RMSNorm before and after every attention and MLP; qk_norm: of queries and
    keys. fast_mlp_layers: the last so many layers have a further MLP before the usual one.
    fast_parameters: names of the parameters that learn while reading, all in layers from the
    first one named on, or after them; none: a usual, static Transformer. After every chunk of
    `chunk_size` tokens they take a step of size `inner_lr` down the gradient of the chunk's loss,
    whose norm is clipped to `inner_clip` (0: not clipped), or set to it if `inner_normalize`.
    learn: whether they do where `forward` and `generate` are not told.
    """

    model_type = "tttjax"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=None,
        head_dim=None,
        layer_types=None,
        sliding_window=None,
        rms_norm_eps=1e-6,
        rope_parameters=None,
        qk_norm=True,
        pre_norm=True,
        post_norm=True,
        fast_mlp_layers=0,
        fast_parameters=(),
        chunk_size=128,
        inner_lr=1.0,
        inner_clip=1.0,
        inner_normalize=False,
        learn=True,
        initializer_range=0.02,
        max_position_embeddings=8192,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.sliding_window = sliding_window
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.qk_norm = qk_norm
        self.pre_norm = pre_norm
        self.post_norm = post_norm
        self.fast_mlp_layers = fast_mlp_layers
        self.fast_parameters = list(fast_parameters)
        self.chunk_size = chunk_size
        self.inner_lr = inner_lr
        self.inner_clip = inner_clip
        self.inner_normalize = inner_normalize
        self.learn = learn
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        # Set here too: transformers 5 keeps what is given to it among other keywords only.
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
