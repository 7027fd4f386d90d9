"""A judge to test with: a real HTTP server on this machine that speaks OpenAI's chat completions."""

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | tuple[int, dict[str, str], Any]
"""What the model says; or a status, headers and a body."""


class JudgeServer:
    """Answers each request with what `answer(text of the message, number of the request)` gives.

    Attributes:
        requests: bodies of the requests, as they came.
        keys: Authorization headers.
        most_at_once: largest number of requests that were open together.
    """

    def __init__(self, answer: Callable[[str, int], Reply], *, seconds: float = 0.0, port: int = 0) -> None:
        self.answer, self.seconds = answer, seconds
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.most_at_once = self._open = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"

    @property
    def texts(self) -> list[str]:
        """What was asked."""
        return [request["messages"][0]["content"] for request in self.requests]

    def _reply(self, path: str, key: str | None, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        with self._lock:
            number = len(self.requests)
            self.requests.append(body)
            self.keys.append(key)
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        time.sleep(self.seconds)
        try:
            if path != "/v1/chat/completions":
                return 404, {}, {"error": {"message": f"no such path: {path}"}}
            said = self.answer(body["messages"][0]["content"], number)
            return said if isinstance(said, tuple) else (200, {}, completion(said, body["model"]))
        finally:
            with self._lock:
                self._open -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, content = server._reply(self.path, self.headers["Authorization"], body)
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Nothing: the tests' output is for the tests."""

        return Handler

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(text: str | None, model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }


@contextmanager
def judge_server(answer: Callable[[str, int], Reply], **settings: Any) -> Any:
    server = JudgeServer(answer, **settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def shown(text: str) -> tuple[str, str]:
    """The two replies in a question made from the shipped prompt `helpfulness`, in their order."""
    found = re.search(
        r"=== Reply A (\w+) ===\n(.*?)\n\n=== Reply B \1 ===\n(.*?)\n\n=== Your answer \1 ===", text, re.S
    )
    assert found is not None
    return found[2], found[3]


def longer_is_better(text: str, _: int) -> str:
    """An honest judge: whatever the order, the longer reply."""
    first, second = map(len, shown(text))
    verdict = "A" if first > second else "B" if second > first else "tie"
    return f"I have looked at both.\nPreferred: {verdict}"
