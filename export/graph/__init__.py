"""The ONNX graphs: the decoder as parts, both roles, lowerings, and what a graph may not contain."""
