"""Text to tokens to batches: tokenizers, prepared data sets, and input pipelines.

Nothing is imported here, so that the worker processes of `tttjax prepare`, which only need numpy
and a tokenizer, start without JAX or Grain.
"""
