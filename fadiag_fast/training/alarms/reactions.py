"""What alarms do: warn, log, stop, save, or call a function."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..._common.warn import user_level
from .events import Action, Alarm, AlarmWarning, AllClear, Event, TrainingStopped

_log = logging.getLogger("fadiag_fast.training")


class Reactions:
    """Do what the user asked for when there is an alarm, and hand on every event.

    Args:
        actions, save, on_event: as :class:`.Alarms` has them.

    Attributes:
        stop_requested: whether ``"stop"`` was among the actions of an alarm.

    Raises:
        ValueError: an unknown action, or ``"save"`` without ``save``.
    """

    def __init__(
        self,
        actions: Sequence[Action] | Action,
        save: Callable[[Alarm], Any] | None,
        on_event: Callable[[Event], Any] | None,
    ) -> None:
        self.actions = (actions,) if isinstance(actions, str) or callable(actions) else actions
        for action in self.actions:
            if not callable(action) and action not in ("warn", "log", "stop", "save"):
                raise ValueError(
                    f"Alarms: expected the actions warn, log, stop, save or a function, got "
                    f"{action!r}"
                )
        if "save" in self.actions and save is None:
            raise ValueError("Alarms: the action save: expected save, a function, got None")
        self._save = save
        self._on_event = on_event
        self._broken: set[int] = set()
        self.stop_requested = False

    def tell(self, event: Event) -> None:
        """Log an all clear, and hand any event on."""
        if isinstance(event, AllClear) and "log" in self.actions:
            _log.info("%s", event.sentence)
        if self._on_event is not None:
            self._call(self._on_event, event, "on_event")

    def act(self, alarms: Iterable[tuple[Alarm, bool]]) -> None:
        """Do what an alarm does; each comes with whether it is the first of its episode.

        Raises:
            TrainingStopped: ``"stop"`` is among the actions; the others are done first.
        """
        stop: Alarm | None = None
        for alarm, first in alarms:
            for action in self.actions:
                if action == "warn":
                    warnings.warn(alarm.sentence, AlarmWarning, stacklevel=user_level())
                elif action == "log":
                    _log.warning("%s", alarm.sentence)
                elif action == "stop":
                    stop = stop or alarm
                elif action == "save":
                    if first and self._save is not None:
                        self._call(self._save, alarm, "save")
                elif callable(action):
                    self._call(action, alarm, "an action")
        if stop is not None:
            self.stop_requested = True
            raise TrainingStopped(stop)

    def _call(self, function: Callable[[Any], Any], argument: Any, name: str) -> None:
        if id(function) in self._broken:
            return
        try:
            function(argument)
        except TrainingStopped:
            raise
        except Exception as error:
            self._broken.add(id(function))
            warnings.warn(
                f"Alarms: {name}: {function!r} raised {type(error).__name__}: {error}. It is not "
                f"called again; training goes on.",
                AlarmWarning,
                stacklevel=user_level(),
            )
