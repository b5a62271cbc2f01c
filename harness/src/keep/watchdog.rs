// SPDX-License-Identifier: GPL-2.0
//! Finds a server that hangs: requests in its hands, and none answered for a set time.
//!
//! The kernel alone does not tell: `waiting` counts requests, and a busy server always has some. So:
//!
//! * while the kernel recovers, a hang is a recovery that comes no further (`recovery`: state, epoch, replayed);
//! * a server that marks its requests (`rust_fuse_notify::std::state::Flights`) hangs if one is being executed at every
//!   look, and the number of answers stays the same. `SETLKW` and `POLL` may wait for applications and do not count;
//! * if nothing is marked (all its threads are in a FORGET, say), and of any other server, only this is known: `waiting`
//!   was never zero, and neither the process nor one that descends from it (a keeper's server, say) made a read or
//!   write. Whoever polls, logs or spins is taken for alive, and a request that waits for an application counts.

use std::fs;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use rust_fuse_notify::std::state::{self, InFlight, Pulse};

use crate::fusectl::{self, Recovery};

/// Looks within the time, so that one that is missed does no harm.
const LOOKS: u32 = 8;
/// How long the stacks may take: `/proc/PID/status` can wait for memory that a dying process gives back.
const STACKS_WITHIN: Duration = Duration::from_secs(3);

/// What one look found. A hang is when all looks are busy and alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// There is something to do.
    busy: bool,
    /// Whatever changes when something is done.
    progress: Vec<u64>,
    /// Of a server that marks them.
    pub in_hands: Vec<InFlight>,
    recovering: bool,
}

impl Look {
    /// What hangs, for people.
    pub fn describe(&self) -> String {
        match (&self.in_hands[..], self.recovering) {
            (_, true) => "its recovery comes no further".into(),
            ([], _) => "requests wait, and it neither reads nor writes".into(),
            ([one], _) => format!("none answered, in its hands: {one}"),
            ([first, ..], _) => {
                let number = self.in_hands.len();
                format!("none answered of {number} in its hands, one of them: {first}")
            }
        }
    }
}

/// Decides. Pure: looks go in.
#[derive(Debug)]
pub struct Watchdog {
    limit: Duration,
    last: Look,
    since: Instant,
    pub next: Instant,
}

impl Watchdog {
    pub fn new(limit: Duration, now: Instant) -> Self {
        Self {
            limit,
            last: Look::default(),
            since: now,
            next: now,
        }
    }

    /// A new instance has all the time.
    pub fn restart(&mut self, now: Instant) {
        *self = Self::new(self.limit, now);
    }

    /// True: it hangs.
    pub fn look(&mut self, look: Look, now: Instant) -> bool {
        self.next = now + (self.limit / LOOKS).max(Duration::from_millis(10));
        let alike = look.busy && self.last.busy && look.progress == self.last.progress;
        if !alike {
            self.since = now;
        }
        self.last = look;
        alike && now - self.since >= self.limit
    }
}

/// Asks the kernel, `/proc` and the memfd; never the file system or the server.
pub fn look(server: Pid, connection: u32, memfd: &OwnedFd) -> Look {
    let recovery = fusectl::recovery(connection).ok().flatten();
    let pulse = state::pulse(memfd.as_fd()).unwrap_or_default();
    let unused = |r: &Recovery| r.supported() && !r.serving() && r.state != "dead";
    if let Some(recovery) = recovery.filter(unused) {
        let mut progress = vec![1, recovery.get("epoch"), recovery.get("replayed")];
        progress.extend(recovery.state.bytes().map(u64::from));
        return Look {
            busy: true,
            progress,
            in_hands: Vec::new(),
            recovering: true,
        };
    }
    let waiting = fusectl::waiting(connection).unwrap_or(0);
    serving(pulse, waiting, || calls(server))
}

/// A look at a server that does not recover.
fn serving(pulse: Pulse, waiting: u64, calls: impl Fn() -> Option<[u64; 2]>) -> Look {
    if !pulse.in_hands.is_empty() || pulse.may_wait > 0 {
        return Look {
            busy: !pulse.in_hands.is_empty(),
            progress: vec![2, pulse.answered],
            in_hands: pulse.in_hands,
            recovering: false,
        };
    }
    let mut progress = vec![3, pulse.answered];
    let calls = calls();
    progress.extend(calls.unwrap_or_default());
    Look {
        busy: waiting > 0 && calls.is_some(),
        progress,
        in_hands: Vec::new(),
        recovering: false,
    }
}

/// How many reads and writes a process and its descendants have made. Whoever ends takes his with him: a change, too.
fn calls(server: Pid) -> Option<[u64; 2]> {
    let mut sum = calls_of(server)?;
    for pid in descendants(server) {
        // It may have ended meanwhile.
        let [read, written] = calls_of(pid).unwrap_or_default();
        sum = [sum[0].wrapping_add(read), sum[1].wrapping_add(written)];
    }
    Some(sum)
}

/// By `children` of each thread, which says nothing about a process's memory: see `remains::processes`. A kernel without
/// `CONFIG_PROC_CHILDREN` does not tell.
fn descendants(of: Pid) -> Vec<Pid> {
    let mut found = vec![of];
    let mut at = 0;
    while let Some(parent) = found.get(at) {
        let threads = fs::read_dir(format!("/proc/{parent}/task"));
        for thread in threads.into_iter().flatten().flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            let children = children.split_whitespace().flat_map(str::parse);
            found.extend(children.map(Pid::from_raw));
        }
        at += 1;
    }
    found.split_off(1)
}

fn calls_of(pid: Pid) -> Option<[u64; 2]> {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    let number = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().parse().ok()
    };
    Some([number("syscr:")?, number("syscw:")?])
}

/// Where each thread of a process is, as far as the kernel says. In a thread of its own, as it may wait.
pub fn stacks(pid: Pid) -> String {
    let (say, said) = std::sync::mpsc::channel();
    let reader = std::thread::Builder::new().name("stacks".into());
    let started = reader.spawn(move || drop(say.send(read_stacks(pid))));
    let text = match started {
        Ok(_) => said.recv_timeout(STACKS_WITHIN).ok(),
        Err(_) => None,
    };
    text.unwrap_or_else(|| format!("the stacks of pid {pid} could not be read in time\n"))
}

fn read_stacks(pid: Pid) -> String {
    let mut text = String::new();
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |file: &str| {
            let path = task.path().join(file);
            let text = fs::read_to_string(path).unwrap_or_else(|e| format!("({e})"));
            text.trim_end().to_owned()
        };
        let status = read("status");
        let field = |key| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap_or("?").trim()
        };
        text += &format!(
            "thread {} ({}), state {}, waits in {}, system call {}\n{}\n",
            task.file_name().to_string_lossy(),
            field("Name:"),
            field("State:"),
            read("wchan"),
            read("syscall"),
            read("stack")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(8);

    fn busy(progress: u64) -> Look {
        Look {
            busy: true,
            progress: vec![progress],
            ..Look::default()
        }
    }

    /// The second at which a hang is found, with one look a second.
    fn found(looks: impl Iterator<Item = Look>) -> Option<usize> {
        let start = Instant::now();
        let mut watchdog = Watchdog::new(LIMIT, start);
        looks.enumerate().find_map(|(second, look)| {
            let now = start + Duration::from_secs(second as u64);
            watchdog.look(look, now).then_some(second)
        })
    }

    #[test]
    fn who_descends_from_a_server_is_found() {
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "sleep 60 & echo $!; wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(shell.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        let sleep = Pid::from_raw(line.trim().parse().unwrap());
        let of = Pid::from_raw(shell.id() as i32);
        assert_eq!(descendants(of), [sleep]);
        // Tests run in threads, and each has children of its own.
        assert!(descendants(Pid::this()).contains(&sleep));
        assert!(calls(of) >= calls_of(of));
        let _ = nix::sys::signal::kill(sleep, nix::sys::signal::Signal::SIGKILL);
        shell.wait().unwrap();
    }

    #[test]
    fn what_answers_nothing_for_the_time_hangs() {
        assert_eq!(found((0..20).map(|_| busy(1))), Some(8));
    }

    #[test]
    fn one_answer_or_one_idle_moment_is_life() {
        assert_eq!(found((0..100).map(|n| busy(n / 7))), None);
        let idle_now_and_then = |n: u64| Look {
            busy: !n.is_multiple_of(7),
            ..busy(1)
        };
        assert_eq!(found((0..100).map(idle_now_and_then)), None);
        assert_eq!(found((0..100).map(|_| Look::default())), None);
    }

    #[test]
    fn a_server_with_nothing_marked_hangs_if_requests_wait_and_it_reads_none() {
        let marked = |in_hands: usize, may_wait| Pulse {
            watched: true,
            answered: 7,
            in_hands: vec![InFlight::default(); in_hands],
            may_wait,
            ..Pulse::default()
        };
        // In hands, that may wait for an application, waiting in the kernel: a hang?
        for (in_hands, may_wait, waiting, hangs) in [
            (0, 0, 0, false),
            (0, 0, 1, true), // its thread is in a FORGET
            (0, 1, 1, false),
            (0, 1, 2, false), // all threads may wait for a lock
            (1, 0, 1, true),
            (1, 1, 2, true),
        ] {
            let look = |_| serving(marked(in_hands, may_wait), waiting, || Some([5, 5]));
            let hung = found((0..20).map(look)).is_some();
            assert_eq!(hung, hangs, "{in_hands} {may_wait} {waiting}");
        }
        let reads = |n| serving(marked(0, 0), 1, || Some([n, 5]));
        assert_eq!(found((0..100).map(reads)), None);
        let gone = |_| serving(marked(0, 0), 1, || None);
        assert_eq!(found((0..100).map(gone)), None);
    }

    #[test]
    fn a_new_instance_has_all_the_time() {
        let start = Instant::now();
        let mut watchdog = Watchdog::new(LIMIT, start);
        watchdog.look(busy(1), start);
        let later = start + LIMIT;
        watchdog.restart(later);
        assert!(!watchdog.look(busy(1), later));
        assert!(watchdog.look(busy(1), later + LIMIT));
    }

    #[test]
    fn stacks_name_the_threads_of_a_process() {
        let text = stacks(Pid::this());
        assert!(
            text.contains("state") && text.contains("waits in"),
            "{text}"
        );
    }

    #[test]
    fn reads_and_writes_are_seen() {
        let before = calls(Pid::this()).unwrap();
        fs::read("/proc/self/comm").unwrap();
        assert!(calls(Pid::this()).unwrap()[0] > before[0]);
    }
}
