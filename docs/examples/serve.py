"""Serve a folder over HTTP: POST a prompt, and its continuation streams back as it is written.

python docs/examples/serve.py FOLDER [PORT]
curl --no-buffer --data "The capital of France is" http://127.0.0.1:8000
"""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nirvana_deploy import NirvanaError
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.text import load_text_side, model_in, stream_text


def server(folder: str, port: int = 8000, *, max_new_tokens: int = 64) -> ThreadingHTTPServer:
    """A server of an output folder, an ONNX folder or an engine; ``serve_forever`` runs it."""
    model = model_in(Path(folder))
    tokenizer, stops = load_text_side(model)
    runner = open_runner(model)
    one_at_a_time = threading.Lock()

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            prompt = self.rfile.read(int(self.headers["Content-Length"])).decode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            with one_at_a_time:
                try:
                    stream_text(
                        runner,
                        tokenizer,
                        prompt,
                        max_new_tokens=max_new_tokens,
                        stops=stops,
                        on_text=lambda piece: self.wfile.write(piece.encode()),
                    )
                except NirvanaError as error:
                    self.wfile.write(f"{error}\n".encode())

        def log_request(self, code: object = "-", size: object = "-") -> None:
            """Say nothing of requests."""

    return ThreadingHTTPServer(("127.0.0.1", port), Answer)


if __name__ == "__main__":
    here = server(sys.argv[1], *map(int, sys.argv[2:]))
    print(f"Listening on http://127.0.0.1:{here.server_port}")
    here.serve_forever()
