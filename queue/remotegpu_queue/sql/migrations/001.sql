-- One row per attempt: the task as it was claimed or submitted, and how far it has come.
CREATE TABLE attempts (
    seq                INTEGER PRIMARY KEY AUTOINCREMENT,
    attempt_id         TEXT NOT NULL UNIQUE CHECK (length(attempt_id) BETWEEN 1 AND 128),
    task_id            TEXT NOT NULL CHECK (length(task_id) BETWEEN 1 AND 128),
    origin             TEXT NOT NULL CHECK (origin IN ('local', 'control_plane')),
    state              TEXT NOT NULL CHECK (state IN
                           ('pending', 'assigned', 'running', 'suspended', 'preempted',
                            'completed', 'failed', 'cancelled')),
    priority           INTEGER NOT NULL CHECK (priority BETWEEN 1 AND 10),
    task               TEXT NOT NULL CHECK (json_valid(task)),
    run_no             INTEGER NOT NULL DEFAULT 0 CHECK (run_no >= 0),
    retries_used       INTEGER NOT NULL DEFAULT 0 CHECK (retries_used >= 0),
    free_retries_used  INTEGER NOT NULL DEFAULT 0 CHECK (free_retries_used >= 0),
    ready_boottime_ns  INTEGER NOT NULL DEFAULT 0,
    lease_ttl_ns       INTEGER CHECK (lease_ttl_ns > 0),
    lease_deadline_ns  INTEGER,
    renew_interval_ns  INTEGER CHECK (renew_interval_ns > 0),
    boot_id            TEXT NOT NULL,
    cause              TEXT,
    exit_code          INTEGER,
    signal             INTEGER,
    error              TEXT,
    progress_percent   REAL CHECK (progress_percent BETWEEN 0 AND 100),
    progress_message   TEXT,
    submitted_at_ms    INTEGER NOT NULL,
    started_at_ms      INTEGER,
    ended_at_ms        INTEGER,
    is_start_accepted  INTEGER NOT NULL DEFAULT 0 CHECK (is_start_accepted IN (0, 1)),
    is_synced          INTEGER NOT NULL DEFAULT 0 CHECK (is_synced IN (0, 1)),
    CHECK ((lease_ttl_ns IS NULL) = (lease_deadline_ns IS NULL)),
    CHECK ((state IN ('completed', 'failed', 'cancelled')) = (cause IS NOT NULL)),
    CHECK ((state IN ('completed', 'failed', 'cancelled')) = (ended_at_ms IS NOT NULL)),
    CHECK (state <> 'completed' OR exit_code = 0),
    CHECK (state <> 'assigned' OR origin = 'control_plane')
) STRICT;

CREATE INDEX attempts_of_task ON attempts (task_id, seq);
CREATE INDEX attempts_waiting ON attempts (priority, seq) WHERE state IN ('pending', 'assigned');
CREATE INDEX attempts_by_state ON attempts (state, seq);
-- Promise 2 in one line: at most one attempt of a task has a live process tree.
CREATE UNIQUE INDEX attempts_one_live ON attempts (task_id) WHERE state IN ('running', 'suspended');

CREATE TABLE runs (
    attempt_id         TEXT NOT NULL REFERENCES attempts (attempt_id) ON DELETE CASCADE,
    run_no             INTEGER NOT NULL CHECK (run_no >= 1),
    state              TEXT NOT NULL CHECK (state IN ('starting', 'running', 'suspended', 'stopping', 'ended')),
    stop_cause         TEXT,
    cause              TEXT,
    exit_code          INTEGER,
    signal             INTEGER,
    error              TEXT,
    boot_id            TEXT,
    pid                INTEGER CHECK (pid > 0),
    start_ticks        INTEGER,
    created_at_ms      INTEGER NOT NULL,
    started_at_ms      INTEGER,
    ended_at_ms        INTEGER,
    usage              TEXT CHECK (usage IS NULL OR json_valid(usage)),
    PRIMARY KEY (attempt_id, run_no),
    CHECK ((state = 'ended') = (cause IS NOT NULL)),
    CHECK ((state = 'ended') = (ended_at_ms IS NOT NULL)),
    CHECK (state <> 'stopping' OR stop_cause IS NOT NULL)
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX runs_one_open ON runs (attempt_id) WHERE state <> 'ended';
CREATE INDEX runs_by_pid ON runs (pid, started_at_ms) WHERE pid IS NOT NULL;

-- Reports that wait for delivery, in order per attempt (id ascends).
CREATE TABLE outbox (
    id                 INTEGER PRIMARY KEY AUTOINCREMENT,
    attempt_id         TEXT NOT NULL,
    task_id            TEXT NOT NULL,
    kind               TEXT NOT NULL CHECK (kind IN ('start', 'progress', 'complete', 'release')),
    body               TEXT NOT NULL CHECK (json_valid(body)),
    created_at_ms      INTEGER NOT NULL,
    tries              INTEGER NOT NULL DEFAULT 0 CHECK (tries >= 0),
    due_boottime_ns    INTEGER NOT NULL DEFAULT 0,
    first_try_at_ms    INTEGER,
    boot_id            TEXT NOT NULL,
    is_dead            INTEGER NOT NULL DEFAULT 0 CHECK (is_dead IN (0, 1)),
    last_error         TEXT
) STRICT;

CREATE INDEX outbox_of_attempt ON outbox (attempt_id, id) WHERE is_dead = 0;
CREATE UNIQUE INDEX outbox_latest_progress ON outbox (attempt_id) WHERE kind = 'progress' AND is_dead = 0;

CREATE TABLE meta (
    key                TEXT PRIMARY KEY,
    value              TEXT NOT NULL
) STRICT, WITHOUT ROWID;
