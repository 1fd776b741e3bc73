"""The stages of a run, each a story from top to bottom: ``grpo``, ``sft``, ``evaluate``."""
