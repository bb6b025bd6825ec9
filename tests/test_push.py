"""Uploads against a server on this machine that speaks the hub's protocol; the client is the real one.

One thing differs from the hub: weights travel inside the commit, not through the hub's chunk store.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from prophet_gym.cli import main
from prophet_gym.push import push


class Hub:
    """What the server knows: repositories with their visibility, and what was uploaded."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.forbidden = False


def handler(hub: Hub, address: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, values: Any, status: int = 200) -> None:
            body = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self) -> None:
            name = "/".join(self.path.split("/")[3:5])
            if name not in hub.private:
                return self.reply({"error": "Repository not found"}, 404)
            if "/tree/" in self.path:
                files = [{"type": "file", "path": path, "size": len(held), "oid": "0" * 40}
                         for path, held in hub.files.items()]  # fmt: skip
                return self.reply(files)
            self.reply(
                {"id": name, "private": hub.private[name], "sha": "0" * 40, "siblings": [], "tags": [], "downloads": 0}
            )

        do_HEAD = do_GET

        def do_POST(self) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            body = self.body()
            if hub.forbidden:
                return self.reply({"error": "You have no right to create this"}, 403)
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                known = name in hub.private
                private = asked.get("private") or asked.get("visibility") == "private"
                hub.private.setdefault(name, bool(private))
                return self.reply({"url": f"{address[0]}/{name}", "id": name}, 409 if known else 200)
            if "/preupload/" in self.path:
                # The server decides how files travel: here with the commit, where the hub asks for its chunk store.
                listed = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                          for f in json.loads(body)["files"]]  # fmt: skip
                return self.reply({"files": listed})
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del hub.files[line["value"]["path"]]
                commit = {"commitUrl": f"{address[0]}/me/robot/commit/1", "commitOid": "1" * 40, "success": True}
                return self.reply(commit)
            self.reply({"errors": [], "warnings": []})

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub.constants as constants

    hub, address = Hub(), [""]
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub, address))
    address[0] = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", address[0])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "hf_for_this_test")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    (tmp_path / "beside.txt").write_text("not for others")
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "robot")
    (folder / "README.md").write_text("# robot\n")
    return folder


def held(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_arrives_whole_private_and_alone(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prophet", "push", str(checkpoint), "me/robot"])
    main()
    assert hub.private == {"me/robot": True} and hub.files == held(checkpoint)
    assert hub.tokens == {"Bearer hf_for_this_test"}
    shown = capsys.readouterr().out
    assert "me/robot/commit/1" in shown and 'checkpoint="me/robot"' in shown
    (checkpoint / "README.md").write_text("# robot, second\n")
    push(checkpoint, "me/robot")
    assert hub.files["README.md"] == b"# robot, second\n"


def test_what_an_earlier_push_left_goes(hub: Hub, checkpoint: Path) -> None:
    (checkpoint / "judge").mkdir()
    (checkpoint / "judge" / "judge.json").write_text("{}")
    (checkpoint / "weights-00001-of-00002.txt").write_text("a shard")
    push(checkpoint, "me/robot")
    hub.files[".gitattributes"] = b"the hub's own"
    shutil.rmtree(checkpoint / "judge")
    (checkpoint / "weights-00001-of-00002.txt").unlink()
    push(checkpoint, "me/robot")
    assert hub.files == {**held(checkpoint), ".gitattributes": b"the hub's own"}


def test_public_is_public_only_when_asked(hub: Hub, checkpoint: Path) -> None:
    push(checkpoint, "me/open", private=False)
    assert hub.private == {"me/open": False}
    hub.files.clear()
    with pytest.raises(ValueError, match="me/open is there already and public; nothing was uploaded"):
        push(checkpoint, "me/open")
    assert not hub.files


def test_what_is_not_a_whole_checkpoint_stays_here(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    def refused(message: str, repo_id: str = "me/robot") -> None:
        with pytest.raises(ValueError, match=message):
            push(checkpoint, repo_id)
        assert not hub.private and not hub.files

    refused("expected owner/name", "robot")
    (checkpoint / "optimizer.pt").write_bytes(b"x")
    refused("optimizer.pt may run code")
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "snapshots" / ".env").write_text("x")
    refused(".env is hidden")
    (checkpoint / "snapshots" / ".env").unlink()
    (checkpoint / "link").symlink_to(tmp_path / "beside.txt")
    refused("link is a link")
    (checkpoint / "link").unlink()
    weights = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused("cannot be loaded as a Prophet checkpoint")
    (checkpoint / "prophet.json").unlink()
    refused("no prophet.json")
    shutil.rmtree(checkpoint)
    refused("no such folder")


def test_refusals_of_the_hub_say_what_to_do(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.forbidden = True
    with pytest.raises(ValueError, match="the hub does not take it.*403.*hf auth login"):
        push(checkpoint, "other/robot")
