"""How often each process was started, and whether one that was lost with its node is started again."""

from __future__ import annotations

from dataclasses import dataclass, field

LIMIT = 3  # starts of one process


@dataclass
class Attempts:
    """The starts of one process. Only the current one counts: whatever an earlier one still sends is ignored."""

    limit: int = LIMIT
    number: int = 0
    reasons: list[str] = field(default_factory=list)

    def start(self) -> int:
        """Count a start; return its number."""
        self.number += 1
        return self.number

    def is_current(self, number: int) -> bool:
        return number == self.number

    def lost(self, reason: str) -> bool:
        """Record that the current start was lost; return whether there may be another."""
        self.reasons.append(reason)
        return self.number < self.limit

    @property
    def summary(self) -> str:
        """Why there is no further start."""
        same = len(set(self.reasons)) == 1
        reasons = self.reasons[0] if same else "; ".join(self.reasons)
        return f"It was started {self.number} times, and lost each time: {reasons}."
