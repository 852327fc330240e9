"""`python -m export`. Imports nothing heavy before an interrupt of it is one line."""

from __future__ import annotations

import sys


def _run(argv: list[str] | None) -> int:
    from trt_runtime.system import program
    from trt_runtime.system.progress import Progress

    quiet = any(word in ("-q", "--quiet") for word in sys.argv[1:])
    with program.importing(at_once=True), Progress(quiet=quiet).task("loading the exporter"):
        from .cli import main
    return main(argv)


def _main() -> int:
    try:
        from trt_runtime.system import program
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return program.run(_run, None, aftermath="nothing was written")


sys.exit(_main())
