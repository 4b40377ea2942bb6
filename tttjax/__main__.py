"""`python -m tttjax` is `tttjax`."""

import sys

from tttjax.cli.main import main

sys.exit(main())
