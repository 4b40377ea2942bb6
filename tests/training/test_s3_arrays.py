"""Orbax's choice of a driver for s3://."""

import pytest
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from tttjax.errors import UserError
from tttjax.training.s3_arrays import register_s3_driver


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """What this changes in Orbax is undone."""
    choice = tensorstore_utils._use_gcs_driver, gcs_utils.get_kvstore_for_gcs
    monkeypatch.setattr(tensorstore_utils, "_use_gcs_driver", choice[0])
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", choice[1])
    register_s3_driver.cache_clear()
    yield
    register_s3_driver.cache_clear()


@pytest.mark.parametrize("has_endpoint", [True, False])
def test_s3_gets_the_driver_of_tensorstore(has_endpoint, monkeypatch, tmp_path):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    if has_endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    others = [f"{tmp_path}/params", "gs://bkt/run/params"]
    before = [tensorstore_utils.build_kvstore_tspec(path, use_ocdbt=True) for path in others]
    register_s3_driver()
    after = [tensorstore_utils.build_kvstore_tspec(path, use_ocdbt=True) for path in others]
    assert before == after
    spec = tensorstore_utils.build_kvstore_tspec("s3://bkt/run/params", use_ocdbt=True)
    expected = {"driver": "s3", "bucket": "bkt", "path": "run/params"}
    endpoint = {"endpoint": "http://127.0.0.1:1", "aws_region": "eu-north-1"}
    assert spec["base"] == expected | (endpoint if has_endpoint else {})


def test_an_orbax_of_another_shape_is_refused(monkeypatch):
    monkeypatch.delattr(tensorstore_utils, "_use_gcs_driver")
    with pytest.raises(UserError, match=r"cannot write checkpoints to s3://.*use gs://"):
        register_s3_driver()
