"""What a device sends to another one: so many bytes in a second, and a latency for each message."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What a device sends to another one.

    Attributes:
        bytes_per_second: one way.
        latency_seconds: of each message.
    """

    bytes_per_second: float
    latency_seconds: float

    def seconds(self, num_bytes: float) -> float:
        """Of one message."""
        return self.latency_seconds + num_bytes / self.bytes_per_second
