// SPDX-License-Identifier: GPL-2.0
//! What in a kernel's log makes a run fail, whatever the command said: the
//! reports of WARN, BUG, lockdep, KASAN, UBSAN, kmemleak, the hung-task and
//! stall detectors, panics, and failed KUnit tests.

use crate::splat_signs::{INSIDE, STARTS};

/// Reports found in a log: where the first begins, and all their headlines.
#[derive(Debug, PartialEq, Eq)]
pub struct Splats {
    pub headlines: Vec<String>,
    /// The first report with what surrounds it, for printing.
    pub text: String,
}

/// Looks a whole log through.
pub fn find(log: &str) -> Option<Splats> {
    let lines: Vec<&str> = log.lines().map(|l| l.trim_end_matches('\r')).collect();
    let mut headlines = Vec::new();
    let mut first = None;
    for (i, line) in lines.iter().enumerate() {
        let text = strip_prefix(line);
        if is_report(text) {
            headlines.push(text.to_string());
            first.get_or_insert(i);
        }
    }
    let first = first?;
    // The banner above ("cut here", "=====") belongs to it.
    let from = first.saturating_sub(2);
    let to = end_of_report(&lines, first);
    Some(Splats {
        headlines,
        text: lines[from..to].join("\n"),
    })
}

fn is_report(text: &str) -> bool {
    STARTS.iter().any(|s| text.starts_with(s))
        || INSIDE.iter().any(|s| text.contains(s))
        || kunit_failure(text)
}

/// KTAP: `not ok 3 name`, indented or not; `# SKIP` and `# TODO` are none.
fn kunit_failure(text: &str) -> bool {
    let t = text.trim_start();
    t.starts_with("not ok ") && !t.contains("# SKIP") && !t.contains("# TODO")
}

/// A report ends with its end marker, or after its call trace and registers.
fn end_of_report(lines: &[&str], first: usize) -> usize {
    const AFTER_TRACE: &[&str] = &[
        " ",
        "<",
        "\t",
        "Call Trace",
        "Code:",
        "RIP:",
        "RSP:",
        "RAX:",
        "RDX:",
        "RBP:",
        "R10:",
        "R13:",
        "FS:",
        "CS:",
        "CR2:",
        "DR0:",
        "DR3:",
        "PKRU:",
        "Modules linked in:",
        "irq event",
        "hardirqs",
        "softirqs",
        "---[",
    ];
    let limit = (first + 120).min(lines.len());
    let mut traced = false;
    for (i, line) in lines.iter().enumerate().take(limit).skip(first) {
        let text = strip_prefix(line);
        if text.starts_with("---[ end ") {
            return i + 1;
        }
        traced |= text.starts_with("Call Trace");
        if traced && !AFTER_TRACE.iter().any(|p| text.starts_with(p)) {
            return i;
        }
    }
    // No trace at all: a headline with a little of what follows.
    if traced {
        limit
    } else {
        (first + 15).min(lines.len())
    }
}

/// Takes `[    1.234567] ` and `[  T12] ` off, as printk puts them there.
fn strip_prefix(line: &str) -> &str {
    let mut rest = line;
    for _ in 0..2 {
        let Some(inner) = rest.strip_prefix('[') else {
            break;
        };
        let Some((stamp, after)) = inner.split_once(']') else {
            break;
        };
        let is_time = stamp.trim().chars().all(|c| c.is_ascii_digit() || c == '.');
        let is_task = matches!(stamp.trim().chars().next(), Some('T' | 'C'))
            && stamp.trim()[1..].chars().all(|c| c.is_ascii_digit());
        if !(is_time || is_task) || stamp.trim().is_empty() {
            break;
        }
        rest = after.strip_prefix(' ').unwrap_or(after);
    }
    rest
}

/// The bits of `/proc/sys/kernel/tainted` that a report sets: a second net for
/// a log that lost lines. Only bits that came while the command ran count.
pub fn taint(before: u64, after: u64) -> Option<String> {
    const BITS: &[(u32, &str)] = &[
        (5, "bad page (B)"),
        (7, "oops or BUG (D)"),
        (9, "warning (W)"),
        (14, "soft lockup (L)"),
    ];
    let new = after & !before;
    let names: Vec<&str> = BITS
        .iter()
        .filter(|(b, _)| new & (1 << b) != 0)
        .map(|(_, n)| *n)
        .collect();
    (!names.is_empty()).then(|| {
        format!(
            "the kernel is newly tainted ({after:#x}): {}",
            names.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WARN: &str = "\
[    0.100000] Linux version 7.3.4
[   12.000001] lkdtm: Performing direct entry WARNING
[   12.000002] ------------[ cut here ]------------
[   12.000003] WARNING: drivers/misc/lkdtm/bugs.c:112 at lkdtm_WARNING+0xe/0x20, CPU#0: sh/31
[   12.000004] Modules linked in:
[   12.000005] CPU: 0 UID: 0 PID: 31 Comm: sh Not tainted 7.3.4 #1
[   12.000009] ---[ end trace 0000000000000000 ]---
[   12.000010] after";

    #[test]
    fn a_warning_is_found_and_cut_out() {
        let s = find(WARN).unwrap();
        assert!(s.headlines[0].starts_with("WARNING: drivers/misc/lkdtm"));
        assert!(s.text.contains("cut here") && s.text.contains("end trace"));
        assert!(!s.text.contains("after") && !s.text.contains("Linux version"));
    }

    #[test]
    fn each_checker_is_known() {
        for line in [
            "[    3.2] BUG: KASAN: slab-use-after-free in fuse_dev_do_read+0x1/0x2",
            "[    3.2][   T7] BUG: KASAN: slab-out-of-bounds in x",
            "[    3.2] WARNING: possible circular locking dependency detected",
            "[    3.2] WARNING: suspicious RCU usage",
            "[    3.2] WARNING: inconsistent lock state",
            "[    3.2] WARNING: bad unlock balance detected!",
            "[    3.2] WARNING: lock held when returning to user space!",
            "[    3.2] BUG: sleeping function called from invalid context at x.c:3",
            "[    3.2] BUG: scheduling while atomic: cat/3/0x2",
            "[    3.2] BUG: kernel NULL pointer dereference, address: 0",
            "[    3.2] BUG: Bad page state in process x",
            "[    3.2] BUG kmalloc-64 (Not tainted): Poison overwritten",
            "[    3.2] INFO: task cat:123 blocked for more than 120 seconds.",
            "[    3.2] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[    3.2] watchdog: BUG: soft lockup - CPU#1 stuck for 22s!",
            "[    3.2] Kernel panic - not syncing: Attempted to kill init!",
            "[    3.2] kernel BUG at fs/fuse/dev.c:1!",
            "[    3.2] Oops: general protection fault, 0000 [#1]",
            "[    3.2] general protection fault: 0000 [#1]",
            "[    3.2] UBSAN: array-index-out-of-bounds in x.c",
            "[    3.2] ODEBUG: free active (active state 0) object: work_struct",
            "[    3.2] kmemleak: 2 new suspected memory leaks (see /sys/...)",
            "[    3.2] VFS: Busy inodes after unmount of fuse (fuse)",
            "Kernel panic - not syncing: Segfault with no mm",
            "[    3.2]     not ok 2 fuse_restart_window",
            "not ok 1 fuse_restart",
        ] {
            assert!(find(line).is_some(), "missed: {line}");
        }
    }

    #[test]
    fn harmless_lines_are_let_be() {
        for line in [
            "[    0.2] Spectre V2 : WARNING: Unprivileged eBPF is enabled",
            "[    0.2] lkdtm: Performing direct entry WARNING",
            "[    0.2] FAULT_INJECTION: forcing a failure.",
            "[    0.2] Call Trace:",
            "[    0.2]     ok 2 fuse_restart_window",
            "[    0.2]     not ok 2 x # SKIP not here",
            "[    0.2] fuse: init (API version 7.48)",
            "[    0.2] debug: DEBUG: BUGS are fun",
            "[    0.2] clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable",
            "",
        ] {
            assert_eq!(find(line), None, "false alarm: {line}");
        }
    }

    #[test]
    fn a_report_without_end_marker_ends_after_its_trace() {
        let log = "\
[    0.1] =====================================
[    0.1] WARNING: bad unlock balance detected!
[    0.1] swapper/0 is trying to release lock (rcu_read_lock) at:
[    0.1]
[    0.1] Call Trace:
[    0.1]  <TASK>
[    0.1]  dump_stack_lvl+0xd3/0x11a
[    0.1] Code: 00
[    0.1] Linux version 7.3.4
[    0.1] more";
        let s = find(log).unwrap();
        assert!(
            s.text.starts_with("[    0.1] =====") && s.text.ends_with("Code: 00"),
            "{}",
            s.text
        );
    }

    #[test]
    fn all_headlines_are_counted() {
        let log = format!("{WARN}\n{WARN}");
        let found = find(&log).unwrap();
        assert_eq!(
            found
                .headlines
                .iter()
                .filter(|h| h.starts_with("WARNING"))
                .count(),
            2
        );
    }

    #[test]
    fn only_new_and_telling_taint_counts() {
        assert_eq!(taint(0, 0), None);
        assert_eq!(taint(512, 512), None);
        assert_eq!(taint(0, 1 << 12), None); // an out-of-tree module
        assert!(taint(0, 512).unwrap().contains("warning (W)"));
        assert!(taint(512, 512 | 128).unwrap().contains("(D)"));
    }
}
