"""What a process gets from the system: the signals that ask for an end, and the cores it may use."""

from __future__ import annotations

import os
import signal


def signals() -> list[int]:
    """Ctrl-C, a polite kill, and a terminal or connection that was closed, unless that is ignored, as under nohup."""
    found: list[int] = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        found.append(hangup)
    return found


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
