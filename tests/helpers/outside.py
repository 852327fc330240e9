"""What somebody else's package adds: tests/data/outside, which looks like an installed one (dist-info with
entry points)."""

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
    """While it lasts, a registry has an item under a name."""
    registry.register(item, name)
    try:
        yield
    finally:
        registry.unregister(name)


def command(*words: object, cwd=ROOT, installed: bool = True) -> subprocess.CompletedProcess[str]:
    """A Python command in a process that finds the package: as an installed one, or else its modules in the
    current directory."""
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
