"""Steps recorded as CUDA graphs: a refine step of a repeated shape is launched as a whole.

The first time, a step runs in the context that its profile shares. The second time, it runs in a context of
its own, whose shapes and addresses are set once, and is recorded; from then on the recording is launched.
TensorRT-RTX records graphs itself: then only the context is kept.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_runtime.backends import cuda
from trt_runtime.backends.tensorrt.calls import Call
from trt_runtime.backends.tensorrt.engines import Engines
from trt_runtime.errors import BackendError

Key = tuple[Any, ...]  # what identifies a step: its engine, profile, shape, slots and kind of work
Work = Callable[[Any], None]  # queues the step in a context
_MOST_STEPS = 64  # steps per cache that keep a context of their own
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedStep:
    """A context that nothing else uses, and the graph recorded in it (None: the package records graphs
    itself, or recording failed)."""

    context: Any
    graph: cuda.Graph | None


class Recorder:
    """Runs steps of the engines, recorded where that is possible. bind: sets the shapes and addresses of a
    call in a context.

    is_on: whether to record at all. unrecorded: calls that could not be recorded, by engine, profile and
    shape.
    """

    def __init__(self, engines: Engines, device: cuda.CudaDevice, directory: Path, *, is_on: bool) -> None:
        self._engines, self._device, self._directory, self._is_on = engines, device, directory, is_on
        self.unrecorded: set[Key] = set()

    def queue(
        self,
        call: Call,
        steps: OrderedDict[Key, RecordedStep | None],
        key: Key | None,
        bind: Callable[[Any], None],
        work: Work,
    ) -> None:
        """Queue the work of a call. steps: those of the cache, by key, the latest last; key: None for work
        that is not repeated."""
        if key is None or not self._is_on or key not in steps:
            context = self._engines.context(call.engine, call.profile)
            bind(context)
            work(context)
            if key is not None:
                steps[key] = None
            return
        step = steps.pop(key)
        if step is None:
            step = self._record(call, bind, work)
        elif step.graph is not None:
            self._device.launch(step.graph)
        else:
            work(step.context)
        steps[key] = step
        self._forget_the_oldest(steps)

    def _record(self, call: Call, bind: Callable[[Any], None], work: Work) -> RecordedStep:
        """Run a step in a context of its own, then record it: TensorRT requires a run in the same shapes
        first."""
        context = self._engines.new_context(call.engine, call.profile, recorded=True)
        bind(context)
        work(context)
        if self._engines.records_itself or call.key in self.unrecorded:
            return RecordedStep(context, None)
        self._device.synchronize()
        try:
            return RecordedStep(context, self._device.record(lambda: work(context)))
        except BackendError as error:  # some layers cannot be captured; the run before it was good
            self.unrecorded.add(call.key)
            _LOG.warning(
                "%s: a step of %d rows by %d positions cannot be recorded as a CUDA graph and is queued "
                "layer by layer: %s",
                self._directory,
                *call.shape[:2],
                error,
            )
            return RecordedStep(context, None)

    def _forget_the_oldest(self, steps: OrderedDict[Key, RecordedStep | None]) -> None:
        with_context = [key for key, step in steps.items() if step is not None]
        for oldest in with_context[:-_MOST_STEPS]:
            self._device.synchronize()  # it may still be running
            del steps[oldest]
