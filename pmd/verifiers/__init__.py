"""Verifiers judge the text of a completion: one file per kind, a pool that runs them, a sandbox for programs."""
