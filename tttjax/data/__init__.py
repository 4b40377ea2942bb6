"""Text to tokens to batches: tokenizers, prepared data sets, and the pipelines that read them.

Nothing is imported here, so that the worker processes of `tttjax prepare`, which need a tokenizer
and numpy only, start without JAX or Grain.
"""
