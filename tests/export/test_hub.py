"""Download from a hub: the real huggingface_hub against a stand-in of the hub on this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from places import DEMO, ROOT

from export.checkpoint import huggingface as checkpoint
from trt_runtime.artifact import manifest as manifests

pytest.importorskip("huggingface_hub")
REVISION = hashlib.sha1(b"a commit").hexdigest()
LARGE = "notes.txt"  # large enough that the client writes a part of it before the transfer breaks
CODE = {
    "modeling_llada.py": b"raise SystemExit('code of a checkpoint was run')",
    "pytorch_model.bin": b"pickle",
}


class Hub(ThreadingHTTPServer):
    """Serves the demo checkpoint and files that must never be asked for; drops the first transfer of the
    largest half way."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {
            file.name: file.read_bytes()
            for file in DEMO.iterdir()
            if file.suffix in (".json", ".safetensors")
        } | CODE
        self.files[LARGE] = bytes(24_000_000)
        self.asked: list[tuple[str, str, str | None]] = []
        self.dropped = False


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = path.rpartition("/")[2]
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/org/demo/revision/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self._send(
                json.dumps({"id": "org/demo", "sha": REVISION, "siblings": siblings}).encode(), {}
            )
        if path == f"/api/models/org/demo/tree/{REVISION}":
            entries = [
                {"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in self.server.files.items()
            ]
            return self._send(json.dumps(entries).encode(), {})
        if path != f"/org/demo/resolve/{REVISION}/{name}" or name not in self.server.files:
            return self.send_error(404)
        data, headers = self.server.files[name], {"X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if name == LARGE and self.command == "GET" and not self.server.dropped:
            self.server.dropped = True
            self._send(data, headers, stop=len(data) // 2)
            return self.connection.close()
        return self._send(data[start:], headers, 206 if start else 200)

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200, stop: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:stop])


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _export(hub, tmp_path, checkpoint, out):
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [
        sys.executable,
        "-m",
        "export",
        "--checkpoint",
        checkpoint,
        "--out",
        str(tmp_path / out),
        "--verify",
        "no",
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_hub_id_is_downloaded_resumed_pinned_and_runs_no_code(hub, tmp_path):
    done = _export(hub, tmp_path, "org/demo@main", "first")
    if done.returncode:  # the transfer broke; what came is kept
        assert "not to be had from the hub" in done.stderr and "Traceback" not in done.stderr
        done = _export(hub, tmp_path, "org/demo@main", "first")
    assert done.returncode == 0, done.stderr
    manifest = manifests.load(tmp_path / "first", check_hashes=True)
    assert manifest.source["checkpoint"] == f"org/demo@{REVISION}" and manifest.source["revision"] == REVISION
    assert manifest.tokenizer == "tokenizer"
    asked = [path.rpartition("/")[2] for _, path, _ in hub.asked]
    assert "config.json" in asked and not set(CODE) & set(asked)
    resumed = [span for command, path, span in hub.asked if command == "GET" and path.endswith(LARGE)]
    assert hub.dropped and any(span and not span.startswith("bytes=0-") for span in resumed)
    transfers = len(resumed)
    assert _export(hub, tmp_path, "org/demo@main", "again").returncode == 0
    assert sum(c == "GET" and p.endswith(LARGE) for c, p, _ in hub.asked) == transfers  # from the cache
    linked = subprocess.run(
        [
            sys.executable,
            "-m",
            "export",
            "--checkpoint",
            "org/demo@main",
            "--out",
            str(tmp_path / "linked"),
            "--verify",
            "no",
            "--dtype",
            "bf16",
            "--weights",
            "link",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert linked.returncode == 0, linked.stderr
    assert manifests.load(tmp_path / "linked").files["model.safetensors"].size == len(
        hub.files["model.safetensors"]
    )


def test_a_name_that_the_hub_does_not_have_is_one_line(hub, tmp_path):
    done = _export(hub, tmp_path, "org/none", "out")
    assert done.returncode == 1 and done.stderr.startswith(
        "error: org/none: no such directory, and the hub does not provide it"
    )
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_attempts_of_the_client_are_not_told(monkeypatch):
    """Its warnings, one an attempt, would stand before the one line of the error; HF_HUB_VERBOSITY of the
    user's stays."""
    from huggingface_hub.utils import logging as hub_logging

    attempts = hub_logging.get_logger("huggingface_hub.utils._http")  # what tells of each
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    hub_logging.set_verbosity_warning()
    checkpoint._hub("org/none")
    assert not attempts.isEnabledFor(logging.WARNING)
    monkeypatch.setenv("HF_HUB_VERBOSITY", "warning")
    hub_logging.set_verbosity_warning()
    checkpoint._hub("org/none")
    assert attempts.isEnabledFor(logging.WARNING)
