"""Where and when it is computed: Ray actors, the driver's loop, progress. No mathematics.

Ray reads its environment when it is imported, so what it must know is set here, before any module of this package imports it.
"""

import os
from pathlib import Path

# A process without GPUs must not see all of them.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
# Equal lines of several actors are several lines.
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
# A head started where a token lies asks for it, but Ray does not offer it to an explicit address by itself.
if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or Path("~/.ray/auth_token").expanduser().is_file():
    os.environ.setdefault("RAY_AUTH_MODE", "token")
