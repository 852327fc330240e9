"""Processes in which kernels run in Triton's interpreter, or are compiled: the interpreter is chosen when a
kernel is defined."""

from __future__ import annotations

import os
import subprocess
import sys

from places import ROOT


def interpreted(script: str, *arguments: str) -> str:
    """What a script prints whose kernels run in the interpreter."""
    return _printed(script, arguments, os.environ | {"TRITON_INTERPRET": "1"})


def compiled(script: str) -> str:
    """What a script prints that compiles kernels."""
    return _printed(
        script, (), {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    )


def _printed(script, arguments, environment) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
