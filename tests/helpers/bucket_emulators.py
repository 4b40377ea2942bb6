"""Emulators of gs:// and s3:// on loopback, with one bucket `bkt` in each.

    with Emulators() as emulators:
        subprocess.run(..., env=os.environ | emulators.environment)

moto emulates S3. gcp-storage-emulator lacks what tttjax and tensorstore rely on, added here: the
generation in the answer to a read, and conditional writes.
"""

import contextlib
import logging
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
from moto.server import ThreadedMotoServer

BUCKET = "bkt"
_lock = threading.Lock()


class UnmetError(Exception):
    """A condition of a write does not hold."""


class ConditionalStorage(Storage):
    condition = None

    def create_file(self, bucket, name, *args, **options):
        if self.condition not in (None, self.generation(bucket, name)):
            raise UnmetError
        super().create_file(bucket, name, *args, **options)

    def generation(self, bucket, name):
        try:
            return self.get_file_obj(bucket, name)["generation"]
        except NotFound:
            return "0"


class Handler(RequestHandler):
    """is_down: while it is set, connections are closed without an answer."""

    is_down = threading.Event()

    def log_message(self, *args):
        pass

    def _condition(self, name):
        return parse_qs(urlsplit(self.path).query).get(name, [None])[0]

    def do_POST(self):
        with _lock:
            self.storage.condition = self._condition("ifGenerationMatch")
            try:
                super().do_POST()
            except UnmetError:
                self.send_error(412)
            finally:
                self.storage.condition = None

    def do_GET(self):
        with _lock:
            path = unquote(urlsplit(self.path).path)
            self.generation = None
            if "/o/" in path and f"/b/{BUCKET}/" in path:
                self.generation = self.storage.generation(BUCKET, path.partition("/o/")[2])
            if self.generation and self.generation == self._condition("ifGenerationNotMatch"):
                self.send_response(304)
                self.end_headers()
                return
            super().do_GET()

    def do_DELETE(self):
        with _lock:
            super().do_DELETE()

    def do_PUT(self):
        with _lock:
            super().do_PUT()

    def end_headers(self):
        if generation := getattr(self, "generation", None):
            self.send_header("x-goog-generation", generation)
        super().end_headers()

    def handle_one_request(self):
        if self.is_down.is_set():
            self.close_connection = True
            return
        with contextlib.suppress(ConnectionError):  # of a client that was killed
            super().handle_one_request()


class Emulators:
    """environment: what tttjax and its libraries need to find them."""

    def __enter__(self):
        for name in ("werkzeug", "gcp_storage_emulator"):  # a line per request
            logging.getLogger(name).setLevel(logging.CRITICAL)
        storage = ConditionalStorage(use_memory_fs=True)
        create_bucket(BUCKET, storage)
        self._google = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, storage))
        self._thread = threading.Thread(target=self._google.serve_forever)
        self._thread.start()
        self._amazon = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._amazon.start()
        google = f"http://127.0.0.1:{self._google.server_port}"
        amazon = f"http://127.0.0.1:{self._amazon.get_host_and_port()[1]}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": google,
            "TENSORSTORE_GCS_HTTP_URL": google,
            "AWS_ENDPOINT_URL": amazon,
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REGION": "us-east-1",
        }
        client = boto3.client(
            "s3",
            endpoint_url=amazon,
            aws_access_key_id="id",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        client.close()
        return self

    def __exit__(self, *_):
        self._google.shutdown()
        self._thread.join()
        self._google.server_close()
        self._amazon.stop()
