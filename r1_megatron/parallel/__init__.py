"""Ranks and devices: the layer that lets CPU/Gloo and CUDA/NCCL run the same code, and megatron-core's process groups."""
