"""Procedural Memory Distillation (arXiv 2607.01480): verified rollouts become memory, memory teaches the policy."""

__version__ = "0.1.0"
