"""A server for the tests, in a thread or as a process; and its clients."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
from places import ROOT

from trt_runtime.serving.answers import ServeOptions
from trt_runtime.serving.app import create_app
from trt_runtime.serving.process import Server

PROMPT = "take red cups from kitchen to garage, then hand blue pens to Mia, and clean hall with mop"
OTHERS = [
    "clean hall with mop",
    "find red keys in attic, and tidy porch with broom",
    "hand blue pens to Mia, then clean hall with mop",
    PROMPT,
]


@contextmanager
def serving(model, **options):
    """A server in a thread, on a free port."""
    options = ServeOptions(**{"name": "demo", "max_length": 192} | options)
    app = create_app(model, options)
    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(app, options)
    server.config.timeout_graceful_shutdown = 5
    app.state.worker.connections = server.server_state.connections  # for tests to look at
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", app.state.worker
    finally:
        server.should_exit = True
        thread.join()


def until(condition, seconds=5):
    for _ in range(100 * seconds):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"the condition did not hold within {seconds} s")


def chat(client, prompt=PROMPT, **options):
    extra = {
        key: options.pop(key)
        for key in (
            "threshold",
            "policy",
            "cache",
            "block_length",
            "template",
            "edit_threshold",
            "edit_steps",
        )
        if key in options
    }
    return client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": prompt}], extra_body=extra, **options
    )


def process_of(demo_artifact, *options, program=None):
    """A server as a process, and its address; `program`: Python code to run instead of the command."""
    command = [
        sys.executable,
        *(["-m", "trt_runtime.cli"] if program is None else ["-c", program]),
        "serve",
        str(demo_artifact),
        "--port",
        "0",
        "--name",
        "demo",
        "--max-length",
        "192",
        *options,
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DLLM_API_KEY": ""},
    )
    for line in process.stderr:  # Ray logs lines before it
        if address := re.match(r"http://\S+?/v1", line):
            return process, address[0].removesuffix("/v1")
    raise AssertionError("the server did not start")


CHAT = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]}


def post(url, body, path="chat/completions", **options):
    """Send a request; the body may hold values that are not JSON, such as NaN."""
    headers = {"content-type": "application/json"}
    content = json.dumps(body)
    return httpx.post(f"{url}/v1/{path}", content=content, headers=headers, timeout=60, **options)


def connect(url):
    return socket.create_connection(("127.0.0.1", httpx.URL(url).port))


def sent(body, path="chat/completions"):
    raw = json.dumps(body).encode()
    return f"POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw
