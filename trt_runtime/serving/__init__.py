"""The OpenAI-compatible server, its replicas, and Triton Inference Server's model repository."""
