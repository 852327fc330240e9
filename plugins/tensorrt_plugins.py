"""Row statistics inside a TensorRT engine: the Triton kernel as a quick plugin (TensorRT 10.16 and 11.4),
compiled ahead of time.

`replace_statistics` edits a parsed network, so that the artifact stays standard ONNX. The engine contains the
PTX, and needs neither Python nor Triton at run time. TensorRT passes input pointers, extra int32 arguments,
then output pointers: the kernel has the same order. TensorRT-RTX does not support such plugins.
"""
# no `from __future__ import annotations`: tensorrt.plugin reads the annotations of the decorated functions as
# types

import importlib
from collections.abc import Callable
from typing import Any

from trt_runtime.artifact.contract import LOGITS, STATISTICS
from trt_runtime.errors import DllmError

from .row_statistics import compiled

NAMESPACE, NAME = "dllm", "row_statistics"
Statistics = Callable[
    [Any, int], list[Any]
]  # logits [rows, V] and the mask's id -> token, confidence, runner_up, entropy [rows]


def register(trt: Any) -> Any:
    """The plugin's definition, registered on the first call in a process. `trt` is the package `tensorrt`."""
    plugin = importlib.import_module(f"{trt.__name__}.plugin")
    known = getattr(getattr(plugin.op, NAMESPACE, None), NAME, None)
    if known is not None:
        return known
    Desc = plugin.TensorDesc
    name = f"{NAMESPACE}::{NAME}"

    # attributes of type int and float fail in 10.16 with NumPy 2.4 (a conversion of arrays to scalars): hence
    # a str
    @plugin.register(name)
    def describe(logits: Desc, mask_token_id: str, compute_capability: str) -> tuple[Desc, Desc, Desc, Desc]:  # type: ignore[valid-type]
        rows = (logits.shape_expr[0],)
        return tuple(
            plugin.from_shape_expr(rows, kind) for kind in (trt.int64, trt.float32, trt.float32, trt.float32)
        )

    @plugin.aot_impl(name)
    def implement(
        logits: Desc,
        mask_token_id: str,
        compute_capability: str,
        outputs: tuple[Desc, Desc, Desc, Desc],
        tactic: int,  # type: ignore[valid-type]
    ) -> tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]:
        made = compiled(int(logits.shape[1]), int(mask_token_id), int(compute_capability))
        launch = plugin.KernelLaunchParams(
            grid_x=logits.shape_expr[0], block_x=made.threads, shared_mem=made.shared
        )
        return made.name, made.ptx, launch, plugin.SymIntExprs(0)

    return getattr(getattr(plugin.op, NAMESPACE), NAME)


def plugin_layer(network: Any, trt: Any, compute_capability: int) -> Statistics:
    """Statistics of a plugin layer added to the network."""
    definition, attributes = register(trt), {"compute_capability": str(compute_capability)}

    def make(logits: Any, mask_token_id: int) -> list[Any]:
        layer = network.add_plugin(
            definition(logits, mask_token_id=str(mask_token_id), **attributes), aot=True
        )
        if layer is None:
            raise DllmError(
                f"TensorRT {trt.__version__} rejected the plugin {NAMESPACE}::{NAME}: remove --plugins."
            )
        layer.name = NAME
        return [layer.get_output(i) for i in range(len(STATISTICS))]

    return make


def replace_statistics(network: Any, trt: Any, mask_token_id: int, make: Statistics) -> None:
    """Replace the layers that compute a parsed network's statistics; the names, shapes and order of its
    outputs do not change.

    Each output [B, R] comes from a reshape, whose input becomes the new [B*R] tensor. The builder drops the
    old layers, which nothing uses any more. Raises DllmError for a network of another form.
    """
    maker = {
        layer.get_output(k).name: layer
        for layer in map(network.get_layer, range(network.num_layers))
        for k in range(layer.num_outputs)
    }
    reshapes = {}
    for name in (LOGITS, *STATISTICS):
        # of head 'logits', an output: the parser may put a cast or an identity after the layer that the
        # graph names
        layer = maker.get(name)
        while layer is not None and layer.type in (trt.LayerType.IDENTITY, trt.LayerType.CAST):
            layer = maker.get(layer.get_input(0).name)
        if layer is None or layer.type != trt.LayerType.SHUFFLE:
            raise DllmError(f"the network has no reshape that produces '{name}': export the artifact again.")
        reshapes[name] = layer
    logits = reshapes[LOGITS].get_input(0)
    if len(logits.shape) != 2 or logits.shape[1] < 1 or logits.dtype != trt.float32:
        raise DllmError(
            f"the logits are {logits.dtype} {tuple(logits.shape)}, expected float32 [rows, vocabulary]: "
            "build without --plugins."
        )
    for name, made in zip(STATISTICS, make(logits, mask_token_id), strict=True):
        if made.dtype != reshapes[name].get_input(0).dtype:
            raise DllmError(
                f"the plugin's '{name}' is {made.dtype}, expected {reshapes[name].get_input(0).dtype}."
            )
        reshapes[name].set_input(0, made)
