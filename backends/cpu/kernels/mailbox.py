"""The mailbox: an int64 array through which a thread gives a run to the workers.

It has a counter for the barrier, the words of a run, and a slot for each worker, on separate cache
lines. The thread that calls `run_program` is thread 0. It posts a run to the slots of the workers
1, 2, ..., which join it and compute the other shares (see `gptx.backends.cpu.thread_pool`).

A worker reads its slot for a fraction of a millisecond, in which the next decode step begins. Then
it parks: it waits for a lock, which takes no processor time but some 50 µs to wake up from.

On a busy machine a worker may wait milliseconds for a processor. Thread 0 does not wait that long
for a short run: it withdraws the run and computes all shares, with the same results.
"""

from __future__ import annotations

from typing import Any

from gptx.backends.cpu.interface.instructions import N_COLUMNS
from gptx.backends.cpu.interface.run_words import (
    AMX,
    BEGUN,
    BUFFERS,
    CACHE_SLOTS,
    CAPACITY,
    COUNTER,
    COUNTER_START,
    EMPTY,
    FIRST_ROWS,
    FIRST_SLOT,
    JOINED,
    KEYS,
    N_BUFFERS,
    N_INSTRUCTIONS,
    N_LAYERS,
    N_WORDS,
    PARKED,
    POSITIONS,
    POSTED,
    PREPARED,
    PREPARED_SIZE,
    PROGRAM,
    ROWS,
    RUN_WORDS,
    SLOT_WORDS,
    THREADS,
    TOKENS,
    VALUES,
    WORK,
    WORKERS,
    WORKSPACE,
    WORKSPACE_WIDTH,
    B,
    D,
    H,
)
from gptx.backends.cpu.kernels.arguments import Run
from gptx.backends.cpu.kernels.atomics import (
    acquire_lock,
    allocate_lock,
    exchange,
    load_acquire,
    pause_or_yield,
    release_lock,
    replace_if_equal,
)
from gptx.backends.cpu.kernels.compilation import (
    compiled,
    float_array,
    float_matrix,
    inlined,
    int_array,
    int_matrix,
)

READS_BEFORE_PARKING = 10_000  # of a slot, 200 to 500 µs on x86
MIN_READS, MAX_READS = 1000, 2**16  # of the slots, before thread 0 withdraws a run
WORK_PER_READ = 2**12  # multiplications that take a few times as long as a read


@compiled
def post_run(mailbox: Any) -> None:
    """Post the run in the mailbox to its workers, and begin it when all have joined.

    Otherwise withdraw it: no worker takes part.
    """
    workers = mailbox[RUN_WORDS + WORKERS]
    for worker in range(1, workers + 1):
        slot = FIRST_SLOT + worker * SLOT_WORDS
        if exchange(mailbox, slot, POSTED) == PARKED:
            release_lock(mailbox[slot + 1])
    reads, most_reads = 0, mailbox[RUN_WORDS + WORK] // WORK_PER_READ
    most_reads = min(max(most_reads, MIN_READS), MAX_READS)
    joined = 0
    while joined < workers and reads < most_reads:
        if load_acquire(mailbox, FIRST_SLOT + (joined + 1) * SLOT_WORDS) == JOINED:
            joined += 1
        else:
            pause_or_yield(reads)
            reads += 1
    mailbox[RUN_WORDS + COUNTER_START] = load_acquire(mailbox, COUNTER)
    if joined < workers:
        mailbox[RUN_WORDS + WORKERS] = 0
    for worker in range(1, workers + 1):
        slot = FIRST_SLOT + worker * SLOT_WORDS
        exchange(mailbox, slot, BEGUN if joined == workers else EMPTY)


@compiled
def wait_for_run(mailbox: Any, worker: int) -> None:
    """Join the runs that are posted to a worker, until one begins."""
    slot = FIRST_SLOT + worker * SLOT_WORDS
    if mailbox[slot + 1] == 0:
        mailbox[slot + 1] = allocate_lock()
        acquire_lock(mailbox[slot + 1])
    reads, state = 0, load_acquire(mailbox, slot)
    while state != BEGUN:
        if state == POSTED and replace_if_equal(mailbox, slot, POSTED, JOINED):
            reads = 0
        pause_or_yield(0 if state == EMPTY else reads)
        reads += 1
        if reads >= READS_BEFORE_PARKING and replace_if_equal(mailbox, slot, EMPTY, PARKED):
            acquire_lock(mailbox[slot + 1])
            reads = 0
        state = load_acquire(mailbox, slot)
    exchange(mailbox, slot, EMPTY)


@inlined
def read_run(mailbox: Any) -> Run:
    """Return the run in the mailbox."""
    words = mailbox[RUN_WORDS : RUN_WORDS + N_WORDS]
    rows, threads = words[ROWS], words[THREADS]
    return Run(
        int_matrix(words[PROGRAM], words[N_INSTRUCTIONS], N_COLUMNS),
        int_array(words[BUFFERS], words[N_BUFFERS]),
        int_array(words[TOKENS], rows),
        int_array(words[POSITIONS], rows),
        int_array(words[FIRST_ROWS], words[B] + 1),
        int_array(words[CACHE_SLOTS], words[B]),
        int_array(words[KEYS], words[N_LAYERS]),
        int_array(words[VALUES], words[N_LAYERS]),
        float_array(words[PREPARED], words[PREPARED_SIZE]),
        float_matrix(words[WORKSPACE], threads, words[WORKSPACE_WIDTH]),
        rows,
        words[B],
        words[H],
        words[D],
        words[CAPACITY],
        words[AMX] != 0,
        threads,
    )
