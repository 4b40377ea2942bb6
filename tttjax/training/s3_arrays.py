"""Arrays of checkpoints in `s3://`, by TensorStore's own driver.

TensorStore reads and writes S3, but Orbax's choice of a driver knows Google's buckets and files
alone: it takes `s3://` for a relative path. The two functions of that choice are extended here.
"""

import functools
import os
from typing import Any

from tttjax.errors import UserError

_PREFIX = "s3:/"  # Orbax normalises paths, which leaves one slash


@functools.cache
def register_s3_driver() -> None:
    """Has Orbax use TensorStore's S3 driver. Raises UserError for an Orbax of another shape."""
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        use_remote_driver = tensorstore_utils._use_gcs_driver
        remote_spec = gcs_utils.get_kvstore_for_gcs
    except (ImportError, AttributeError) as error:
        raise UserError(
            "this version of orbax-checkpoint cannot write checkpoints to s3:// "
            f"({error}); install 0.12.8, or use gs:// or a file system for --workdir"
        ) from error
    tensorstore_utils._use_gcs_driver = lambda directory: (
        directory.startswith(_PREFIX) or use_remote_driver(directory)
    )
    gcs_utils.get_kvstore_for_gcs = lambda path: (
        _s3_spec(path) if path.startswith(_PREFIX) else remote_spec(path)
    )


def _s3_spec(path: str) -> dict[str, Any]:
    """TensorStore's spec of a folder, with the endpoint and region of the AWS environment."""
    bucket, _, inside = path.removeprefix(_PREFIX).lstrip("/").partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": inside}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else its log complains of missing files at every read
        spec["aws_credentials"] = {"type": "environment"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
    return spec
