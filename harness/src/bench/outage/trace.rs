// SPDX-License-Identifier: GPL-2.0
//! When the kernel's recovery changed its phase: the tracepoint `fuse_restart_phase`, on CLOCK_MONOTONIC.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

const TRACING: &str = "/sys/kernel/tracing";

/// A buffer of our own, which nobody else's tracing disturbs.
pub struct Trace {
    dir: PathBuf,
}

/// A change of phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// CLOCK_MONOTONIC; the kernel tells microseconds.
    pub at_ns: u64,
    pub connection: u32,
    pub epoch: u32,
    pub phase: String,
}

impl Trace {
    pub fn begin() -> Result<Trace> {
        let dir = PathBuf::from(format!(
            "{TRACING}/instances/fuse-restart-{}",
            std::process::id()
        ));
        fs::create_dir(&dir).with_context(|| {
            format!("no trace buffer {}: tracefs must be mounted there, and the kernel have CONFIG_FTRACE", dir.display())
        })?;
        let trace = Trace { dir };
        trace.set("trace_clock", "mono")?;
        trace
            .set("events/fuse/fuse_restart_phase/enable", "1")
            .context("this kernel does not trace recoveries: boot one with the series")?;
        Ok(trace)
    }

    fn set(&self, file: &str, value: &str) -> Result<()> {
        let path = self.dir.join(file);
        fs::write(&path, value).with_context(|| format!("{}", path.display()))
    }

    /// Forgets what happened until now.
    pub fn clear(&self) -> Result<()> {
        self.set("trace", "")
    }

    /// What happened on a connection since then.
    pub fn read(&self, connection: u32) -> Result<Vec<Change>> {
        let text = fs::read_to_string(self.dir.join("trace")).context("reading the trace")?;
        let mut changes: Vec<Change> = text.lines().filter_map(parse).collect();
        changes.retain(|change| change.connection == connection);
        changes.sort_by_key(|change| change.at_ns);
        Ok(changes)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // The directory cannot go while events go to it.
        let _ = self.set("events/enable", "0");
        let _ = fs::remove_dir(&self.dir);
    }
}

/// `kworker/0:1-9 [000] d..1. 812.034567: fuse_restart_phase: connection 40 epoch 3 held`
fn parse(line: &str) -> Option<Change> {
    let (before, after) = line.split_once(": fuse_restart_phase: ")?;
    let (seconds, fraction) = before.rsplit(' ').next()?.split_once('.')?;
    let nanoseconds = format!("{fraction:0<9}").parse::<u64>().ok()?;
    let mut words = after.split_whitespace();
    let mut value = |key: &str| -> Option<&str> {
        let found = words.next()?;
        (found == key).then(|| words.next()).flatten()
    };
    let connection = value("connection")?.parse().ok()?;
    let epoch = value("epoch")?.parse().ok()?;
    Some(Change {
        at_ns: seconds.parse::<u64>().ok()? * 1_000_000_000 + nanoseconds,
        connection,
        epoch,
        phase: words.next()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_trace_is_read() {
        let line = " kworker/u8:1-39 [001] d..2. 812.034567: fuse_restart_phase: connection 40 epoch 3 held";
        assert_eq!(
            parse(line).unwrap(),
            Change {
                at_ns: 812_034_567_000,
                connection: 40,
                epoch: 3,
                phase: "held".into()
            }
        );
        for line in [
            "",
            "# tracer: nop",
            " x-1 [000] ..... 1.000001: fuse_restart_verdict: connection 1 epoch 1 nodeid 1 confirmed",
            " x-1 [000] ..... 1.000001: fuse_restart_phase: connection 1",
        ] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }
}
