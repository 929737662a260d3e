"""Rollout engines: token ids in, completions with token ids and log-probs out."""
