// SPDX-License-Identifier: GPL-2.0
//! An application that does small operations all the time, checks each result, and notes when each was answered.
//!
//! None of its operations may be done twice or not at all: a file is created exclusively, read back, renamed onto a
//! name that must be free, and removed; a repeated one would fail with EEXIST or ENOENT.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::keep::events::now_ns;

/// Between two operations, so that the workload gets the processors.
const PAUSE: Duration = Duration::from_millis(10);
/// A prober with that many errors has seen enough.
const MOST_ERRORS: usize = 20;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// When the last operation that was answered had been started.
    answered: AtomicU64,
}

pub struct Prober {
    shared: Arc<Shared>,
    thread: JoinHandle<Seen>,
}

/// One operation, on CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answered {
    pub started: u64,
    pub answered: u64,
}

/// What it has seen.
#[derive(Default, Debug)]
pub struct Seen {
    pub operations: Vec<Answered>,
    /// With the moment of the answer.
    pub errors: Vec<(u64, String)>,
}

impl Seen {
    /// Forgets what came after the run was cut short: the cut takes the mount away, and all errors are its own.
    pub fn until(&mut self, cut: u64) {
        self.operations.retain(|o| o.answered < cut);
        self.errors.retain(|e| e.0 < cut);
    }
}

impl Prober {
    pub fn start(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir(&dir)?;
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || probe(&dir, &theirs));
        Ok(Self { shared, thread })
    }

    /// Was an operation answered that was started after this moment?
    pub fn answered_since(&self, moment: u64) -> bool {
        self.shared.answered.load(Ordering::Acquire) > moment
    }

    pub fn stop(self) -> Seen {
        self.shared.stop.store(true, Ordering::Release);
        self.thread.join().expect("the prober does not panic")
    }
}

fn probe(dir: &Path, shared: &Shared) -> Seen {
    let mut seen = Seen::default();
    let mut round = 0u64;
    while !shared.stop.load(Ordering::Acquire) && seen.errors.len() < MOST_ERRORS {
        for (name, operation) in OPERATIONS {
            let started = now_ns();
            let result = operation(dir, round);
            let answered = now_ns();
            seen.operations.push(Answered { started, answered });
            shared.answered.store(started, Ordering::Release);
            if let Err(e) = result {
                let what = format!("{name} in round {round}: {e}");
                seen.errors.push((answered, what));
                // So that one error is counted once.
                let _ = fs::remove_file(old(dir, round));
                let _ = fs::remove_file(new(dir, round));
                break;
            }
            std::thread::sleep(PAUSE);
        }
        round += 1;
    }
    seen
}

type Operation = fn(&Path, u64) -> io::Result<()>;

const OPERATIONS: [(&str, Operation); 6] = [
    ("create", |dir, round| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(old(dir, round))?;
        file.write_all(&content(round))
    }),
    ("stat", |dir, round| {
        let length = fs::metadata(old(dir, round))?.len();
        expect(length == content(round).len() as u64, "wrong length")
    }),
    ("read", |dir, round| {
        let mut read = Vec::new();
        fs::File::open(old(dir, round))?.read_to_end(&mut read)?;
        expect(read == content(round), "wrong content")
    }),
    ("rename", |dir, round| {
        rename_noreplace(&old(dir, round), &new(dir, round))
    }),
    ("list", |dir, round| {
        let names: Vec<_> = fs::read_dir(dir)?.collect::<io::Result<_>>()?;
        let ours = names.len() == 1 && names[0].path() == new(dir, round);
        expect(ours, "the directory does not hold exactly the renamed file")
    }),
    ("unlink", |dir, round| fs::remove_file(new(dir, round))),
];

fn old(dir: &Path, round: u64) -> PathBuf {
    dir.join(format!("{round}.old"))
}

fn new(dir: &Path, round: u64) -> PathBuf {
    dir.join(format!("{round}.new"))
}

fn content(round: u64) -> Vec<u8> {
    format!("round {round}\n").repeat(20).into_bytes()
}

fn expect(fine: bool, what: &str) -> io::Result<()> {
    fine.then_some(())
        .ok_or_else(|| io::Error::other(what.to_owned()))
}

fn rename_noreplace(from: &Path, to: &Path) -> io::Result<()> {
    use nix::fcntl::{renameat2, RenameFlags, AT_FDCWD};
    Ok(renameat2(
        AT_FDCWD,
        from,
        AT_FDCWD,
        to,
        RenameFlags::RENAME_NOREPLACE,
    )?)
}

/// The outage of each kill: the longest that an operation waited which was answered after that kill and before the
/// next one. What it had waited before the kill does not count.
pub fn outages(kills: &[u64], operations: &[Answered]) -> Vec<u64> {
    let ends = kills.iter().skip(1).copied().chain([u64::MAX]);
    let longest = |(&kill, end): (&u64, u64)| {
        let within = operations
            .iter()
            .filter(|o| (kill..end).contains(&o.answered));
        let waits = within.map(|o| o.answered - o.started.max(kill));
        waits.max().unwrap_or(0)
    };
    kills.iter().zip(ends).map(longest).collect()
}

/// The value below which `percent` of the values lie (nearest rank). None of none.
pub fn percentile(values: &[u64], percent: u64) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let rank = (sorted.len() as u64 * percent).div_ceil(100).max(1);
    sorted.get(rank as usize - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_the_longest_wait_after_its_kill() {
        let operations = [
            (1, 5),
            (6, 10),
            (11, 111),
            (112, 113),
            (190, 260),
            (261, 262),
        ]
        .map(|(started, answered)| Answered { started, answered });
        assert_eq!(outages(&[20, 199], &operations), vec![91, 61]);
        // An answer that was under way at the kill does not hide the outage behind it.
        assert_eq!(outages(&[10], &operations[..3]), vec![100]);
        // Nothing was answered any more: no outage can be named, which the report takes for a failure.
        assert_eq!(outages(&[500], &operations), vec![0]);
        assert_eq!(outages(&[], &operations), Vec::<u64>::new());
    }

    #[test]
    fn what_a_cut_breaks_is_not_counted() {
        let operations = [(1, 5), (6, 30)];
        let mut seen = Seen {
            operations: operations
                .map(|(started, answered)| Answered { started, answered })
                .to_vec(),
            errors: vec![(5, "before".into()), (30, "after".into())],
        };
        seen.until(20);
        assert_eq!((seen.operations.len(), seen.errors.len()), (1, 1));
        assert_eq!(seen.errors[0].1, "before");
    }

    #[test]
    fn percentiles_by_nearest_rank() {
        let values: Vec<u64> = (1..=20).rev().collect();
        assert_eq!(percentile(&values, 50), Some(10));
        assert_eq!(percentile(&values, 99), Some(20));
        assert_eq!(percentile(&values, 0), Some(1));
        assert_eq!(percentile(&[7], 50), Some(7));
        assert_eq!(percentile(&[], 50), None);
    }

    #[test]
    fn it_sees_no_error_on_a_file_system_that_lives() {
        let dir = tempfile::tempdir().unwrap();
        let prober = Prober::start(dir.path().join("probe")).unwrap();
        let start = now_ns();
        while !prober.answered_since(start) {
            std::thread::yield_now();
        }
        let seen = prober.stop();
        assert!(
            seen.errors.is_empty() && !seen.operations.is_empty(),
            "{seen:?}"
        );
    }

    #[test]
    fn an_operation_done_twice_or_not_at_all_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let run = |name: &str| {
            let operation = OPERATIONS.iter().find(|o| o.0 == name).unwrap().1;
            operation(dir.path(), 1).is_ok()
        };
        assert!(!run("rename") && !run("unlink") && !run("read"));
        assert!(run("create") && !run("create") && run("read"));
        assert!(!run("list"), "not renamed yet");
        assert!(run("rename") && !run("rename") && run("list") && run("unlink") && !run("unlink"));
    }
}
