"""Rewards: what a completion is worth.

``base.py`` turns the ``reward`` section into a :class:`~r1_megatron.rewards.base.Grader`; every other file is one
reward function. This file imports nothing, so that the worker process of a plug-in starts quickly.
"""
