"""TensorRT and TensorRT-RTX: engines built, stored and run."""
