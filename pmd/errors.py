"""Every error a user can meet. Each message names key, value, rule and remedy."""

from collections.abc import Sequence


class PmdError(Exception):
    """Base of all errors that pmd raises on purpose; the command line prints it without a traceback."""


class ConfigError(PmdError):
    """The configuration, or a file it names, cannot be run. Carries every problem found, not just the first."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        heading = "" if count == 1 else f"{count} problems:\n"
        super().__init__(heading + "\n".join(f"- {problem}" if count > 1 else problem for problem in self.problems))


class EngineError(PmdError):
    """The rollout engine failed: it died, timed out, or returned what was not asked for."""


class VerificationError(PmdError):
    """Verification as a whole is broken: too many verifiers hang, or not one verdict says anything."""


class AlignmentError(PmdError):
    """Two things that must describe the same tokens, rollouts or versions do not."""


class DiskError(PmdError):
    """Something could not be written: a full disk, a limit, no permission. What was there before is untouched."""


class RunInterrupted(PmdError):
    """Ctrl-C or SIGTERM ended the run; the message says how to continue it."""


class MemoryStoreError(PmdError):
    """The memory store is damaged, of another schema or embedder, or was asked to keep a held-out problem."""
