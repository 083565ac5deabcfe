"""GPUs that need not be here: what they are, and what the compiler makes for them.

`gpus` imports nothing but the standard library, and so does what setup.py loads before there is torch.
"""
