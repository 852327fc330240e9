"""Scripts that Polygraphy runs on a parsed network and its builder's configuration, so that it builds what
`dllm-trt build` builds.

polygraphy run ... --trt-network-postprocess-script postprocess.py:check_inputs \\
    --trt-config-postprocess-script postprocess.py:configure
"""

import json
from pathlib import Path

FACTS = json.loads((Path(__file__).resolve().parent / "facts.json").read_text())


def check_inputs(network):
    """Fail for an input on which no output depends: TensorRT's parser silently drops what it does not
    support."""
    made_by, read, waiting = {}, set(), [network.get_output(i).name for i in range(network.num_outputs)]
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        made_by.update({layer.get_output(k).name: layer for k in range(layer.num_outputs)})
    while waiting:
        name = waiting.pop()
        if name not in read:
            read.add(name)
            if name in made_by:
                layer = made_by[name]
                waiting += [
                    layer.get_input(k).name for k in range(layer.num_inputs) if layer.get_input(k) is not None
                ]
    ignored = [
        name for name in (network.get_input(i).name for i in range(network.num_inputs)) if name not in read
    ]
    if ignored:
        raise SystemExit(
            f"no output depends on the input {', '.join(ignored)}: the engine would compute something else"
        )


def configure(builder, network, config):
    """Disable TF32: otherwise products of an fp32 graph are rounded to TF32, and a comparison would measure
    that rounding."""
    if FACTS["dtype"] == "fp32":
        try:
            import tensorrt as trt
        except ImportError:
            import tensorrt_rtx as trt
        config.clear_flag(trt.BuilderFlag.TF32)
