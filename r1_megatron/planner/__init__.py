"""Arithmetic about a run that needs no machine: what a model costs."""
