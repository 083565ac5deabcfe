"""GPUs that need not be here: what they are, what the compilers make for them, and how that is used.

`gpus` and `toolchain` import nothing but the standard library: setup.py loads them before there is torch.
`cubin` reads machine code, `bundle` and `triton_cache` put kernels compiled ahead of time to use.
"""
