"""Messages of the control plane (protocol.md, section 1) and every dialect of the planes that are deployed.

Nothing behind this package sees a dialect: times are aware datetimes or None, texts are clean UTF-8, a claimed task
is a `Task`, and an answer is one `Verdict` with its data. Pure: no I/O, no clock.

`answers` reads what the plane says, `claims` the tasks in it, `requests` holds what the agent sends; `times` and
`text` are the values in both directions.
"""

from remotegpu_schemas.wire.answers import (
    Answer,
    HeartbeatAnswer,
    Renewal,
    UploadTarget,
    Verdict,
    parse_answer,
    parse_features,
    parse_heartbeat,
    parse_renewal,
    parse_upload_target,
)
from remotegpu_schemas.wire.claims import Claim, ClaimItem, RefusedClaim, UnusableClaim, parse_claims
from remotegpu_schemas.wire.requests import (
    Artifact,
    ClaimRequest,
    CompleteReport,
    HeartbeatRequest,
    ProgressReport,
    RegisterRequest,
    ReleaseReport,
    RenewRequest,
    Request,
    StartReport,
    UploadUrlRequest,
)
from remotegpu_schemas.wire.text import clean_text, inline_output
from remotegpu_schemas.wire.times import format_time, parse_http_date, parse_retry_after, parse_time
from remotegpu_schemas.wire.values import JsonObject

__all__ = [
    "Answer",
    "Artifact",
    "Claim",
    "ClaimItem",
    "ClaimRequest",
    "CompleteReport",
    "HeartbeatAnswer",
    "HeartbeatRequest",
    "JsonObject",
    "ProgressReport",
    "RefusedClaim",
    "RegisterRequest",
    "ReleaseReport",
    "RenewRequest",
    "Renewal",
    "Request",
    "StartReport",
    "UnusableClaim",
    "UploadTarget",
    "UploadUrlRequest",
    "Verdict",
    "clean_text",
    "format_time",
    "inline_output",
    "parse_answer",
    "parse_claims",
    "parse_features",
    "parse_heartbeat",
    "parse_http_date",
    "parse_renewal",
    "parse_retry_after",
    "parse_time",
    "parse_upload_target",
]
