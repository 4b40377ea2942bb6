"""`python -m tttjax` is `tttjax`."""

import sys

from tttjax.cli import main

sys.exit(main())
