"""The limit of open files, in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys

PROGRAM = """
import resource
from openmint.cli.open_files import allow_open_files
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (128, min(hard, 1000)))
print(allow_open_files(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_a_low_soft_limit_is_raised_to_the_hard_one() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    wanted = str(min(hard, 1000) if hard != resource.RLIM_INFINITY else 1000)
    assert done.stdout.split() == [wanted, wanted]
