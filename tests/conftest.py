"""Settings of the whole suite."""

from hypothesis import HealthCheck, settings

# No example is timed: a busy machine is not a bug. Draws repeat, so that a failure is everybody's.
settings.register_profile("pmd", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pmd")
