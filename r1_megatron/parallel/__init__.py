"""Ranks and devices: what lets CPU/Gloo and CUDA/NCCL run the same code, process groups, the launcher."""
