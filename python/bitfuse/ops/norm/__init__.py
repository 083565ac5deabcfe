"""Ops of this family; beside each its backends: `<op>_cpu.py`, `<op>_cuda.py`. Triton's are in kernels/."""
