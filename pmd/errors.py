"""The errors that a user can see. Messages name key, value, rule and remedy."""

from collections.abc import Sequence


class PmdError(Exception):
    """Base class of the errors that pmd raises on purpose; the command line prints them without a traceback."""


class ConfigError(PmdError):
    """The configuration, or a file that it names, cannot be used. Carries every problem found, not just the first."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        heading = "" if count == 1 else f"{count} problems:\n"
        super().__init__(heading + "\n".join(f"- {problem}" if count > 1 else problem for problem in self.problems))


class EngineError(PmdError):
    """The rollout engine died, timed out, or returned something other than what it was asked for."""


class VerificationError(PmdError):
    """Verification as a whole is broken: too many verifiers hang, or no completion could be judged."""


class AlignmentError(PmdError):
    """Two objects that must describe the same tokens, rollouts or versions do not."""


class TrainingError(PmdError):
    """Training cannot go on: memory runs out, steps are not finite, or the policy has collapsed."""


class DiskError(PmdError):
    """A file could not be written: full disk, size limit, no permission. Existing data is unchanged."""


class CheckpointError(PmdError):
    """A checkpoint is damaged or is not pmd's, or what should be saved holds values that are not finite."""


class RunFailed(PmdError):
    """Something unforeseen ended the run; the message says what, and where its traceback is."""


class RankKilled(RunFailed):
    """A signal ended a rank of a run on several devices; another attempt may succeed."""

    def __init__(self, message: str, signal_number: int):
        self.signal_number = signal_number
        super().__init__(message)


class RunInterrupted(PmdError):
    """Ctrl-C or SIGTERM ended the run; the message says how to continue it."""


class MemoryStoreError(PmdError):
    """The memory store is damaged, has another schema or embedder, or was asked to store a held-out task."""


class RankLost(PmdError):
    """Another rank of a run on several devices has ended or hangs, so that this one cannot go on."""
