"""As whom a task runs: what `tasks.run_as` says, and the user of this host that follows from it for one attempt.

The user database may be far away (nsswitch.conf(5)): a user that is known only when a task starts is looked up on a
thread.
"""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from remotegpu_agent.config_values import SUBMITTER
from remotegpu_agent.runspec import RunSettings
from remotegpu_schemas.attempt import TaskUser
from remotegpu_schemas.errors import Code, Misconfigured, Refused
from remotegpu_schemas.task import Task
from remotegpu_sidecar.launcher import LaunchError

__all__ = ["SUBMITTER", "Submitter", "as_submitted", "find_user", "settings_of"]


@dataclass(frozen=True)
class Submitter:
    """A caller of the Unix socket; `directory` is where it says that it is, an absolute path."""

    uid: int
    directory: Path | None = None


def as_submitted(tasks: Sequence[Task], submitter: Submitter | None) -> list[Task]:
    """The tasks in their submitter's directory, where they run as their submitter.

    Raises Refused(POLICY_REFUSED) for a caller that is no user of this host.
    """
    if submitter is None:
        raise Refused(
            Code.POLICY_REFUSED,
            "tasks run as their submitter here (tasks.run_as), and a caller with a token is no user of this host; "
            "submit over the Unix socket",
        )
    if submitter.directory is None:
        return list(tasks)
    return [task.model_copy(update={"workdir": str(submitter.directory / (task.workdir or ""))}) for task in tasks]


async def settings_of(uid: int | None, settings: RunSettings) -> RunSettings:
    """The settings for a run of what `uid` submitted, with its user. Raises LaunchError when there is none."""
    if not settings.runs_as_submitter:
        return settings
    if uid is None:
        raise LaunchError(
            "it came without a user of this host, and tasks run as their submitter here (tasks.run_as); "
            "submit it over the Unix socket, or name a user in tasks.run_as"
        )
    if uid == os.geteuid():
        return settings
    try:
        user = await asyncio.to_thread(lambda: _task_user(pwd.getpwuid(uid)))
    except KeyError:
        gone = f"its submitter, uid {uid}, is no user of this host (any more); create one, or submit it as another"
        raise LaunchError(gone) from None
    return replace(settings, user=user)


def find_user(name: str) -> TaskUser:
    """Resolve a user for `tasks.run_as`. Raises Misconfigured when there is no such user."""
    try:
        return _task_user(pwd.getpwnam(name))
    except KeyError:
        raise Misconfigured(
            f"tasks.run_as: there is no user {name!r} on this host; create it or name another"
        ) from None


def _task_user(entry: pwd.struct_passwd) -> TaskUser:
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return TaskUser(name=entry.pw_name, uid=entry.pw_uid, gid=entry.pw_gid, groups=groups, home=entry.pw_dir)
