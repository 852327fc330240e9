"""Run by tests/kernels/test_tensorrt_plugins.py in its own process: calls our plugin as TensorRT does.

The package `tensorrt.plugin` and the bindings are real (their libraries are stubs); shape expressions are
Python objects here. Prints the plugin's answers as JSON.
"""

import json
import sys
import types as types_module

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
    def __init__(self, name):
        self.name = name


class Registry:
    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, namespace):
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, *key):
        return self.creators[key]


def package():
    trt = types_module.ModuleType("tensorrt")
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


def axes(shape):
    """A shape of the arguments: ["rows", 64, ["rows", 8]], the last of which is rows * 8."""
    held = Shapes(len(shape))
    held[:] = [axis(item) for item in shape]
    return held


def axis(item):
    builder = Expressions()
    if isinstance(item, list):
        return builder.operation(real.DimensionOperation.PROD, axis(item[0]), axis(item[1]))
    return Expression(item) if isinstance(item, str) else builder.constant(item)


def described(trt, shape, kind):
    description = trt.DynamicPluginTensorDesc()
    description.desc = trt.PluginTensorDesc()
    description.desc.dims = [item if isinstance(item, int) else -1 for item in shape]
    description.desc.type, description.desc.format = kind, trt.TensorFormat.LINEAR
    description.min, description.opt, description.max = (
        [item if isinstance(item, int) else rows for item in shape] for rows in (1, 32, 64)
    )
    return description


def main(name, facts, compute_capability, shapes, types):
    """shapes and types: of the inputs."""
    trt = package()
    from plugins import tensorrt_plugins

    known = {item.name: item for item in tensorrt_plugins.ALL}
    kernel, added = known[name], []
    assert tensorrt_plugins.register(kernel, trt) is tensorrt_plugins.register(kernel, trt)

    class Network:
        def add_plugin(self, factory, aot):
            added.append((factory, aot))

    try:
        tensors = [Tensor(name) for name in kernel.inputs]
        tensorrt_plugins.layer(Network(), trt, kernel, tensors, facts, compute_capability)
    except Exception as error:
        refused = str(error)
    ((make, aot),) = added
    _, _, plugin = make(trt.QuickPluginCreationRequest.STRICT_AOT)
    plugin, builder = plugin.clone(), Expressions()
    given = [getattr(trt, kind) for kind in types]
    kinds = plugin.get_output_data_types(given, [len(shape) for shape in shapes])
    outputs = plugin.get_output_shapes([axes(shape) for shape in shapes], [], builder)
    written = [[item.text if item.value is None else item.value for item in shape] for shape in outputs]
    tensors = [
        *(described(trt, shape, kind) for shape, kind in zip(shapes, given, strict=True)),
        *(described(trt, shape, kind) for shape, kind in zip(written, kinds, strict=True)),
    ]
    count = len(shapes)
    plugin.get_supported_format_combinations(tensors, count)
    plugin.configure_plugin(tensors[:count], tensors[count:])
    plugin.set_tactic(0)
    launch, extra = types_module.SimpleNamespace(), type("Extra", (dict,), {})()
    plugin.get_launch_params([axes(shape) for shape in shapes], tensors, count, launch, extra, builder)
    entry, code = plugin.get_kernel(
        [item.desc for item in tensors[:count]], [item.desc for item in tensors[count:]]
    )
    print(
        json.dumps(
            {
                "version": trt.__version__,
                "aot": aot,
                "refused": refused,
                "kinds": [str(kind) for kind in kinds],
                "shapes": written,
                "launch": {key: text_of(value.expr) for key, value in vars(launch).items()},
                "extra": [text_of(extra[i].expr) for i in range(extra.nbSymExprs)],
                "name": entry.decode() if isinstance(entry, bytes) else entry,
                "ptx": bytes(code).decode(),
            }
        )
    )


def text_of(expression):
    return getattr(expression, "text", str(expression))


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
