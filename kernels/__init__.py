"""Triton kernels of realign-fast, installed as `realign_fast.kernels`: torch and triton only, no policy.

Nothing here but `_maps` is imported unless a CUDA or ROCm tensor asks for it.
"""
