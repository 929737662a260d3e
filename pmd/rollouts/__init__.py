"""Rollouts: generated, verified, and streamed to training with their teacher contexts."""
