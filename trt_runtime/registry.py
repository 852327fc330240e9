"""A registry of items that are chosen by name: from this project, from installed packages, and from a module
that the user names.

A package adds to a registry by an entry point of the registry's group, under a name of its own:

    [project.entry-points."dllm_trt.policies"]
    patient = "my_package.policies:Patient"

Without a package, `my_module:Patient` is a name too. It imports the module, so it is for the command line and
Python, and never for what a client of a server sends (`names` holds none of these).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from trt_runtime.errors import DllmError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Items by name. kind: the word for an item in messages; group: of entry points; expected: what an item
    is, in words; fits: whether something is an item; check: raises DllmError for an item that conflicts with
    existing ones. A name that is taken is refused."""

    def __init__(
        self,
        kind: str,
        group: str,
        expected: str,
        fits: Callable[[Any], bool],
        built_in: Iterable[T] = (),
        check: Callable[[T], object] = lambda item: None,
    ) -> None:
        self.kind, self.group, self._expected, self._fits, self._check = kind, group, expected, fits, check
        self._items: dict[str, T] = {}
        self._entry_points_are_loaded = False
        for item in built_in:
            self.register(item)

    def register(self, item: T, name: str | None = None) -> T:
        """Add an item under its `name` attribute, unless another name is given, and return it, so that it
        works as a decorator. Raises DllmError."""
        name = name or getattr(item, "name", None)
        if not self._fits(item) or not isinstance(name, str):
            raise DllmError(f"{item!r} is not a {self.kind}: expected {self._expected} with a 'name'.")
        known = self._items.get(name)
        if known is not None and known is not item:
            raise DllmError(
                f"the {self.kind} '{name}' is defined twice, as {known!r} and {item!r}: rename yours."
            )
        self._check(item)
        self._items[name] = item
        return item

    def unregister(self, name: str) -> None:
        """Remove an item; tests use this to restore the registry."""
        del self._items[name]

    def find(self, name: str) -> T:
        """The item of a name. Raises DllmError if it is unknown or cannot be imported."""
        if name not in self._items and ":" in name:
            return self._imported(name)
        if name not in self._items:
            self._load_entry_points()
        if name not in self._items:
            raise unknown(
                self.kind, name, self.names(), f"Give one of your own as module:Name ({self._expected})."
            )
        return self._items[name]

    def installed(self, name: str) -> T:
        """The item of a name, without importing a module that the name may give: for names from a client or a
        file. Raises DllmError."""
        if name not in self.names():
            raise unknown(self.kind, name, self.names())
        return self._items[name]

    def names(self) -> list[str]:
        """All names except those of modules, in the order of registration."""
        self._load_entry_points()
        return [name for name in self._items if ":" not in name]

    def all(self) -> list[T]:
        """All items, each once."""
        self._load_entry_points()
        return list({id(item): item for item in self._items.values()}.values())

    def _imported(self, name: str) -> T:
        module, _, attribute = name.partition(":")
        try:
            item: T = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise DllmError(
                f"the {self.kind} '{name}' cannot be imported ({error}): give it as module:Name."
            ) from error
        return self.register(item, name)

    def _load_entry_points(self) -> None:
        if self._entry_points_are_loaded:
            return
        self._entry_points_are_loaded = True
        from importlib import metadata  # takes milliseconds

        for point in metadata.entry_points(group=self.group):
            try:
                self.register(point.load(), point.name)
            except (ImportError, AttributeError) as error:
                raise DllmError(
                    f"the {self.kind} '{point.name}' of an installed package cannot be imported ({error}): "
                    "install that package again, or remove it."
                ) from error


def of_classes(base: type[Any]) -> Callable[[Any], bool]:
    """Whether an item is a subclass of `base`."""
    return lambda item: isinstance(item, type) and issubclass(item, base)
