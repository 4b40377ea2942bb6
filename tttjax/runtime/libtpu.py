"""What libtpu is told on a machine without a TPU: it is there to compile for TPUs (`tttjax plan`).

JAX loads it wherever it is installed. Not told, it asks the machine which TPU it has, and prints a
page of warnings and an error when there is none.
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
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")  # one of them for each chip, whatever the version


def quieten_libtpu() -> None:
    """Call it before JAX touches a device. Where there may be a TPU, nothing is changed."""
    if importlib.util.find_spec("libtpu") is None or any(map(glob.glob, _DEVICES)):
        return
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
