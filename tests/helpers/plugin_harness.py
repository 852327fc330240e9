"""Run by tests/kernels/test_tensorrt_plugins.py in its own process: calls our plugin as TensorRT does.

The package `tensorrt.plugin` and the bindings are real (their libraries are stubs); shape expressions are
Python objects here. Prints the plugin's answers as JSON.
"""

import json
import sys
import types

import tensorrt_bindings as real


class Expression:
    def __init__(self, text, value=None):
        self.text, self.value = text, value

    def is_constant(self):
        return self.value is not None

    def get_constant_value(self):
        return self.value


class Expressions:
    def constant(self, value):
        return Expression(str(value), value)

    def operation(self, kind, left, right):
        return Expression(f"({kind.name} {left.text} {right.text})")


class Shapes(list):
    def __init__(self, count):
        super().__init__([None] * count)


class Tensor:
    name = "logits"


class Registry:
    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, namespace):
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, *key):
        return self.creators[key]


def package():
    trt = types.ModuleType("tensorrt")
    trt.__path__ = [real.__path__[0]]
    trt.__dict__.update(
        {
            name: value
            for name, value in vars(real).items()
            if not name.startswith("__") or name == "__version__"
        }
    )
    registry = Registry()
    trt.IDimensionExpr, trt.IExprBuilder, trt.DimsExprs, trt.ISymExpr, trt.ITensor = (
        Expression, Expressions, Shapes, type("ISymExpr", (), {}), Tensor)  # fmt: skip
    trt.get_plugin_registry = lambda: registry
    sys.modules["tensorrt"] = trt
    return trt


def described(trt, shape, kind):
    description = trt.DynamicPluginTensorDesc()
    description.desc = trt.PluginTensorDesc()
    description.desc.dims, description.desc.type, description.desc.format = (
        shape,
        kind,
        trt.TensorFormat.LINEAR,
    )
    description.min, description.opt, description.max = ([rows, *shape[1:]] for rows in (1, 32, 64))
    return description


def main(vocab, mask_token_id, compute_capability):
    trt = package()
    from plugins import tensorrt_plugins

    assert tensorrt_plugins.register(trt) is tensorrt_plugins.register(trt)
    added = []

    class Network:
        def add_plugin(self, factory, aot):
            added.append((factory, aot))

    try:
        tensorrt_plugins.plugin_layer(Network(), trt, compute_capability)(Tensor(), mask_token_id)
    except Exception as error:
        refused = str(error)
    ((make, aot),) = added
    _, _, plugin = make(trt.QuickPluginCreationRequest.STRICT_AOT)
    plugin = plugin.clone()
    builder, shape = Expressions(), Shapes(2)
    shape[:] = [Expression("rows"), builder.constant(vocab)]
    kinds = plugin.get_output_data_types([trt.float32], [2])
    shapes = plugin.get_output_shapes([shape], [], builder)
    tensors = [described(trt, [-1, vocab], trt.float32), *(described(trt, [-1], kind) for kind in kinds)]
    plugin.get_supported_format_combinations(tensors, 1)
    plugin.configure_plugin(tensors[:1], tensors[1:])
    plugin.set_tactic(0)
    launch, extra = types.SimpleNamespace(), type("Extra", (dict,), {})()
    plugin.get_launch_params([shape], tensors, 1, launch, extra, builder)
    name, code = plugin.get_kernel([item.desc for item in tensors[:1]], [item.desc for item in tensors[1:]])
    texts = {key: getattr(value.expr, "text", str(value.expr)) for key, value in vars(launch).items()}
    print(
        json.dumps(
            {
                "version": trt.__version__,
                "aot": aot,
                "refused": refused,
                "kinds": [str(kind) for kind in kinds],
                "shapes": [[axis.text for axis in shape] for shape in shapes],
                "launch": texts,
                "extra": len(extra),
                "name": name.decode() if isinstance(name, bytes) else name,
                "ptx": bytes(code).decode(),
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
