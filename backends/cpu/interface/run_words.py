"""The words of the mailbox (see `mailbox.py`), which Python and the kernels share."""

from __future__ import annotations

COUNTER = 0  # of `wait_at_barrier`; it increases from run to run
RUN_WORDS = 8  # index of the first word of a run

# The words of a run, as fields of `Run`. An array is its address; a size counts elements.
N_WORDS = 26
PROGRAM, N_INSTRUCTIONS, BUFFERS, N_BUFFERS, TOKENS, POSITIONS, KEYS, VALUES, N_LAYERS = range(9)
PREPARED, PREPARED_SIZE, WORKSPACE, WORKSPACE_WIDTH = range(9, 13)
ROWS, B, H, D, CAPACITY, AMX = range(13, 19)
THREADS = 19  # shares of each stage
WORKERS = 20  # threads besides thread 0: THREADS - 1, or 0 if thread 0 computes all shares
WORK = 21  # multiplications of the run, approximately
COUNTER_START = 22  # the counter before the run, set by `post_run`
PROGRAM_CODE = 23  # address of the machine code of `run_program`, for the formats of the run
FIRST_ROWS, CACHE_SLOTS = 24, 25

FIRST_SLOT, SLOT_WORDS = 40, 8  # slot n is at FIRST_SLOT + n * SLOT_WORDS: a state and a lock
# States of a slot. Thread 0 sets POSTED, then BEGUN, or EMPTY to withdraw the run. The worker sets
# JOINED from POSTED, EMPTY from BEGUN, and PARKED from EMPTY.
EMPTY, PARKED, POSTED, JOINED, BEGUN = range(5)

MAX_THREADS = 1024
MAILBOX_WORDS = FIRST_SLOT + MAX_THREADS * SLOT_WORDS

MIN_WORK_PER_THREAD = 2**14  # multiplications that take about as long as a barrier


def is_serial(work: int, threads: int) -> bool:
    """Return True if one thread does `work` multiplications faster than `threads` threads."""
    return work < MIN_WORK_PER_THREAD * threads
