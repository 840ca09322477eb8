"""Triton kernels of realign-fast, installed as `realign_fast.kernels`: torch and triton only, no policy.

Nothing here is imported unless a CUDA or ROCm tensor asks for it.
"""
