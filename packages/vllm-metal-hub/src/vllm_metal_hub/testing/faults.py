"""What can go wrong on the way from a hub, as data."""

import re
import threading
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["status", "drop", "reset", "corrupt", "truncate", "hang", "stall", "ignore_range", "slow"]


@dataclass(frozen=True)
class Fault:
    """One kind of misbehaviour for the requests whose ``"METHOD /path?query"`` matches ``match``.

    status: answer ``status`` with ``headers``. drop and reset: break off after ``after`` bytes of the body, politely
    or not. corrupt: flip one byte, same size. truncate: announce and send ``after`` bytes. hang: wait ``seconds``
    before the headers. stall: wait ``seconds`` after ``after`` bytes. ignore_range: answer 200 with everything.
    slow: ``after`` bytes a second.

    It happens ``times`` times; -1 is for ever.
    """

    match: str
    kind: Kind
    times: int = 1
    after: int = 0
    status: int = 503
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


class FaultPlan:
    """The faults still to come; threads of the server take them one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left: list[tuple[Fault, int]] = []

    def add(self, fault: Fault) -> None:
        """Let ``fault`` happen from now on."""
        with self._lock:
            self._left.append((fault, fault.times))

    def clear(self) -> None:
        """Behave well from now on."""
        with self._lock:
            self._left.clear()

    def take(self, request: str, kinds: tuple[Kind, ...]) -> Fault | None:
        """The first fault of one of ``kinds`` that matches, counted down."""
        with self._lock:
            for index, (fault, left) in enumerate(self._left):
                if left != 0 and fault.kind in kinds and re.search(fault.match, request):
                    self._left[index] = (fault, left - 1)
                    return fault
        return None
