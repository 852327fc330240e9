"""A server in its own process, and requests to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """`dllm-trt serve` in its own process."""

    def __init__(self, artifact: Path, slots: int, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "trt_runtime.cli",
            "serve",
            str(artifact),
            "--port",
            "0",
            "--name",
            "demo",
            "--slots",
            str(slots),
            "--max-length",
            "256",
            *options,
        ]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"DLLM_API_KEY": ""}
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        address = re.search(r"http://\S+?/v1", line)
        if address is None:
            raise SystemExit(f"error: the server did not start: {line.strip()}")
        self.url = address[0]

    def memory(self) -> float:
        """Resident memory, MiB."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def body_of(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": prompt}], **more}
