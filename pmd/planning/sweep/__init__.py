"""Sweeps: a grid of runs, planned, launched and summarised."""
