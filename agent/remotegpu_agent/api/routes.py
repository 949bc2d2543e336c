"""The table of calls. To add one: a handler, a line here, its models in `remotegpu_schemas.api`, its description."""

from __future__ import annotations

from typing import Final

from remotegpu_agent.api import administration, handlers
from remotegpu_agent.api.context import Route
from remotegpu_agent.api.logs import read_logs
from remotegpu_agent.api.settings import LegacyCall

ROUTES: Final = (
    Route(name="ping", method="GET", path="/ping", handler=handlers.ping, is_public=True),
    Route(
        name="system_info",
        method="GET",
        path="/system/info",
        handler=handlers.system_info,
        legacy_call=LegacyCall.SYSTEM_INFO,
    ),
    Route(
        name="process_stop",
        method="POST",
        path="/process/stop",
        handler=handlers.stop_process,
        legacy_call=LegacyCall.PROCESS_STOP,
    ),
    Route(name="queue_status", method="GET", path="/queue/status", handler=handlers.queue_status),
    Route(name="metrics", method="GET", path="/metrics", handler=administration.metrics, root_path="/metrics"),
    Route(name="openapi", method="GET", path="/openapi.json", handler=handlers.openapi),
    Route(name="task_submit", method="POST", path="/tasks", handler=handlers.submit_tasks),
    Route(name="task_list", method="GET", path="/tasks", handler=handlers.list_tasks),
    Route(name="task_show", method="GET", path="/tasks/{task_id}", handler=handlers.show_task),
    Route(name="task_cancel", method="POST", path="/tasks/{task_id}/cancel", handler=handlers.cancel_task),
    Route(name="task_suspend", method="POST", path="/tasks/{task_id}/suspend", handler=handlers.suspend_task),
    Route(name="task_resume", method="POST", path="/tasks/{task_id}/resume", handler=handlers.resume_task),
    Route(name="drain_state", method="GET", path="/drain", handler=administration.drain_state),
    Route(name="drain", method="POST", path="/drain", handler=administration.drain),
    Route(name="undrain", method="POST", path="/undrain", handler=administration.undrain),
    Route(name="dead_letter_list", method="GET", path="/dead-letters", handler=administration.list_dead_letters),
    Route(
        name="dead_letter_show",
        method="GET",
        path="/dead-letters/{letter_id}",
        handler=administration.show_dead_letter,
    ),
    Route(
        name="dead_letter_resend",
        method="POST",
        path="/dead-letters/{letter_id}/resend",
        handler=administration.resend_dead_letter,
    ),
    Route(
        name="dead_letter_drop",
        method="DELETE",
        path="/dead-letters/{letter_id}",
        handler=administration.drop_dead_letter,
    ),
    Route(name="task_logs", method="GET", path="/tasks/{task_id}/logs", handler=read_logs),
)
