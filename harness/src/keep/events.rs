// SPDX-License-Identifier: GPL-2.0
//! What happened, as one JSON object a line (`--json FILE`), for machines and for the demo.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::fusectl::Recovery;

/// One line. `at_ns` is CLOCK_MONOTONIC, the same clock for all processes of a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub at_ns: u64,
    #[serde(flatten)]
    pub event: Event,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    Mounted {
        mountpoint: String,
        connection: u32,
    },
    /// Handed on by who holds the descriptors, and mounted already.
    Adopted {
        mountpoint: String,
        connection: u32,
    },
    Started {
        pid: i32,
        restarts: u64,
    },
    StartFailed {
        error: String,
    },
    /// `lived_ns`: since it was started. `connected`: false if it ended because the mount had.
    /// `recovery`: the kernel's counts at that moment, if it has any.
    Died {
        pid: i32,
        status: String,
        lived_ns: u64,
        connected: bool,
        recovery: Option<Recovery>,
    },
    /// It lives and answers nothing (`--hang-timeout`): it is killed. `what`: for people.
    Hung {
        pid: i32,
        what: String,
    },
    /// The server died of these so often that they got EIO (`--max-tries`); the number since the mount.
    RequestsRefused {
        total: u64,
    },
    /// The test before a planned restart (`--upgrade-test`); the server goes on if it did not pass. `how`: why not.
    Tried {
        passed: bool,
        how: Option<String>,
    },
    /// All that the dead instance left behind is gone.
    Cleared {
        pid: i32,
        took_ns: u64,
    },
    /// What the kernel was told: `restarted`, `resent`, or `refused` and why.
    Notified {
        how: String,
        error: Option<String>,
    },
    FreshMount {
        connection: u32,
        reason: String,
    },
    /// The next instance is started after this pause; none while restarts are held back (SIGUSR1).
    Waiting {
        delay_ns: Option<u64>,
    },
    Busy {
        pids: Vec<i32>,
    },
    GaveUp {
        reason: String,
    },
    Unmounted {
        how: String,
    },
    /// The keeper ends; the mount stays with who holds the descriptors.
    HandedBack,
}

/// The log; without a file it swallows everything.
pub struct EventLog {
    file: Option<(File, PathBuf)>,
}

impl EventLog {
    pub fn open(path: Option<&Path>) -> Result<Self> {
        let file = path
            .map(|p| -> Result<_> {
                let file = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(p)
                    .with_context(|| format!("cannot open the event log {}", p.display()))?;
                Ok((file, p.to_owned()))
            })
            .transpose()?;
        Ok(Self { file })
    }

    pub fn write(&mut self, event: Event) {
        let Some((file, path)) = &mut self.file else {
            return;
        };
        let mut line = serde_json::to_string(&Record {
            at_ns: now_ns(),
            event,
        })
        .expect("plain data");
        line.push('\n');
        if let Err(e) = file.write_all(line.as_bytes()) {
            // The mount matters more than its log: say it once, go on.
            tracing::warn!(
                "event log {}: {e}; no more events are written",
                path.display()
            );
            self.file = None;
        }
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub fn now_ns() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("this clock always exists");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let event = Event::Died {
            pid: 7,
            status: "killed by SIGKILL".into(),
            lived_ns: 5,
            connected: true,
            recovery: None,
        };
        EventLog::open(Some(&path)).unwrap().write(event.clone());
        EventLog::open(Some(&path))
            .unwrap()
            .write(Event::Unmounted {
                how: "clean".into(),
            });
        let text = std::fs::read_to_string(&path).unwrap();
        let records: Vec<Record> = text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
        assert_eq!(records.len(), 2);
        assert_eq!(records[0].event, event);
        assert!(text.contains(r#""event":"died""#));
    }

    #[test]
    fn a_full_disk_does_not_stop_the_keeper() {
        let mut log = EventLog::open(Some(Path::new("/dev/full"))).unwrap();
        log.write(Event::Unmounted {
            how: "clean".into(),
        });
        assert!(log.file.is_none());
    }

    #[test]
    fn a_log_that_cannot_be_opened_names_its_path() {
        let error = EventLog::open(Some(Path::new("/no/such/dir/log")))
            .err()
            .unwrap();
        assert!(format!("{error:#}").contains("/no/such/dir/log"));
    }
}
