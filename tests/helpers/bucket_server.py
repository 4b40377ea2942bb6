"""A local server of a folder as a Google Cloud Storage bucket: listing and range reads."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@contextlib.contextmanager
def serve_bucket(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(URL of the server, list of requested paths)."""
    requested: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            requested.append(self.path)
            url = urlsplit(self.path)
            if url.path.endswith("/o"):
                self.answer(200, json.dumps({"items": listing(parse_qs(url.query))}).encode())
                return
            file = root / unquote(url.path.split("/o/", 1)[1])
            if not file.is_file():
                self.answer(404, b"")
                return
            content, part = file.read_bytes(), self.headers.get("Range", "")
            if not part:
                self.answer(200, content)
                return
            first, _, last = part.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(content) - int(last)
            stop = int(last) + 1 if first and last else len(content)
            self.answer(206, content[start:stop], f"bytes {start}-{stop - 1}/{len(content)}")

        def answer(self, code, content, part=""):
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("x-goog-generation", "1")
            if part:
                self.send_header("Content-Range", part)
            self.end_headers()
            self.wfile.write(content)

    def listing(query):
        names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
        first, stop = (query.get(key, [""])[0] for key in ("startOffset", "endOffset"))
        chosen = [name for name in names if first <= name and (not stop or name < stop)]
        return [{"name": name, "generation": "1"} for name in chosen]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requested
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
