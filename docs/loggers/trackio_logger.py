"""Lightning's logger for Trackio, which has none of its own. Metrics, configuration and tables stay on this machine."""

from typing import Any

import trackio
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class TrackioLogger(Logger):
    """Logs to a project of Trackio; a run begins with the first thing that is logged."""

    def __init__(self, project: str, name: str | None = None):
        super().__init__()
        self._project, self._run_name = project, name
        self._config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str | None:
        return self._run_name

    @property
    def run(self) -> Any:
        if self._run is None:
            self._run = trackio.init(self._project, name=self._run_name, config=self._config, embed=False)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self._config = dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.run.log(metrics, step=step)

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int | None = None) -> None:
        """What pmd calls with its tables of completions, as it does with Lightning's WandbLogger."""
        self.run.log({key: trackio.Table(columns=columns, data=data)}, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
