"""The agent's HTTP API: a thin skin over `Operations`, on TCP and on a Unix socket."""

from remotegpu_agent.api.credentials import TlsPair
from remotegpu_agent.api.server import ApiServer
from remotegpu_agent.api.settings import ApiSettings, Endpoints, LegacyCall, LegacyCaller

__all__ = ["ApiServer", "ApiSettings", "Endpoints", "LegacyCall", "LegacyCaller", "TlsPair"]
