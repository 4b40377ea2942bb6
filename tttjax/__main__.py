"""Runs the `tttjax` command line as `python -m tttjax`."""

import sys

from tttjax.cli.main import main

sys.exit(main())
