"""Where the agent can be reached, by the options and the environment of a call. Loads neither pydantic nor aiohttp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from remotegpu_agent.cli.exits import Exit, Stop

DEFAULT_SOCKET: Final = "/run/remotegpu-agent/agent.sock"
SOCKET_VARIABLE: Final = "REMOTEGPU_AGENT_SOCKET"
_DEFAULT_STATE_DIR: Final = "/var/lib/remotegpu-agent"
_ENDPOINTS_MAX_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class Endpoint:
    """A socket path, or a base URL with the token for it. `origin` says why it is tried."""

    origin: str
    socket: str | None = None
    url: str | None = None
    token: str | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"unix:{self.socket}" if self.socket is not None else str(self.url)


def find_endpoints(
    config: Path | None, url: str | None, token_file: Path | None, environ: Mapping[str, str]
) -> list[Endpoint]:
    """What to try, in this order: `--config`, `--url`, REMOTEGPU_AGENT_SOCKET, the standard socket.

    What is named wins over what is standard. Raises Stop when what is named cannot be used.
    """
    if config is not None:
        return _of_config(config, token_file, environ)
    if url is None and token_file is not None:
        raise Stop(Exit.USAGE, "--token-file is the token for --url or --config; give one of them too")
    if url is not None:
        return [Endpoint("--url", url=_checked(url), token=_token_of(token_file) if token_file is not None else None)]
    socket = environ.get(SOCKET_VARIABLE)
    if socket:
        return [Endpoint(SOCKET_VARIABLE, socket=socket)]
    return [Endpoint("the standard socket", socket=DEFAULT_SOCKET)]


def _checked(url: str) -> str:
    import urllib.parse

    try:
        parts = urllib.parse.urlsplit(url)
        is_good = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise Stop(Exit.USAGE, f"--url: {url[:100]!r} is no URL of an agent; write for example http://127.0.0.1:8090")
    return url.rstrip("/")


def _token_of(path: Path) -> str:
    """The first token of a file: bare, or `name:role:token`."""
    try:
        text = _read(path, _ENDPOINTS_MAX_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise Stop(Exit.USAGE, f"token file {path}: cannot read it: {error.strerror or error}") from None
    for line in text.splitlines():
        entry = line.strip()
        if entry and not entry.startswith("#"):
            token = entry.split(":", 2)[-1]
            if token.isascii() and token.isprintable() and " " not in token:
                return token
    raise Stop(Exit.USAGE, f"token file {path}: no token in it; write one a line, as name:role:token")


def _of_config(config: Path, token_file: Path | None, environ: Mapping[str, str]) -> list[Endpoint]:
    """What a running agent wrote down itself is first; what the config says comes behind it."""
    sections = _sections(config, environ)
    agent, api = sections.get("agent"), sections.get("api")
    state_dir = Path(str(_get(agent, "state_dir") or _DEFAULT_STATE_DIR))
    found: list[Endpoint] = []
    written = _written_endpoints(state_dir / "endpoints.json")
    if written.get("socket"):
        found.append(Endpoint("endpoints.json", socket=str(written["socket"])))
    elif not written:
        socket = _get(api, "socket", DEFAULT_SOCKET)
        if socket is not None:
            found.append(Endpoint("api.socket", socket=str(socket)))
    url = (
        written.get("url")
        if written
        else _url_of(_get(api, "listen", "127.0.0.1:8090"), has_tls=_get(api, "tls_cert_file") is not None)
    )
    token = _config_token(token_file, _get(api, "tokens_file") or state_dir / "api-token")
    if url and (token is not None or not found):
        found.append(Endpoint("endpoints.json" if written else "api.listen", url=str(url), token=token))
    return found


def _get(section: object, key: str, default: str | None = None) -> object:
    return section.get(key, default) if isinstance(section, dict) else default


def _url_of(listen: object, *, has_tls: bool) -> str | None:
    return (
        f"{'https' if has_tls else 'http'}://{listen}"
        if isinstance(listen, str) and not listen.endswith(":0")
        else None
    )


def _config_token(token_file: Path | None, fallback: object) -> str | None:
    if token_file is not None:
        return _token_of(token_file)
    try:
        return _token_of(Path(str(fallback)))
    except Stop:
        return None


def _sections(config: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """The file as it is, unchecked (`config check` checks it), under the variables that name socket and state."""
    from remotegpu_schemas import limits
    from remotegpu_schemas.problems import InvalidFile
    from remotegpu_schemas.strict_yaml import load

    try:
        documents = load(_read(config, limits.CONFIG_MAX_BYTES + 1), str(config), max_bytes=limits.CONFIG_MAX_BYTES)
    except OSError as error:
        raise Stop(Exit.USAGE, f"{config}: cannot read the config file: {error.strerror or error}") from None
    except InvalidFile as error:
        raise Stop(Exit.USAGE, str(error)) from None
    data = documents[0].data() if documents else {}
    sections: dict[str, Any] = dict(data) if isinstance(data, dict) else {}
    for section, key in (("agent", "state_dir"), ("api", "socket"), ("api", "listen"), ("api", "tokens_file")):
        value = environ.get(f"REMOTEGPU_AGENT__{section.upper()}__{key.upper()}")
        if value is not None:
            held = sections.get(section)
            sections[section] = {**(held if isinstance(held, dict) else {}), key: None if value == "null" else value}
    return sections


def _read(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most)


def _written_endpoints(path: Path) -> dict[str, object]:
    """`endpoints.json` of the agent; nothing if it never ran, or if it is not for us to read."""
    try:
        value = json.loads(_read(path, _ENDPOINTS_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
