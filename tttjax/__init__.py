"""tttjax: language models with end-to-end test-time training (TTT-E2E, arXiv 2512.23675)."""

__version__ = "0.1.0"
