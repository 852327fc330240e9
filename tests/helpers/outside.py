"""A third-party package: tests/data/outside, which looks installed (dist-info with entry points)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from places import ROOT

from trt_runtime.registry import Registry

OUTSIDE = ROOT / "tests" / "data" / "outside"


@contextmanager
def added(registry: Registry, item, name: str) -> Iterator[None]:
    """Register an item under a name for the duration of the context."""
    registry.register(item, name)
    try:
        yield
    finally:
        registry.unregister(name)


def command(*words: object, cwd=ROOT, installed: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a Python command with the third-party package on its path (`installed`), or only the current
    directory."""
    path = os.pathsep.join([str(ROOT), *([str(OUTSIDE)] if installed else [])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
