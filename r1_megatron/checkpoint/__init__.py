"""Checkpoints: distributed ones of any layout, and the one table of Hugging Face names."""
