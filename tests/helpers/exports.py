"""Exports as tests make them: with their notes, and quantised."""

from __future__ import annotations

from export.pipeline import ExportConfig, export
from export.quantize import export as quantize
from export.quantize.export import QuantizeConfig


def notes_of(path, out, **options):
    """Export a checkpoint; returns the notes for the user."""
    notes: list[str] = []
    export(ExportConfig(str(path), out, **options), lambda total: lambda done: None, notes.append)
    return notes


def quantised(path, out, kind, data=None, dtype=None, **how):
    """Export a checkpoint quantised by a scheme; returns `out`."""
    config = ExportConfig(str(path), out, dtype=dtype or kind.dtypes[0])
    quantize.export(
        config, QuantizeConfig(kind.name, kind.target, data, **how), lambda total: lambda done: None
    )
    return out


def scheme_id(kind) -> str:
    """The name of a scheme in test ids."""
    return f"{kind.name}-{kind.target}"
