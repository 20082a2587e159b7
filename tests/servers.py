"""A web server on this machine that answers as real ones do, and badly."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


@contextmanager
def serving(files):
    """A server of {path: bytes}.

    Gives a namespace with `url`, `files`, and what may be set: `ranges` (whether it answers them), `stop` (a number of
    bytes after which it hangs up), `pages` (paths that are web pages), `moved` ({path: where}). `asked` lists
    (path, range) of each request.
    """
    state = SimpleNamespace(files=dict(files), ranges=True, stop=None, pages=set(), moved={}, asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path, given = self.path.lstrip("/"), self.headers.get("Range")
            state.asked.append((path, given))
            if path in state.moved:
                self.send_response(302)
                self.send_header("Location", f"/{state.moved[path]}")
                self.end_headers()
                return
            if path not in state.files:
                self.send_error(404)
                return
            content = state.files[path]
            start = int(given.removeprefix("bytes=").rstrip("-")) if given and state.ranges else 0
            if start and start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("Content-Type", "text/html" if path in state.pages else "application/octet-stream")
            self.end_headers()
            self.wfile.write(content[start:][: state.stop])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
