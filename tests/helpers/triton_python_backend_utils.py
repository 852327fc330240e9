"""A stand-in for the module that Triton's Python backend provides to its models."""

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


class TritonError:
    def __init__(self, text):
        self.text = text


class InferenceResponse:
    def __init__(self, output_tensors, error=None):
        self.tensors, self.error = {tensor.name: tensor.array for tensor in output_tensors}, error


def get_input_tensor_by_name(request, name):
    return request.inputs.get(name)
