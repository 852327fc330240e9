"""Run by test_plugins_tensorrt.py in a process of its own: our plugin, driven as TensorRT drives one.

The package `tensorrt.plugin` and the bindings are real (their libraries are stubs); expressions of shapes are
Python objects here. Prints as JSON what TensorRT would be told.
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
        self.held = {}

    def register_creator(self, creator, namespace):
        self.held[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, *key):
        return self.held[key]


def package():
    trt = types.ModuleType("tensorrt")
    trt.__path__ = [real.__path__[0]]
    trt.__dict__.update(
        {
            name: held
            for name, held in vars(real).items()
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
    held = trt.DynamicPluginTensorDesc()
    held.desc = trt.PluginTensorDesc()
    held.desc.dims, held.desc.type, held.desc.format = shape, kind, trt.TensorFormat.LINEAR
    held.min, held.opt, held.max = ([rows, *shape[1:]] for rows in (1, 32, 64))
    return held


def main(vocab, mask_token_id, compute_capability):
    trt = package()
    from plugins import tensorrt_plugins

    assert tensorrt_plugins.register(trt) is tensorrt_plugins.register(trt)
    added = []

    class Network:
        def add_plugin(self, made, aot):
            added.append((made, aot))

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
                "shapes": [[axis.text for axis in held] for held in shapes],
                "launch": texts,
                "extra": len(extra),
                "name": name.decode() if isinstance(name, bytes) else name,
                "ptx": bytes(code).decode(),
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
