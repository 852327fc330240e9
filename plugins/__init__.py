"""GPU kernels (Triton), each with its NumPy reference. Every graph is correct without them. Needs triton 3.6; tools of the checkout."""
