-- Named queries: each starts with a line `-- name: NAME`. Every UPDATE of a state names the state it expects.

-- name: add_attempt
INSERT INTO attempts
    (attempt_id, task_id, origin, state, priority, gpus, cpus, memory_gb, task, retries_used, lease_ttl_ns,
     lease_deadline_ns, renew_interval_ns, boot_id, submitter_uid, submitted_at_ms)
VALUES
    (:attempt_id, :task_id, :origin, :state, :priority, :gpus, :cpus, :memory_gb, :task, :retries_used, :lease_ttl_ns,
     :lease_deadline_ns, :renew_interval_ns, :boot_id, :submitter_uid, :now_ms);

-- name: add_label
INSERT INTO labels (key, value, seq) VALUES (:key, :value, :seq);

-- name: not_latest
UPDATE attempts SET is_latest = 0 WHERE task_id = :task_id AND is_latest = 1;

-- name: attempt
SELECT * FROM attempts WHERE attempt_id = :attempt_id;

-- name: attempt_state
SELECT seq, task_id, origin, state, run_no, retries_used, free_retries_used
FROM attempts WHERE attempt_id = :attempt_id;

-- name: open_attempts_of_task
SELECT attempt_id, state, run_no FROM attempts
WHERE task_id = :task_id AND state NOT IN ('completed', 'failed', 'cancelled') ORDER BY seq;

-- name: has_newer_attempt
SELECT 1 FROM attempts WHERE task_id = :task_id AND seq > :seq LIMIT 1;

-- name: has_local_attempt
SELECT 1 FROM attempts WHERE task_id = :task_id AND origin = 'local' LIMIT 1;

-- name: task_is_taken
SELECT 1 FROM attempts WHERE task_id = :task_id LIMIT 1;

-- name: span_of_attempts
-- No more attempts than this exist; found without counting them.
SELECT coalesce((SELECT max(seq) FROM attempts) - (SELECT min(seq) FROM attempts) + 1, 0);

-- name: count_open
SELECT count(*) FROM attempts WHERE state IN ('pending', 'assigned', 'running', 'suspended', 'preempted');

-- name: waiting
SELECT attempt_id, task_id, origin, priority, seq, gpus, cpus, memory_gb, ready_boottime_ns
FROM attempts INDEXED BY attempts_waiting
WHERE state IN ('pending', 'assigned')
  AND ready_boottime_ns <= :now_ns AND gpus <= :gpus AND cpus <= :cpus AND memory_gb <= :memory_gb
ORDER BY priority, seq LIMIT :limit;

-- name: count_claimed_waiting
SELECT count(*) FROM attempts INDEXED BY attempts_waiting
WHERE state IN ('pending', 'assigned') AND origin = 'control_plane';

-- name: next_ready
SELECT min(ready_boottime_ns) FROM attempts INDEXED BY attempts_delayed
WHERE ready_boottime_ns > 0 AND ready_boottime_ns > :now_ns AND state IN ('pending', 'assigned');

-- name: open_attempts
SELECT * FROM attempts
WHERE state IN ('running', 'suspended')
   OR (state IN ('pending', 'assigned', 'preempted') AND origin = 'control_plane')
ORDER BY seq;

-- name: start_attempt
UPDATE attempts
SET state = :new_state, run_no = :run_no, started_at_ms = coalesce(started_at_ms, :now_ms), ready_boottime_ns = 0
WHERE attempt_id = :attempt_id AND state = :state AND run_no = :run_no - 1;

-- name: add_run
INSERT INTO runs (attempt_id, run_no, state, created_at_ms) VALUES (:attempt_id, :run_no, 'starting', :now_ms);

-- name: run
SELECT * FROM runs WHERE attempt_id = :attempt_id AND run_no = :run_no;

-- name: run_state
SELECT state, stop_cause, pid FROM runs WHERE attempt_id = :attempt_id AND run_no = :run_no;

-- name: open_runs
SELECT * FROM runs WHERE state <> 'ended';

-- name: ended_runs
SELECT attempt_id, run_no FROM runs WHERE state = 'ended';

-- name: runs_of_task
SELECT r.* FROM runs r JOIN attempts a USING (attempt_id) WHERE a.task_id = :task_id ORDER BY a.seq, r.run_no;

-- name: run_of_pid
SELECT r.*, a.task_id FROM runs r JOIN attempts a USING (attempt_id)
WHERE r.pid = :pid AND r.boot_id = :boot_id ORDER BY r.started_at_ms DESC LIMIT 1;

-- name: run_started
UPDATE runs
SET state = :new_state, boot_id = :boot_id, pid = :pid, start_ticks = :start_ticks, started_at_ms = :started_at_ms
WHERE attempt_id = :attempt_id AND run_no = :run_no AND state = :state;

-- name: run_stopping
UPDATE runs SET state = :new_state, stop_cause = :stop_cause
WHERE attempt_id = :attempt_id AND run_no = :run_no AND state = :state;

-- name: run_suspension
UPDATE runs SET state = :new_state WHERE attempt_id = :attempt_id AND run_no = :run_no AND state = :state;

-- name: attempt_suspension
UPDATE attempts SET state = :new_state WHERE attempt_id = :attempt_id AND run_no = :run_no AND state = :state;

-- name: run_ended
UPDATE runs
SET state = :new_state, cause = :cause, exit_code = :exit_code, signal = :signal, error = :error,
    ended_at_ms = :ended_at_ms, usage = :usage
WHERE attempt_id = :attempt_id AND run_no = :run_no AND state = :state;

-- name: end_attempt
UPDATE attempts
SET state = :new_state, cause = :cause, exit_code = :exit_code, signal = :signal, error = :error,
    ended_at_ms = :ended_at_ms, retries_used = :retries_used, free_retries_used = :free_retries_used,
    ready_boottime_ns = 0, is_synced = :is_synced
WHERE attempt_id = :attempt_id AND state = :state AND run_no = :run_no;

-- name: retry_attempt
UPDATE attempts
SET state = :new_state, retries_used = :retries_used, free_retries_used = :free_retries_used,
    ready_boottime_ns = :ready_boottime_ns
WHERE attempt_id = :attempt_id AND state = :state AND run_no = :run_no;

-- name: extend_lease
UPDATE attempts SET lease_deadline_ns = :deadline_ns, lease_ttl_ns = :ttl_ns
WHERE attempt_id = :attempt_id AND lease_ttl_ns IS NOT NULL
  AND state NOT IN ('completed', 'failed', 'cancelled');

-- name: set_progress
UPDATE attempts SET progress_percent = :percent, progress_message = :message
WHERE attempt_id = :attempt_id AND state IN ('running', 'suspended')
  AND (progress_percent IS NOT :percent OR progress_message IS NOT :message) RETURNING task_id;

-- name: add_report
INSERT INTO outbox
    (attempt_id, task_id, kind, body, created_at_ms, boot_id, tries, first_try_at_ms, last_error, due_boottime_ns)
VALUES
    (:attempt_id, :task_id, :kind, :body, :now_ms, :boot_id, :tries, :first_try_at_ms, :last_error,
     iif(EXISTS (SELECT 1 FROM outbox WHERE attempt_id = :attempt_id AND is_dead = 0), NULL, :due_ns));

-- name: drop_waiting_progress
DELETE FROM outbox WHERE attempt_id = :attempt_id AND kind = 'progress' AND is_dead = 0
RETURNING tries, first_try_at_ms, last_error, due_boottime_ns;

-- name: drop_reports
DELETE FROM outbox WHERE attempt_id = :attempt_id AND is_dead = 0;

-- name: next_report
-- What is oldest now has its turn; a report that has it already keeps its due time.
UPDATE outbox SET due_boottime_ns = 0
WHERE id = (SELECT min(id) FROM outbox WHERE attempt_id = :attempt_id AND is_dead = 0)
  AND NOT EXISTS (SELECT 1 FROM outbox WHERE attempt_id = :attempt_id AND due_boottime_ns IS NOT NULL);

-- name: has_complete
SELECT 1 FROM outbox WHERE attempt_id = :attempt_id AND kind = 'complete' LIMIT 1;

-- name: due_reports
SELECT * FROM outbox WHERE due_boottime_ns <= :now_ns ORDER BY due_boottime_ns, id LIMIT :limit;

-- name: next_due_report
SELECT min(due_boottime_ns) FROM outbox WHERE due_boottime_ns > :now_ns;

-- name: report_delivered
DELETE FROM outbox WHERE id = :id RETURNING attempt_id;

-- name: start_accepted
UPDATE attempts SET is_start_accepted = 1 WHERE attempt_id = :attempt_id;

-- name: result_synced
UPDATE attempts SET is_synced = 1 WHERE attempt_id = :attempt_id AND state IN ('completed', 'failed', 'cancelled');

-- name: report_retry
UPDATE outbox
SET tries = tries + 1, due_boottime_ns = :due_ns, last_error = :error,
    first_try_at_ms = coalesce(first_try_at_ms, :now_ms)
WHERE id = :id AND due_boottime_ns IS NOT NULL;

-- name: report_dead
UPDATE outbox SET is_dead = 1, tries = tries + 1, last_error = :error, due_boottime_ns = NULL
WHERE id = :id AND is_dead = 0 RETURNING attempt_id;

-- name: dead_letters
SELECT * FROM outbox INDEXED BY outbox_dead WHERE is_dead = 1 ORDER BY id LIMIT :limit OFFSET :offset;

-- name: dead_letter
SELECT * FROM outbox WHERE id = :id AND is_dead = 1;

-- name: drop_dead
DELETE FROM outbox WHERE id = :id AND is_dead = 1 RETURNING attempt_id;

-- name: resend_dead
-- Behind nothing: what the attempt had to say after it has been said.
UPDATE outbox SET is_dead = 0, tries = 0, first_try_at_ms = NULL, boot_id = :boot_id
WHERE id = :id AND is_dead = 1 RETURNING attempt_id;

-- name: has_waiting_progress
SELECT 1 FROM outbox WHERE attempt_id = :attempt_id AND kind = 'progress' AND is_dead = 0;

-- name: count_reports
SELECT (SELECT count(*) FROM outbox) - dead AS waiting, dead
FROM (SELECT count(*) AS dead FROM outbox INDEXED BY outbox_dead WHERE is_dead = 1);

-- name: hasten_starts
UPDATE outbox SET due_boottime_ns = :now_ns WHERE kind = 'start' AND is_dead = 0 AND due_boottime_ns > :now_ns;

-- name: hasten_reports
UPDATE outbox SET due_boottime_ns = :now_ns
WHERE id IN (
    SELECT id FROM outbox
    WHERE due_boottime_ns > :now_ns AND attempt_id NOT IN (SELECT value FROM json_each(:apart))
    ORDER BY due_boottime_ns LIMIT :limit)
RETURNING attempt_id;

-- name: is_outbox_full
-- Over an index: the table itself has the bodies.
SELECT 1 FROM outbox INDEXED BY outbox_of_attempt LIMIT 1 OFFSET :bound;

-- name: has_reports
SELECT 1 FROM outbox WHERE attempt_id = :attempt_id AND is_dead = 0 LIMIT 1;

-- name: count_by_state
SELECT state, count(*) AS n FROM attempts WHERE is_latest = 1 GROUP BY state;

-- name: tasks_by_prefix
SELECT task_id FROM attempts
WHERE task_id >= :prefix AND task_id < :prefix_end AND is_latest = 1 ORDER BY task_id LIMIT 3;

-- name: latest_attempt
SELECT * FROM attempts WHERE task_id = :task_id AND is_latest = 1;

-- name: rebase_attempts
UPDATE attempts
SET boot_id = :boot_id, ready_boottime_ns = 0, lease_deadline_ns = iif(lease_ttl_ns IS NULL, NULL, 0)
WHERE state IN ('pending', 'assigned', 'running', 'suspended', 'preempted') AND boot_id <> :boot_id;

-- name: rebase_outbox
UPDATE outbox SET boot_id = :boot_id, due_boottime_ns = iif(due_boottime_ns IS NULL, NULL, 0) WHERE boot_id <> :boot_id;

-- name: get_meta
SELECT value FROM meta WHERE key = :key;

-- name: add_meta
INSERT INTO meta (key, value) VALUES (:key, :value) ON CONFLICT (key) DO NOTHING;

-- name: set_meta
INSERT INTO meta (key, value) VALUES (:key, :value) ON CONFLICT (key) DO UPDATE SET value = excluded.value;

-- name: drop_meta
DELETE FROM meta WHERE key = :key;

-- name: has_later_attempt
SELECT 1 FROM attempts WHERE task_id = :task_id AND submitted_at_ms > :submitted_at_ms LIMIT 1;

-- name: has_other_live
SELECT 1 FROM attempts
WHERE task_id = :task_id AND attempt_id <> :attempt_id AND state IN ('running', 'suspended') LIMIT 1;

-- name: restore_attempt
UPDATE attempts
SET state = :new_state, run_no = :run_no, started_at_ms = coalesce(started_at_ms, :started_at_ms),
    retries_used = max(retries_used, :retries_used), free_retries_used = max(free_retries_used, :free_retries_used),
    ready_boottime_ns = 0
WHERE attempt_id = :attempt_id AND state = :state AND run_no < :run_no;

-- name: open_run
SELECT run_no, state FROM runs WHERE attempt_id = :attempt_id AND state <> 'ended';

-- name: finished_before
SELECT t.task_id, t.ended_at_ms FROM attempts t
WHERE t.is_latest = 1 AND t.ended_at_ms IS NOT NULL AND t.ended_at_ms < :before_ms
  AND NOT EXISTS (SELECT 1 FROM attempts a WHERE a.task_id = t.task_id AND a.ended_at_ms IS NULL)
  AND NOT EXISTS (SELECT 1 FROM attempts a JOIN outbox o USING (attempt_id) WHERE a.task_id = t.task_id)
ORDER BY t.ended_at_ms LIMIT :limit;

-- name: finished_newest_first
SELECT task_id, ended_at_ms, seq FROM attempts
WHERE is_latest = 1 AND ended_at_ms IS NOT NULL AND (ended_at_ms, seq) < (:ended_at_ms, :seq)
ORDER BY ended_at_ms DESC, seq DESC LIMIT :limit;

-- name: is_still_needed
SELECT 1 FROM attempts a
WHERE a.task_id = :task_id
  AND (a.ended_at_ms IS NULL OR EXISTS (SELECT 1 FROM outbox o WHERE o.attempt_id = a.attempt_id))
LIMIT 1;

-- name: forget_task
DELETE FROM attempts WHERE task_id = :task_id;
