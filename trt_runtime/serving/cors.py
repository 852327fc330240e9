"""Cross-origin requests: none are allowed unless the operator names the origins."""

from __future__ import annotations

import re
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from trt_runtime.errors import DllmError

# as browsers write it: lower case, no path, no pattern, and no default port
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^A-Z/\s\\*?#@,]+")
_PORT_OF_ITS_OWN = re.compile(r"http://[^/]*:80|https://[^/]*:443")


def check(origins: tuple[str, ...]) -> None:
    """Raise DllmError for an origin in a form that no browser sends: it would never match."""
    for origin in origins:
        if origin not in ("*", "null") and (
            not _ORIGIN.fullmatch(origin) or _PORT_OF_ITS_OWN.fullmatch(origin)
        ):
            raise DllmError(
                f"--cors is '{origin[:80]}', expected an origin as browsers send it, like "
                f"http://localhost:3000 (lower case, no path, no default "
                "port 80 or 443; give --cors once per origin), or '*' for all."
            )


def _options(origins: tuple[str, ...]) -> dict[str, Any]:
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["*"],
        "expose_headers": ["x-dllm-seed", "retry-after"],
    }


def allow(app: Any, origins: tuple[str, ...]) -> None:
    """Allow these origins in a FastAPI application. Outermost, so that a preflight request, which carries no
    key, is answered."""
    if origins:
        app.add_middleware(CORSMiddleware, **_options(origins))


def allowed(app: Any, origins: tuple[str, ...]) -> Any:
    """The same for a plain ASGI application."""
    return CORSMiddleware(app, **_options(origins)) if origins else app
