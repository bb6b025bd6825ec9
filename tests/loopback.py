"""Real HTTP servers in processes of their own: a scripted chat-completions server, and a proxy that injects faults.

``start("scripted", ...)`` and ``start("proxy", upstream=...)`` yield the base URL of one; see :class:`Scripted` and
:class:`FaultyProxy` for their options. Options and questions travel as JSON, nothing is shared with the test's process.
"""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("drop", "500", "garbage", "truncated", "empty", "slow")
BOX = {True: "\\box{Success}", False: "\\box{Failure}"}


@contextmanager
def start(kind: str, **options: Any) -> Iterator[str]:
    """Runs a server until the block ends; yields its base URL, with ``/v1``."""
    command = [sys.executable, __file__, kind, json.dumps(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def stats(base_url: str) -> dict[str, Any]:
    """What a scripted server saw: "requests", "most_at_once", "bodies" (the last few), "keys"; a proxy's "faults"."""
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/stats") as reply:
        return json.loads(reply.read())


def free_port() -> int:
    """Returns a port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: dict[str, Any]
    lock = threading.Lock()

    def log_message(self, *args: Any) -> None:
        """Says nothing."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def reply(self, status: int, content: bytes, kind: str = "application/json", length: int | None = None) -> None:
        length = len(content) if length is None else length
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
        self.wfile.write(head.encode() + content)  # in one piece: two would wait for each other's acknowledgement

    def reply_json(self, status: int, value: Any) -> None:
        self.reply(status, json.dumps(value).encode())


class Scripted(Handler):
    """Answers by script, else by the brightness of the last picture: bright is a success.

    Options: "answers": lists of answers by a word of the instruction, taken in turn (a dict is merged into the choice,
    an int is a status); "models": what it serves and lists; "key": what it demands; "listing": False hides the list;
    "delay": seconds an answer takes; "drip": send a byte every so many seconds.
    """

    seen: Counter[str] = Counter()
    bodies: list[Any] = []
    keys: set[str] = set()
    at_once = most_at_once = 0
    turns: Counter[str] = Counter()

    def do_GET(self) -> None:
        if self.path == "/stats":
            seen = {"requests": self.seen["POST"], "most_at_once": Scripted.most_at_once, "keys": sorted(self.keys)}
            self.reply_json(200, {**seen, "bodies": self.bodies[-3:]})
        elif self.refuses():
            self.reply_json(401, {"error": {"message": "Unauthorized"}})
        elif self.path == "/v1/models" and self.options.get("listing", True):
            self.reply_json(200, {"object": "list", "data": [{"id": m} for m in self.options["models"]]})
        else:
            self.reply_json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        question = json.loads(self.body())
        with self.lock:
            self.seen["POST"] += 1
            self.bodies.append(question)
            Scripted.at_once += 1
            Scripted.most_at_once = max(Scripted.most_at_once, Scripted.at_once)
        try:
            self.answer(question)
        finally:
            with self.lock:
                Scripted.at_once -= 1

    def refuses(self) -> bool:
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.keys.add(key)
        return key != self.options.get("key", key)

    def answer(self, question: dict[str, Any]) -> None:
        time.sleep(self.options.get("delay", 0))
        if self.refuses():
            return self.reply_json(401, {"error": {"message": "Unauthorized"}})
        if self.path != "/v1/chat/completions" or question["model"] not in self.options["models"]:
            return self.reply_json(404, {"error": {"message": f"The model {question['model']} does not exist."}})
        said = self.script(question)
        if isinstance(said, int):
            return self.reply_json(said, {"error": {"message": "as scripted"}})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        if isinstance(said, dict):
            choice |= said
        content = json.dumps({"object": "chat.completion", "choices": [choice]}).encode()
        if not self.options.get("drip"):
            return self.reply(200, content)
        self.reply(200, b"", length=len(content))
        for byte in content:
            self.wfile.write(bytes([byte]))
            time.sleep(self.options["drip"])

    def script(self, question: dict[str, Any]) -> Any:
        parts = question["messages"][0]["content"]
        if isinstance(parts, str):
            return "Hello!"
        for word, answers in self.options.get("answers", {}).items():
            if word in parts[0]["text"]:
                with self.lock:
                    self.turns[word] += 1
                    return answers[(self.turns[word] - 1) % len(answers)]
        return f"I looked closely.\n{BOX[brightness(parts) > 127]}"


def brightness(parts: list[dict[str, Any]]) -> float:
    import numpy as np
    from PIL import Image

    part = parts[-1]
    picture = part[part["type"]]["url"].split(",")[-1]
    return float(np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))).mean())


class FaultyProxy(Handler):
    """Passes everything on to "upstream", but every "every"-th question meets the next of "faults".

    What it makes up always says success, so that a label from an error would show; "slow" waits "seconds" first.
    """

    questions, faults = itertools.count(1), itertools.count()
    made: Counter[str] = Counter()

    def do_GET(self) -> None:
        if self.path == "/stats":
            return self.reply_json(200, {"faults": self.made})
        self.forward(None)

    def do_POST(self) -> None:
        body = self.body()
        with self.lock:
            faulty = next(self.questions) % self.options["every"] == 0
            fault = self.options["faults"][next(self.faults) % len(self.options["faults"])] if faulty else None
            self.made[fault or "none"] += 1
        lie = f"<html>{BOX[True]}</html>".encode()
        if fault == "drop":
            self.close_connection = True
        elif fault == "500":
            self.reply(500, lie, "text/html")
        elif fault == "garbage":
            self.reply(200, lie, "text/html")
        elif fault == "empty":
            self.reply(200, b"")
        elif fault == "truncated":
            self.reply(200, b'{"object": "chat.completion", "choices": [{"message": {"content": "\\\\box{Success}')
        else:
            time.sleep(self.options["seconds"] if fault == "slow" else 0)
            self.forward(body)

    def forward(self, body: bytes | None) -> None:
        upstream = urlsplit(self.options["upstream"])
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port)
        names = ("Authorization", "Content-Type")
        headers = {name: self.headers[name] for name in names if self.headers[name]}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        self.reply(answer.status, content, answer.headers["Content-Type"])


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
        """A client that gave up is no news."""


if __name__ == "__main__":
    handler = {"scripted": Scripted, "proxy": FaultyProxy}[sys.argv[1]]
    handler.options = json.loads(sys.argv[2])
    with Server(("127.0.0.1", 0), handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
