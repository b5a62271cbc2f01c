// SPDX-License-Identifier: GPL-2.0
//! What the kernel complains of, so that it can be told in which case. (`scripts/vm` fails the whole run on it anyway.)

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

#[path = "../../../qemu/src/splat_signs.rs"]
mod splat_signs;
use splat_signs::{INSIDE, STARTS};

pub struct Log(Option<File>);

impl Log {
    /// From now on; a machine that does not let us read it has none.
    pub fn open() -> Log {
        let mut options = File::options();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = file.open("/dev/kmsg").ok().and_then(|mut file| {
            file.seek(SeekFrom::End(0)).ok()?;
            Some(file)
        });
        Log(file)
    }

    /// Headlines of reports since the last call.
    pub fn complaints(&mut self) -> Vec<String> {
        let mut found = Vec::new();
        let Some(file) = &mut self.0 else {
            return found;
        };
        let mut buf = [0; 8192];
        loop {
            match file.read(&mut buf) {
                Ok(n) => found.extend(complaint(&String::from_utf8_lossy(&buf[..n]))),
                // Overwritten before we came: the next read goes on.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                Err(_) => return found,
            }
        }
    }
}

/// A record is `priority,sequence,time,flags;text`.
fn complaint(record: &str) -> Option<String> {
    let text = record.split_once(';')?.1.lines().next()?;
    let is_report = STARTS.iter().any(|start| text.starts_with(start))
        || INSIDE.iter().any(|inside| text.contains(inside));
    is_report.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_told_from_what_is_only_said() {
        let of = |text: &str| complaint(&format!("4,339,5140900,-;{text}\n SUBSYSTEM=x\n"));
        for text in [
            "WARNING: CPU: 0 PID: 1 at fs/fuse/dev.c:12",
            "BUG: KASAN: slab-use-after-free in fuse_iget",
            "BUG kmalloc-64 (Not tainted): Poison overwritten",
            "INFO: task cat:123 blocked for more than 120 seconds.",
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "rcu: INFO: rcu_sched self-detected stall on CPU",
            "rcu_tasks: rcu_tasks detected stalls on CPU 1",
            "watchdog: BUG: soft lockup - CPU#1 stuck for 22s!",
            "kmemleak: 2 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
            "unreferenced object 0xffff888004a5c3c0 (size 64):",
            "kernel BUG at fs/fuse/dev.c:1!",
            "VFS: Close: file count is 0",
            "divide error: 0000 [#1]",
        ] {
            assert!(of(text).is_some(), "missed: {text}");
        }
        for text in [
            "fuse: init (API version 7.48)",
            "clocksource: timekeeping watchdog on CPU1: Marking clocksource 'tsc' as unstable",
            "kmemleak: Automatic memory scanning thread started",
            "rcu: Hierarchical SRCU implementation.",
        ] {
            assert_eq!(of(text), None, "false alarm: {text}");
        }
        assert_eq!(complaint(""), None);
    }
}
