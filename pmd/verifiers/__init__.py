"""Verifiers judge the text of a completion: one file a kind, a pool that runs them, a sandbox for programs."""
