"""Environment of libtpu on a machine without a TPU, where it only compiles (`tttjax plan`).

JAX loads libtpu wherever it is installed. Without these variables it queries the machine's TPU, and
prints a page of warnings and an error if there is none.
"""

import glob
import importlib.util
import os

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # device files of TPU chips, by version


def quieten_libtpu() -> None:
    """Sets ENVIRONMENT unless there may be a TPU. Call it before JAX initialises devices."""
    if importlib.util.find_spec("libtpu") is None or any(map(glob.glob, _DEVICES)):
        return
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
