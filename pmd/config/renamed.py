"""Keys of earlier versions, so that an error message can name the replacement. None of them is still read."""

#: Old key: the key that replaced it, with the same values and the same meaning.
RENAMED = {
    "rollouts.problems_per_step": "rollouts.tasks_per_step",
    "memory.insights_per_problem": "memory.insights_per_task",
    "memory.experiences_per_problem": "memory.experiences_per_task",
    "objective.anchor_weight": "objective.no_context_weight",
    "objective.engine_cap": "objective.tis_cap",
    "verification.workers": "verifiers.workers",
    "verification.deadline_s": "verifiers.deadline_s",
    "verification.sandbox": "verifiers.sandbox",
}
#: Old key: why nothing replaced it.
REMOVED = {
    "memory.diversity": "no experiment used it, and texts that repeat each other are merged when they are written",
    "memory.exploration": "no experiment used it, and every retrieved item is now chosen by its score",
    "memory.probation": "no experiment used it, and insights are now retrieved from the start",
}


def describe_old_key(key: str, value: str) -> str | None:
    """Return what to write instead of an old key; None if the key never existed."""
    if key in RENAMED:
        return f"{key}={value} is now {RENAMED[key]}; rename it."
    if key in REMOVED:
        return f"{key}={value} was removed: {REMOVED[key]}; delete it."
    return None
