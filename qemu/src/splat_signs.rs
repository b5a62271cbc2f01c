// SPDX-License-Identifier: GPL-2.0
//! By what a report in a kernel's log is known. The harness has this file as well, to tell in which case one came.

/// A line of the log that begins a report begins (after its time stamp) so.
pub const STARTS: &[&str] = &[
    "WARNING: ",
    "BUG: ",
    "BUG ", // SLUB: "BUG kmalloc-64 (Not tainted): Poison overwritten"
    "Oops",
    "INFO: possible ",
    "INFO: trying to register",
    "INFO: lockdep",
    "INFO: suspicious",
    "INFO: task ",
    "INFO: rcu",
    "rcu: INFO: ",
    "UBSAN: ",
    "ODEBUG: ",
    "kernel BUG at ",
    "watchdog: BUG",
    "unreferenced object ",
    "list_add corruption",
    "list_del corruption",
    "VFS: Busy inodes",
    "VFS: Close: file count",
    "general protection fault",
    "stack segment:",
    "invalid opcode:",
    "divide error:",
    "double fault:",
    "unchecked MSR access",
];

/// Anywhere in the line.
pub const INSIDE: &[&str] = &[
    "Kernel panic - not syncing",
    "kernel BUG at ",
    "BUG: KASAN",
    "new suspected memory leaks",
    "Segfault with no mm",
    "DEBUG_LOCKS_WARN_ON",
    "detected stalls on CPU",
    "self-detected stall on CPU",
];
