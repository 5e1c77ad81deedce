"""How many files, and with them connections, a process may have open at once."""

from __future__ import annotations

import resource

WANTED_FILES = 65_536


def allow_open_files() -> int:
    """Raise this process's soft limit as far as the system lets it; the limit that now holds.

    A long poll holds a connection, and shells often start programs with a limit of 1,024 or 256.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):  # some systems have a lower limit that they don't tell
            return soft
        return wanted
    return soft
