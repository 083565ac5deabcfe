"""Kernels compiled ahead of time, for GPUs that need not be here: the folders that `bitfuse.load_kernels`
takes.

`triton_kernels` finds which Triton kernels the ops' own planning picks, and compiles them; `build` makes the
folder; `table` prints what each kernel takes of a multiprocessor.
"""
