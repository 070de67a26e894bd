"""The kernels, in PyTorch, C++, Triton and CUDA, and the choice among them."""
