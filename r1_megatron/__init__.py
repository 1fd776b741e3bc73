"""r1_megatron: the DeepSeek-R1 recipe for large mixture-of-experts models, trained and sampled on megatron-core.

Start reading at ``types.py`` (what flows between rooms) and ``stages/grpo.py`` (the main loop).
"""

__version__ = "0.1.0"
