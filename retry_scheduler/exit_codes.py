"""What the program leaves with; systemd and scripts tell by it whether to try again (sysexits.h)."""

import signal

EX_OK = 0
EX_WRONG = 1  # the demo's counts
EX_USAGE = 64
EX_UNAVAILABLE = 69  # a server is away
EX_SOFTWARE = 70  # a bug
EX_CONFIG = 78
EX_INTERRUPTED = 128 + signal.SIGINT
