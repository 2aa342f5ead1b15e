"""An exception of our own code: counted, logged once by kind, and no end of the engine."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class Faults:
    """What fell back to stock behaviour.

    Args:
        is_strict: let an exception fail the engine, for tests.
    """

    def __init__(self, is_strict: bool):
        self.is_strict = is_strict
        self.num = 0
        self._logged: set[str] = set()

    def fall_back(self, where: str, error: Exception) -> None:
        """Take note of an exception; the caller then does what stock SGLang would."""
        self.num += 1
        if self.is_strict:
            raise error
        kind = f"{where}: {type(error).__name__}"
        if kind not in self._logged:
            self._logged.add(kind)
            logger.error("dynasor fell back to stock behaviour (%s); logged once", kind, exc_info=error)
