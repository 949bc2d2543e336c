"""The reference control plane: `serve(Settings(...))` in a process, or `python -m control_plane`.

Gives tasks to agents under leases, with strict fencing and idempotent claims; in compatibility mode it answers as
deployed planes do. Keeps everything in one SQLite file, or in a PostgreSQL that any number of planes share.
"""

from control_plane.server import Plane, serve
from control_plane.settings import CannotServe, Settings

__all__ = ["CannotServe", "Plane", "Settings", "serve"]
