"""Who computes the kernels: PyTorch, C++, Triton or CUDA."""
