-- One row per attempt: how far it has come, and the task as it was claimed or submitted.
-- Large columns come last: SQLite walks through them to reach what follows.
CREATE TABLE attempts (
    seq                INTEGER PRIMARY KEY AUTOINCREMENT,
    attempt_id         TEXT NOT NULL UNIQUE CHECK (length(attempt_id) BETWEEN 1 AND 128),
    task_id            TEXT NOT NULL CHECK (length(task_id) BETWEEN 1 AND 128),
    is_latest          INTEGER NOT NULL DEFAULT 1 CHECK (is_latest IN (0, 1)),
    origin             TEXT NOT NULL CHECK (origin IN ('local', 'control_plane')),
    state              TEXT NOT NULL CHECK (state IN
                           ('pending', 'assigned', 'running', 'suspended', 'preempted',
                            'completed', 'failed', 'cancelled')),
    priority           INTEGER NOT NULL CHECK (priority BETWEEN 1 AND 10),
    gpus               INTEGER NOT NULL CHECK (gpus >= 0),
    cpus               REAL NOT NULL CHECK (cpus >= 0),
    memory_gb          REAL NOT NULL CHECK (memory_gb >= 0),
    run_no             INTEGER NOT NULL DEFAULT 0 CHECK (run_no >= 0),
    retries_used       INTEGER NOT NULL DEFAULT 0 CHECK (retries_used >= 0),
    free_retries_used  INTEGER NOT NULL DEFAULT 0 CHECK (free_retries_used >= 0),
    ready_boottime_ns  INTEGER NOT NULL DEFAULT 0 CHECK (ready_boottime_ns >= 0),
    lease_ttl_ns       INTEGER CHECK (lease_ttl_ns > 0),
    lease_deadline_ns  INTEGER,
    renew_interval_ns  INTEGER CHECK (renew_interval_ns > 0),
    boot_id            TEXT NOT NULL,
    submitter_uid      INTEGER CHECK (submitter_uid >= 0),
    cause              TEXT CHECK (cause IN
                           ('succeeded', 'exit_code', 'signal', 'timed_out', 'out_of_memory', 'gpu_out_of_memory',
                            'gpu_error', 'gpu_fault', 'gpu_memory_exceeded', 'lease_lost', 'superseded', 'preempted',
                            'cancelled', 'stopped', 'host_rebooted', 'host_shutdown', 'agent_lost', 'launch_failed',
                            'disk_full', 'policy_refused', 'dependency_failed')),
    exit_code          INTEGER,
    signal             INTEGER CHECK (signal BETWEEN 1 AND 64),
    progress_percent   REAL CHECK (progress_percent BETWEEN 0 AND 100),
    submitted_at_ms    INTEGER NOT NULL,
    started_at_ms      INTEGER,
    ended_at_ms        INTEGER,
    is_start_accepted  INTEGER NOT NULL DEFAULT 0 CHECK (is_start_accepted IN (0, 1)),
    is_synced          INTEGER NOT NULL DEFAULT 0 CHECK (is_synced IN (0, 1)),
    progress_message   TEXT,
    error              TEXT,
    task               TEXT NOT NULL CHECK (json_valid(task)),
    CHECK ((lease_ttl_ns IS NULL) = (lease_deadline_ns IS NULL)),
    CHECK (lease_ttl_ns IS NULL OR origin = 'control_plane'),
    CHECK ((run_no = 0) = (started_at_ms IS NULL)),
    CHECK (run_no >= 1 OR state NOT IN ('running', 'suspended', 'preempted', 'completed')),
    CHECK ((state IN ('completed', 'failed', 'cancelled')) = (cause IS NOT NULL)),
    CHECK ((state IN ('completed', 'failed', 'cancelled')) = (ended_at_ms IS NOT NULL)),
    CHECK ((state IN ('completed', 'failed', 'cancelled')) = (exit_code IS NOT NULL)),
    CHECK ((state = 'completed') = (cause IS 'succeeded')),
    CHECK ((state = 'completed') = (exit_code IS 0)),
    CHECK ((state = 'cancelled') = coalesce(cause IN ('cancelled', 'stopped', 'dependency_failed'), 0)),
    CHECK (is_synced = 0 OR state IN ('completed', 'failed', 'cancelled')),
    CHECK (state <> 'assigned' OR origin = 'control_plane'),
    CHECK (submitter_uid IS NULL OR origin = 'local')
) STRICT;

CREATE INDEX attempts_of_task ON attempts (task_id, seq);
CREATE UNIQUE INDEX attempts_one_latest ON attempts (task_id) WHERE is_latest = 1;
CREATE INDEX attempts_by_state ON attempts (state, is_latest, seq);
CREATE INDEX attempts_waiting ON attempts (priority, seq) WHERE state IN ('pending', 'assigned');
-- What retention removes first.
CREATE INDEX attempts_ended ON attempts (ended_at_ms, seq) WHERE ended_at_ms IS NOT NULL;
CREATE INDEX attempts_delayed ON attempts (ready_boottime_ns) WHERE ready_boottime_ns > 0;
-- Promise 2 in one line: at most one attempt of a task has a live process tree.
CREATE UNIQUE INDEX attempts_one_live ON attempts (task_id) WHERE state IN ('running', 'suspended');

-- What pages are filtered by. Rows only where a task has labels.
CREATE TABLE labels (
    key                TEXT NOT NULL,
    value              TEXT NOT NULL,
    seq                INTEGER NOT NULL REFERENCES attempts (seq) ON DELETE CASCADE,
    PRIMARY KEY (key, value, seq)
) STRICT, WITHOUT ROWID;

CREATE INDEX labels_of_attempt ON labels (seq);

CREATE TABLE runs (
    attempt_id         TEXT NOT NULL REFERENCES attempts (attempt_id) ON DELETE CASCADE,
    run_no             INTEGER NOT NULL CHECK (run_no >= 1),
    state              TEXT NOT NULL CHECK (state IN ('starting', 'running', 'suspended', 'stopping', 'ended')),
    stop_cause         TEXT CHECK (stop_cause IN
                           ('cancelled', 'stopped', 'lease_lost', 'superseded', 'preempted', 'gpu_fault',
                            'gpu_memory_exceeded', 'host_shutdown')),
    cause              TEXT CHECK (cause IN
                           ('succeeded', 'exit_code', 'signal', 'timed_out', 'out_of_memory', 'gpu_out_of_memory',
                            'gpu_error', 'gpu_fault', 'gpu_memory_exceeded', 'lease_lost', 'superseded', 'preempted',
                            'cancelled', 'stopped', 'host_rebooted', 'host_shutdown', 'agent_lost', 'launch_failed',
                            'disk_full', 'policy_refused', 'dependency_failed')),
    exit_code          INTEGER,
    signal             INTEGER CHECK (signal BETWEEN 1 AND 64),
    error              TEXT,
    boot_id            TEXT,
    pid                INTEGER CHECK (pid > 0),
    start_ticks        INTEGER CHECK (start_ticks >= 0),
    created_at_ms      INTEGER NOT NULL,
    started_at_ms      INTEGER,
    ended_at_ms        INTEGER,
    usage              TEXT CHECK (usage IS NULL OR json_valid(usage)),
    PRIMARY KEY (attempt_id, run_no),
    CHECK ((state = 'ended') = (cause IS NOT NULL)),
    CHECK ((state = 'ended') = (ended_at_ms IS NOT NULL)),
    CHECK ((state = 'ended') = (exit_code IS NOT NULL)),
    CHECK ((pid IS NULL) = (boot_id IS NULL)),
    CHECK ((pid IS NULL) = (start_ticks IS NULL)),
    CHECK ((pid IS NULL) = (started_at_ms IS NULL)),
    CHECK (state NOT IN ('running', 'suspended') OR pid IS NOT NULL),
    CHECK (state <> 'stopping' OR stop_cause IS NOT NULL)
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX runs_one_open ON runs (attempt_id) WHERE state <> 'ended';
CREATE INDEX runs_by_pid ON runs (pid, started_at_ms) WHERE pid IS NOT NULL;

-- Reports that wait for delivery, in order per attempt (id ascends). Only the oldest of an attempt has a due time; those
-- behind it have none, so that what is due is found by index, however many wait.
CREATE TABLE outbox (
    id                 INTEGER PRIMARY KEY AUTOINCREMENT,
    attempt_id         TEXT NOT NULL,
    task_id            TEXT NOT NULL,
    kind               TEXT NOT NULL CHECK (kind IN ('start', 'progress', 'complete', 'release')),
    created_at_ms      INTEGER NOT NULL,
    tries              INTEGER NOT NULL DEFAULT 0 CHECK (tries >= 0),
    due_boottime_ns    INTEGER CHECK (due_boottime_ns >= 0),
    first_try_at_ms    INTEGER,
    boot_id            TEXT NOT NULL,
    is_dead            INTEGER NOT NULL DEFAULT 0 CHECK (is_dead IN (0, 1)),
    last_error         TEXT,
    body               TEXT NOT NULL CHECK (json_valid(body)),
    CHECK (is_dead = 0 OR due_boottime_ns IS NULL)
) STRICT;

CREATE INDEX outbox_of_attempt ON outbox (attempt_id, is_dead, id);
CREATE UNIQUE INDEX outbox_one_head ON outbox (attempt_id) WHERE due_boottime_ns IS NOT NULL;
CREATE INDEX outbox_due ON outbox (due_boottime_ns, id) WHERE due_boottime_ns IS NOT NULL;
CREATE INDEX outbox_dead ON outbox (id) WHERE is_dead = 1;
CREATE UNIQUE INDEX outbox_one_progress ON outbox (attempt_id) WHERE kind = 'progress' AND is_dead = 0;
-- An attempt is completed once.
CREATE UNIQUE INDEX outbox_one_complete ON outbox (attempt_id) WHERE kind = 'complete';

CREATE TABLE meta (
    key                TEXT PRIMARY KEY,
    value              TEXT NOT NULL
) STRICT, WITHOUT ROWID;
