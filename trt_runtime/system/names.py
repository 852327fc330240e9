"""The exporter and the kernels under the names that a wheel has for them. Imports nothing, so that commands
start at once.

A checkout's folders `export` and `plugins` are the packages `dllm_trt_export` and `dllm_trt_plugins` of a
wheel.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # the same in `typing`, whose import takes longer than all of this file
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from types import ModuleType

TOOLS, PREFIX = ("export", "plugins"), "dllm_trt_"


class InstalledName:
    """An import finder and loader that makes `dllm_trt_export...` another name of a checkout's modules
    `export...`, and the same for the kernels: one module, two names."""

    def __init__(self, tool: str) -> None:
        self.tool = tool
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of an installed name; None for every other name."""
        own = PREFIX + self.tool
        if name != own and not name.startswith(f"{own}."):
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module under its name in the checkout."""
        import importlib

        module = importlib.import_module(spec.name.removeprefix(PREFIX))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the module was executed under its first name, which it keeps."""
        module.__spec__ = self._specs.pop(PREFIX + module.__name__)


def know_installed_name(package: str) -> None:
    """Called by the packages of a checkout: importing them by their installed names gives the same
    modules."""
    names = {finder.tool for finder in sys.meta_path if isinstance(finder, InstalledName)}
    if package in TOOLS and package not in names:
        sys.meta_path.insert(0, InstalledName(package))
