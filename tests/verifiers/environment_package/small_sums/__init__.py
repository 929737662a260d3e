"""Sums of two numbers, with two weighted rewards and a metric."""

from small_sums.taskset import SmallSumsTaskset

__all__ = ["SmallSumsTaskset"]
