"""The signals that ask for an end: what is running saves first."""

from __future__ import annotations

import signal


def signals() -> list[int]:
    """Ctrl-C, a polite kill, and a terminal or connection that was closed, unless that is ignored, as under nohup."""
    found: list[int] = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        found.append(hangup)
    return found
