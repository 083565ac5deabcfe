"""CUDA C++ kernels: tensors to addresses."""
