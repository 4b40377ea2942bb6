"""`python -m tttjax.lm_eval`: lm-evaluation-harness with the model `tttjax` registered."""

import sys

if __name__ == "__main__":
    from tttjax.cli.lm_eval import main

    sys.exit(main())
else:  # `from tttjax.lm_eval import TTTJaxLM`
    from tttjax.evaluation.lm_eval import TTTJaxLM

    __all__ = ["TTTJaxLM"]
