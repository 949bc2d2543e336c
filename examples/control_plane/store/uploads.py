"""Files of attempts: asked for by their agents, stored by the plane, looked at by operators. Holds names, not bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ForeignKey,
    String,
    Table,
    UniqueConstraint,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from control_plane.store.fencing import Call, fence, look_up
from control_plane.store.outcomes import Refusal, reject
from control_plane.store.tables import ID_CHARS, AttemptState, metadata
from remotegpu_schemas.errors import Code

FILE_NAME_CHARS: Final = 255

uploads = Table(
    "uploads",
    metadata,
    Column("upload_id", String(ID_CHARS), primary_key=True),
    Column("task_id", String(ID_CHARS), ForeignKey("tasks.id"), nullable=False, index=True),
    Column("attempt_id", String(ID_CHARS), ForeignKey("attempts.attempt_id"), nullable=False),
    Column("name", String(FILE_NAME_CHARS), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("stored_at_ms", BigInteger),
    UniqueConstraint("attempt_id", "name"),
)
"""`stored_at_ms` null: it was asked for and has not come."""


@dataclass(frozen=True)
class Wanted:
    """A file that an agent wants to upload."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Bounds:
    """How much is taken: files of one attempt, and bytes of all that was asked for."""

    per_attempt_max: int
    total_max_bytes: int


@dataclass(frozen=True)
class Upload:
    """A file as it was asked for."""

    upload_id: str
    task_id: str
    attempt_id: str
    name: str
    size_bytes: int
    sha256: str

    @property
    def key(self) -> str:
        """What names the file in a completion."""
        return f"{self.task_id}/{self.attempt_id}/{self.name}"


_COLUMNS: Final = (
    uploads.c.upload_id,
    uploads.c.task_id,
    uploads.c.attempt_id,
    uploads.c.name,
    uploads.c.size_bytes,
    uploads.c.sha256,
)
_OF_ATTEMPT: Final = select(*_COLUMNS).where(
    uploads.c.attempt_id == bindparam("b_attempt"), uploads.c.name == bindparam("b_name")
)


def ask(db: Connection, call: Call, wanted: Wanted, bounds: Bounds, upload_id: str, now_ms: int) -> Upload | Refusal:
    """Note that the file will come; the same file again gets what it got the first time.

    An attempt may ask while it may be completed, and once it is: its files must not hold the result back.
    """
    held = look_up(db, call)
    if isinstance(held, Refusal):
        return reject(db, call.task_id, call.name, call.attempt_id, held, now_ms)
    refusal = None if held.state is AttemptState.COMPLETED else fence(call, held, now_ms)
    if refusal is not None and refusal.code is not Code.LEASE_EXPIRED:
        return reject(db, call.task_id, call.name, call.attempt_id, refusal, now_ms)
    row = db.execute(_OF_ATTEMPT, {"b_attempt": call.attempt_id, "b_name": wanted.name}).mappings().one_or_none()
    if row is not None:
        upload = Upload(**row)
        if (upload.size_bytes, upload.sha256) != (wanted.size_bytes, wanted.sha256):
            return Refusal(Code.INVALID_PARAMETERS, f"name: {wanted.name} was asked for with other size or sha256")
        return upload
    own = select(func.count()).select_from(uploads).where(uploads.c.attempt_id == call.attempt_id)
    if db.execute(own).scalar_one() >= bounds.per_attempt_max:
        return Refusal(
            Code.INVALID_PARAMETERS, f"name: an attempt has at most {bounds.per_attempt_max} files; pack them into one"
        )
    taken = int(db.execute(select(func.coalesce(func.sum(uploads.c.size_bytes), 0))).scalar_one())
    if taken + wanted.size_bytes > bounds.total_max_bytes:
        return Refusal(Code.HOST_FULL, "the control plane's store of uploads is full; an operator must remove some")
    upload = Upload(upload_id, call.task_id, call.attempt_id, wanted.name, wanted.size_bytes, wanted.sha256)
    db.execute(
        insert(uploads),
        {
            "upload_id": upload_id,
            "task_id": call.task_id,
            "attempt_id": call.attempt_id,
            "name": wanted.name,
            "size_bytes": wanted.size_bytes,
            "sha256": wanted.sha256,
            "created_at_ms": now_ms,
        },
    )
    return upload


def get(db: Connection, upload_id: str) -> Upload | None:
    """The file of this id."""
    row = db.execute(select(*_COLUMNS).where(uploads.c.upload_id == upload_id)).mappings().one_or_none()
    return None if row is None else Upload(**row)


def mark_stored(db: Connection, upload_id: str, now_ms: int) -> bool:
    """The file has come; false if it was removed meanwhile."""
    changed = update(uploads).where(uploads.c.upload_id == upload_id).values(stored_at_ms=now_ms)
    return db.execute(changed).rowcount == 1


def stored(db: Connection, task_id: str, attempt_id: str, name: str) -> Upload | None:
    """The file of this name, if it has come."""
    found = select(*_COLUMNS).where(
        uploads.c.task_id == task_id,
        uploads.c.attempt_id == attempt_id,
        uploads.c.name == name,
        uploads.c.stored_at_ms.is_not(None),
    )
    row = db.execute(found).mappings().one_or_none()
    return None if row is None else Upload(**row)


def of_task(db: Connection, task_id: str) -> list[dict[str, Any]]:
    """All files of the task's attempts, those too that have not come."""
    found = select(uploads).where(uploads.c.task_id == task_id)
    return [dict(row) for row in db.execute(found.order_by(uploads.c.created_at_ms, uploads.c.name)).mappings()]


def remove(db: Connection, task_id: str, attempt_id: str, name: str) -> str | None:
    """Forget a file, come or not; gives its upload id, None if there is none."""
    ours = (uploads.c.task_id == task_id, uploads.c.attempt_id == attempt_id, uploads.c.name == name)
    upload_id: str | None = db.execute(select(uploads.c.upload_id).where(*ours).with_for_update()).scalar()
    if upload_id is not None:
        db.execute(delete(uploads).where(uploads.c.upload_id == upload_id))
    return upload_id
