"""`python -m tttjax.lm_eval`: the lm-evaluation-harness with the model `tttjax`."""

import sys

if __name__ == "__main__":
    from tttjax.cli.lm_eval import main

    sys.exit(main())
else:  # as `from tttjax.lm_eval import TTTJaxLM`
    from tttjax.evaluation.lm_eval import TTTJaxLM

    __all__ = ["TTTJaxLM"]
