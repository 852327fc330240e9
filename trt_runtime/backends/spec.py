"""What is known about a backend before it is opened: a row in the table of backends.

A backend of your own is a BackendSpec in one file: an entry point of the group `dllm_trt.backends`, or
`--backend my_module:SPEC`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trt_runtime.artifact.manifest import Quantization

CPU = "cpu"


@dataclass(frozen=True)
class Layout:
    """How a backend stores a model, for forecasts of memory: `copies` of the weights, and whether a 16-bit
    head is also stored in float32 (wide_head).

    name, label: in tables, long and short. scores: attention writes its scores [B, N, S, C] to memory.
    on_cpu: it runs on a CPU. widens: on a CPU it computes fp16 in fp32, and does not support bf16.
    quantized_for: of manifest.TARGETS, the quantised artifacts that it runs. reads_whole: opening an engine
    may keep its whole file in memory that CPU and GPU share.
    """

    name: str
    label: str
    copies: int = 1
    wide_head: bool = True
    scores: bool = True
    on_cpu: bool = False
    widens: bool = False
    quantized_for: str | None = None
    reads_whole: bool = False

    def runs_quantized(self, quantized: Quantization, *, on_cpu: bool) -> bool:
        """Whether the layout runs a quantised artifact on a CPU or a GPU."""
        return quantized.target == self.quantized_for and on_cpu == self.on_cpu


@dataclass(frozen=True)
class BackendSpec:
    """A backend by name.

    opener: 'module:Class' of its Backend, which is called with the artifact's path and options; imported when
    it is opened. install: returns the command that installs its packages. options: the names that the command
    line may pass. devices: the names of its devices, the default first; empty where a device is the number of
    a GPU. is_concurrent: on a CPU, several threads may call it at the same time. is_reference: the other
    backends are compared with it. layouts: for forecasts. renamed: former names of options -> today's.
    """

    name: str
    opener: str
    install: Callable[[], str]
    options: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    is_concurrent: bool = False
    is_reference: bool = False
    layouts: tuple[Layout, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    def device_of(self, options: Mapping[str, Any]) -> str:
        """The device that these options select: 'cpu', or the name or number of a GPU."""
        given = options.get("device")
        return str(given) if given is not None else self.devices[0] if self.devices else "0"

    def is_on_cpu(self, options: Mapping[str, Any]) -> bool:
        """Whether the model runs on the CPU with these options."""
        return self.device_of(options) == CPU
