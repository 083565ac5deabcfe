"""C++ kernels on the CPU: tensors to addresses."""
