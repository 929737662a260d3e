"""Rollout engines: they turn prompts (token ids) into completions with token ids and log-probs."""
