"""Every bound of the system, each with its reason. At a bound the program refuses or drops by a stated rule."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# Ids name directories and rows. 128 characters hold a UUID with a prefix and fit NAME_MAX (255) with a suffix.
ID_MAX_CHARS = 128
ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}"

# Linux refuses one argument or environment string above 128 KiB (MAX_ARG_STRLEN) with E2BIG.
ARGUMENT_MAX_BYTES = 128 * KIB
ARGUMENTS_MAX_COUNT = 4096
# PATH_MAX of the kernel (linux/limits.h) without the final NUL.
PATH_MAX_CHARS = 4095
ENVIRONMENT_MAX_COUNT = 2048
NAME_MAX_CHARS = 256
LABELS_MAX_COUNT = 64
LABEL_MAX_CHARS = 256
TIMEOUT_MAX_S = 366 * 86400.0
RETRIES_MAX = 1000

# (uid_t)-1 means "leave it as it is" to setresuid(2): a task that is given it would keep the agent's rights.
UID_MAX = 2**32 - 2

# Task files: a person writes them. A megabyte holds about 20,000 lines.
TASK_FILE_MAX_BYTES = MIB
# Reading a document costs a third of a millisecond, and the daemon reads files between its other duties.
TASK_FILE_MAX_DOCUMENTS = 1000
YAML_MAX_DEPTH = 32
YAML_MAX_NODES = 100_000
YAML_MAX_ALIASES = 64
CONFIG_MAX_BYTES = MIB

# Control plane: a claim answer holds at most CLAIM_MAX_TASKS tasks, each with a script and an environment. The largest
# other one is a heartbeat's with HEARTBEAT_CANCELLED_MAX pairs of ids; some thirty may be read at once. Both bounds
# hold for an answer as it comes and as it is once decompressed.
CLAIM_MAX_TASKS = 64
WIRE_CLAIM_ANSWER_MAX_BYTES = 32 * MIB
WIRE_ANSWER_MAX_BYTES = 4 * MIB
WIRE_ANSWER_MAX_VALUES = 2_500_000
"""Commas and opening brackets of an answer, those in texts too. CLAIM_MAX_TASKS tasks with all arguments and variables
that they may have are 400,000, and 32 MiB of scripts may be such a sign in every fifteenth place. More would be read
for seconds: 32 MiB of empty lists, 22 million, cost 740 MiB and eight seconds (measured on 2 busy cores)."""
WIRE_MESSAGE_MAX_CHARS = 2000
PROGRESS_MESSAGE_MAX_CHARS = 500
INLINE_OUTPUT_MAX_BYTES = 64 * KIB
PLANE_CONNECTIONS_MAX = 32
RETRY_AFTER_MAX_S = 3600.0
HEARTBEAT_CANCELLED_MAX = 10_000
FEATURES_MAX_COUNT = 64
# One field of an upload's URL, headers, key and name; what signs a request (S3) stays below 4 KiB.
UPLOAD_FIELD_MAX_CHARS = 8 * KIB
UPLOAD_HEADERS_MAX_COUNT = 64

# Output of one run. The first segment and the newest ones are kept.
OUTPUT_LIMIT_DEFAULT_BYTES = 100 * MIB
OUTPUT_LIMIT_MIN_BYTES = 64 * KIB
# The newest segments that are kept of each stream beside its first (`output.retain`): each is a file, and a directory
# of some hundred is read as fast as one of a few.
OUTPUT_RETAIN_MAX = 99
OUTPUT_SEGMENTS_MIN = 4
OUTPUT_SEGMENTS_DEFAULT = 16
OUTPUT_READ_MAX_BYTES = MIB

# The largest line of a run record is the spec, with arguments and environment (execve allows 2 MiB for both).
RECORD_MAX_BYTES = 16 * MIB
PROGRESS_TAIL_MAX_BYTES = 4 * KIB

# The agent's own API.
API_BODY_MAX_BYTES = 4 * MIB
API_LINE_MAX_BYTES = 16 * KIB
"""One request line: long enough that an absurd id still gets an answer that says what is wrong with it."""
API_FIELD_MAX_BYTES = 8 * KIB
API_HEADERS_MAX_COUNT = 64
API_HEADERS_MAX_BYTES = 64 * KIB
"""Request line and headers of a request that is not yet whole: what a client that never ends them can make us keep."""
API_TCP_CONNECTIONS_MAX = 256
API_TCP_CONNECTIONS_PER_PEER_MAX = 128
API_UNIX_CONNECTIONS_MAX = 256
API_UNIX_CONNECTIONS_PER_USER_MAX = 192
"""Together half of the 1,024 descriptors that a process has as a rule (RLIMIT_NOFILE), so that the other half is there
for the tasks. The Unix socket's are its own: what happens on TCP takes none of them. A `wait` holds one."""
API_BACKLOG_MAX = 1024
"""Connections that the kernel keeps until they are accepted; beyond it a client tries again after a second (listen(2)).
With 128, a thousand that came at once made one in a hundred others wait for that second."""
API_SOCKET_BUFFER_BYTES = 128 * KIB
"""Asked for each way; Linux doubles it. By itself it would give up to 4 MiB to a client that does not read (tcp_wmem),
and a slow one's progress would be seen in steps of a third of that."""
API_AUTH_FAILURES_BURST = 20
API_AUTH_FAILURES_PER_S = 0.5
"""Failed authentications of one address that are answered and logged each: a person's mistakes, or a job's with an old
token every two seconds."""
API_AUTH_FAILURE_ADDRESSES_MAX = 4096
"""So many addresses are remembered for it; the one that has not failed for the longest is forgotten."""
TOKEN_ADVISED_MIN_CHARS = 16
"""Random characters of 6 bits: 96 bits are out of reach of guessing over HTTP. Shorter ones are warned about."""
TOKENS_FILE_MAX_BYTES = 64 * KIB
AUDIT_LINE_MAX_BYTES = 4 * KIB
"""Holds ids, a path and a reason; appends of one page do not interleave in practice."""
DRAIN_REASON_MAX_CHARS = 500
API_LIST_MAX = 1000
API_LIST_DEFAULT = 100
API_FOLLOWERS_MAX = 64
API_WAIT_MAX_S = 300.0
API_STOP_ANSWER_S = 8.0

# Store: units that wait for the writer; above it callers wait. One commit takes at most BATCH units.
STORE_BATCH_MAX_UNITS = 128
STORE_QUEUE_MAX_UNITS = 4096
# Retention: one unit of the writer and one piece of removal stay short; a round goes on until nothing is left to do.
RETENTION_BATCH_TASKS = 32
RETENTION_PIECE_ENTRIES = 5_000
RETENTION_TREE_MAX_ENTRIES = 200_000
"""So many entries of one task's directories are measured; what is above them does not count towards the size."""
STORE_PATIENCE_S = 5.0
"""So long a caller of the API waits for a database that somebody else has locked; then it is told to come again."""
QUEUE_LOOK_AHEAD = 32
"""So many waiting tasks more than slots are looked at; those that are delayed or never fit do not count."""
QUEUE_MAX_TASKS = 200_000
OUTBOX_MAX_ROWS = 100_000

# A call that is cut off each time is repeated no faster than this, however often others get through.
RECONNECT_PAUSE_MIN_S = 1.0

# Reports on their way at once, over all attempts.
REPORTS_IN_FLIGHT_MAX = 16
# After an outage a delivery brings forward so many of those that were put off: their number on the way doubles up to
# the bound above as long as the plane takes them, and stays small while it takes no more than every second one.
REPORTS_HASTENED_PER_DELIVERY = 2
# So many reports are remembered as put off for a reason of their own; with more, none is brought forward.
REPORTS_APART_MAX = 1000
TASK_PROCESSES_MAX = 16_384
"""Processes and threads of one run: a fork bomb stops here, far below a host's pid_max (32,768 at least, as a rule
4,194,304), while a training with data loaders on 256 processors, a few threads each, stays below it."""
PID_MAX = 4_194_304
"""The most that Linux gives out on 64 bits (proc(5), pid_max)."""
RUNS_STARTING_MAX = 8
"""Launches under way at once: each is a handshake of milliseconds, and more of them only wait for the same cores."""
REMAINS_PATIENCE_S = 10.0
"""So long SIGKILL may take before the run is looked at again: one that hangs in the kernel must not hang the agent."""
REPORT_GIVE_UP_S = 86400.0

# A run that ends through no fault of its task is repeated at no cost, but not for ever: a task that kills its own
# supervisor each time would otherwise come back without end.
FREE_RETRIES_MAX = 10
