"""Held-out evaluation: sampling, scores, comparisons between methods, and reports."""
