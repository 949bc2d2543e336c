"""The daemon and its faces: control-plane client, executor, HTTP API, command line."""

from typing import Final

VERSION: Final = "0.1.0"
