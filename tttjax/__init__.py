"""tttjax: language models that keep learning while they read (TTT-E2E, arXiv 2512.23675)."""

__version__ = "0.1.0"
