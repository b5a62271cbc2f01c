// SPDX-License-Identifier: GPL-2.0
//! The table of points in a file that the server and the crash matrix both map.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;

use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};

/// Names the file.
const VARIABLE: &str = "FUSE_RESTART_CRASH_POINTS";
/// Arms a point in it: `opcode:point:nth`.
const ARM: &str = "FUSE_RESTART_CRASH_ARM";

/// Points in a table; there are a few hundred.
const RECORDS: usize = 2048;
/// Words of a record: state, reached, left, killed, reached at the last death, what to arm then (record + 1, and n),
/// whom to kill, threads that are here with a request, those that were when another one died, then the name.
const WORDS: usize = 18;
const STATE: usize = 0;
const REACHED: usize = 1;
const LEFT: usize = 2;
const KILLED: usize = 3;
const AT_DEATH: usize = 4;
const THEN: usize = 5;
const THEN_NTH: usize = 6;
const VICTIM: usize = 7;
const HERE: usize = 8;
const BESIDE: usize = 9;
const NAME: usize = 10;
const NAME_MAX: usize = (WORDS - NAME) * 8 - 1;
const LEN: usize = RECORDS * WORDS * 8;

/// States of a record. A process that is killed between the two leaves a record that nobody uses.
const EMPTY: u64 = 0;
const BEGUN: u64 = 1;
const VALID: u64 = 2;

/// Not the process that reaches the point is killed (0), but the one that has started it.
const PARENT: u64 = 1;

/// This process is killing itself.
static DYING: AtomicBool = AtomicBool::new(false);

/// What the table knows of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(dead_code)] // For the crash matrix.
pub struct Seen {
    /// `opcode.point`
    pub name: String,
    /// How often it was reached, by all instances together.
    pub reached: u64,
    /// How often it will yet be reached before the process kills itself, this time included; 0: not armed.
    pub left: u64,
    /// How often a process killed itself here.
    pub killed: u64,
    /// How often it was reached since a process last killed itself, wherever that was.
    pub since_death: u64,
    /// How many threads had a request in their hands, and this point behind them, when another one died.
    pub beside: u64,
}

/// The table, mapped.
///
/// # Invariants
///
/// `base` is the start of [`LEN`] mapped bytes, until drop.
pub struct Table {
    base: NonNull<AtomicU64>,
}

// SAFETY: the mapping belongs to the process and is accessed through atomics only.
unsafe impl Send for Table {}
// SAFETY: as above.
unsafe impl Sync for Table {}

impl Table {
    /// Maps the table in a file, which is made, or filled up with empty records, if need be.
    pub fn open(path: &Path) -> io::Result<Table> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        if file.metadata()?.len() < LEN as u64 {
            file.set_len(LEN as u64)?;
        }
        let len = NonZeroUsize::new(LEN).ok_or(io::ErrorKind::InvalidInput)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: no address is asked for, so no mapping of anybody is replaced.
        let base = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, &file, 0) }?;
        // INVARIANT: mapped as asked.
        Ok(Table { base: base.cast() })
    }

    fn word(&self, record: usize, word: usize) -> &AtomicU64 {
        assert!(record < RECORDS && word < WORDS);
        // SAFETY: in bounds by the assertion and the invariant; every bit pattern is a u64.
        unsafe { self.base.add(record * WORDS + word).as_ref() }
    }

    /// The record of a name, made if there is none.
    fn record(&self, name: &str) -> Option<usize> {
        let mut bytes = [0; NAME_MAX + 1];
        bytes
            .get_mut(..name.len())
            .filter(|_| name.len() <= NAME_MAX)?
            .copy_from_slice(name.as_bytes());
        let seed = 0xcbf2_9ce4_8422_2325_u64;
        let hash = name.bytes().fold(seed, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        for step in 0..RECORDS {
            let record = (hash as usize).wrapping_add(step) % RECORDS;
            let state = self.word(record, STATE);
            let fresh = state.compare_exchange(EMPTY, BEGUN, Ordering::AcqRel, Ordering::Acquire);
            match fresh {
                Ok(_) => {
                    for (i, chunk) in bytes.chunks_exact(8).enumerate() {
                        let word = u64::from_ne_bytes(chunk.try_into().ok()?);
                        self.word(record, NAME + i).store(word, Ordering::Relaxed);
                    }
                    state.store(VALID, Ordering::Release);
                    return Some(record);
                }
                Err(_) if self.is_named(record, &bytes) => return Some(record),
                Err(_) => {}
            }
        }
        None
    }

    fn is_named(&self, record: usize, bytes: &[u8]) -> bool {
        // Another thread may be making this very record; it takes a moment, or for ever if it was killed.
        for _ in 0..10_000 {
            if self.word(record, STATE).load(Ordering::Acquire) == VALID {
                return bytes.chunks_exact(8).enumerate().all(|(i, chunk)| {
                    self.word(record, NAME + i)
                        .load(Ordering::Relaxed)
                        .to_ne_bytes()
                        == chunk
                });
            }
            std::hint::spin_loop();
        }
        false
    }

    /// From now on the `nth` reach of `opcode.point` (1: the next) kills the process that reaches it; 0 disarms.
    pub fn arm(&self, opcode: &str, point: &str, nth: u64) -> io::Result<()> {
        let name = format!("{opcode}.{point}");
        let Some(record) = self.record(&name) else {
            return Err(io::Error::other(format!("no room for the point {name}")));
        };
        self.word(record, LEFT).store(nth, Ordering::SeqCst);
        Ok(())
    }

    /// Whoever reaches `point` (`opcode.point`) does not kill itself but the keeper that has started it.
    pub fn kill_the_keeper_at(&self, point: &str) -> io::Result<()> {
        let full = || io::Error::other(format!("no room for the point {point}"));
        let record = self.record(point).ok_or_else(full)?;
        self.word(record, VICTIM).store(PARENT, Ordering::SeqCst);
        Ok(())
    }

    /// The death at `first` arms `second`, by name; both are `opcode.point`.
    pub fn arm_then(&self, first: &str, second: &str, nth: u64) -> io::Result<()> {
        let full = |name| io::Error::other(format!("no room for the point {name}"));
        let at = self.record(first).ok_or_else(|| full(first))?;
        let next = self.record(second).ok_or_else(|| full(second))?;
        self.word(at, THEN_NTH).store(nth, Ordering::SeqCst);
        self.word(at, THEN).store(next as u64 + 1, Ordering::SeqCst);
        Ok(())
    }

    /// What is known of `opcode.point`.
    pub fn seen(&self, opcode: &str, point: &str) -> Seen {
        let name = format!("{opcode}.{point}");
        self.record(&name)
            .map(|record| self.read(record))
            .unwrap_or(Seen {
                name,
                reached: 0,
                left: 0,
                killed: 0,
                since_death: 0,
                beside: 0,
            })
    }

    fn read(&self, record: usize) -> Seen {
        let load = |word| self.word(record, word).load(Ordering::SeqCst);
        let bytes: Vec<u8> = (NAME..WORDS).flat_map(|w| load(w).to_ne_bytes()).collect();
        let name = String::from_utf8_lossy(&bytes);
        let reached = load(REACHED);
        Seen {
            name: name.trim_end_matches('\0').to_owned(),
            reached,
            left: load(LEFT),
            killed: load(KILLED),
            since_death: reached.saturating_sub(load(AT_DEATH)),
            beside: load(BESIDE),
        }
    }

    /// Every point that was reached or armed, by name.
    pub fn all(&self) -> Vec<Seen> {
        let valid = (0..RECORDS).filter(|r| self.word(*r, STATE).load(Ordering::Acquire) == VALID);
        let mut all: Vec<Seen> = valid.map(|record| self.read(record)).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    fn reach(&self, opcode: &str, point: &str) {
        let Some(record) = self.record(&format!("{opcode}.{point}")) else {
            return;
        };
        // A process that dies at one point does not die at the next as well, in another thread.
        if DYING.load(Ordering::SeqCst) {
            let with_us = u64::from(point != "end");
            self.word(record, BESIDE)
                .fetch_add(with_us, Ordering::SeqCst);
            return;
        }
        self.word(record, REACHED).fetch_add(1, Ordering::SeqCst);
        self.note_where(record, point);
        let left = self.word(record, LEFT);
        let one_less = |left: u64| left.checked_sub(1);
        if left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less) == Ok(1) {
            DYING.store(true, Ordering::SeqCst);
            self.prepare_for_the_next(record);
            self.word(record, KILLED).fetch_add(1, Ordering::SeqCst);
            match self.word(record, VICTIM).load(Ordering::SeqCst) {
                // And goes on, until somebody sees to it that we are gone.
                PARENT => kill_parent(),
                // SAFETY: no memory is touched. The signal is delivered before the call returns.
                _ => drop(unsafe { libc::kill(libc::getpid(), libc::SIGKILL) }),
            }
        }
    }
}

impl Table {
    /// Where this thread is with its request; nowhere after `end`.
    fn note_where(&self, record: usize, point: &str) {
        thread_local! {
            static LAST: Cell<Option<usize>> = const { Cell::new(None) };
        }
        let now = (point != "end").then_some(record);
        if let Some(now) = now {
            self.word(now, HERE).fetch_add(1, Ordering::SeqCst);
        }
        if let Some(last) = LAST.replace(now) {
            let one_less = |here: u64| here.checked_sub(1);
            // Nothing to take away if somebody has died meanwhile, and all who are left with him.
            let _ =
                self.word(last, HERE)
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less);
        }
    }

    /// What the next instance finds: an order, if there is one, from where to count, and who died with this one.
    fn prepare_for_the_next(&self, record: usize) {
        self.note_where(record, "end");
        for r in 0..RECORDS {
            let reached = self.word(r, REACHED).load(Ordering::SeqCst);
            self.word(r, AT_DEATH).store(reached, Ordering::SeqCst);
            let here = self.word(r, HERE).swap(0, Ordering::SeqCst);
            self.word(r, BESIDE).fetch_add(here, Ordering::SeqCst);
        }
        if let Some(next) = self
            .word(record, THEN)
            .load(Ordering::SeqCst)
            .checked_sub(1)
        {
            let nth = self.word(record, THEN_NTH).load(Ordering::SeqCst);
            self.word(next as usize, LEFT).store(nth, Ordering::SeqCst);
        }
    }
}

/// Who has started us, as it was when the table was opened; not whoever adopted us since.
static STARTED_BY: OnceLock<libc::pid_t> = OnceLock::new();

fn kill_parent() {
    // SAFETY: plain system calls. Our parent is dead or a zombie at worst, so its pid is nobody else's.
    unsafe {
        let parent = libc::getppid();
        if STARTED_BY.get() == Some(&parent) && parent > 1 {
            libc::kill(parent, libc::SIGKILL);
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: mapped in `open` with this length; no reference into it outlives `self`.
        let _ = unsafe { munmap(self.base.cast(), LEN) };
    }
}

/// A point of the server; nothing happens unless the environment names a table.
#[cfg_attr(test, allow(dead_code))]
pub(super) fn reach(opcode: &'static str, point: &'static str) {
    static TABLE: OnceLock<Option<Table>> = OnceLock::new();
    if let Some(table) = TABLE.get_or_init(from_environment) {
        table.reach(opcode, point);
    }
}

fn from_environment() -> Option<Table> {
    let path = std::env::var_os(VARIABLE)?;
    // SAFETY: takes nothing, touches nothing.
    STARTED_BY.get_or_init(|| unsafe { libc::getppid() });
    // A test that injects nothing must not look like one that passes.
    let table = Table::open(Path::new(&path))
        .unwrap_or_else(|e| panic!("{VARIABLE}={}: {e}", Path::new(&path).display()));
    if let Ok(order) = std::env::var(ARM) {
        let mut parts = order.split(':');
        let (opcode, point, nth) = (parts.next(), parts.next(), parts.next());
        let nth = nth.and_then(|nth| nth.parse::<u64>().ok());
        let (Some(opcode), Some(point), Some(nth)) = (opcode, point, nth) else {
            panic!("{ARM}={order}: not opcode:point:nth");
        };
        if table.seen(opcode, point).killed == 0 {
            table
                .arm(opcode, point, nth)
                .unwrap_or_else(|e| panic!("{ARM}={order}: {e}"));
        }
    }
    Some(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_process_reaches_another_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("points");
        let (ours, theirs) = (Table::open(&path).unwrap(), Table::open(&path).unwrap());
        assert_eq!(ours.all(), []);
        assert_eq!(ours.seen("mkdir", "mkdirat").reached, 0);
        theirs.reach("mkdir", "mkdirat");
        theirs.reach("mkdir", "intent");
        ours.arm("mkdir", "mkdirat", 3).unwrap();
        theirs.reach("mkdir", "mkdirat");
        let seen = ours.seen("mkdir", "mkdirat");
        assert_eq!((seen.reached, seen.left, seen.killed), (2, 2, 0));
        let names: Vec<String> = ours.all().into_iter().map(|seen| seen.name).collect();
        assert_eq!(names, ["mkdir.intent", "mkdir.mkdirat"]);
    }

    #[test]
    fn an_armed_point_kills_at_the_nth_reach_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(&dir.path().join("points")).unwrap();
        table.arm("write", "pwrite", 2).unwrap();
        // SAFETY: the child only touches the mapping and dies.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                for _ in 0..3 {
                    table.reach("write", "pwrite");
                }
                // SAFETY: ends the child without running anything of the test harness.
                unsafe { libc::_exit(0) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                use nix::sys::wait::{waitpid, WaitStatus};
                let status = waitpid(child, None).unwrap();
                assert!(
                    matches!(
                        status,
                        WaitStatus::Signaled(_, nix::sys::signal::Signal::SIGKILL, _)
                    ),
                    "{status:?}"
                );
            }
        }
        let seen = table.seen("write", "pwrite");
        assert_eq!((seen.reached, seen.left, seen.killed), (2, 0, 1));
        table.reach("write", "pwrite");
        assert_eq!(table.seen("write", "pwrite").reached, 3, "and we live");
    }

    #[test]
    fn a_death_arms_the_next_and_counts_from_there() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(&dir.path().join("points")).unwrap();
        table.arm("write", "pwrite", 1).unwrap();
        table.arm_then("write.pwrite", "recover.replay", 2).unwrap();
        table.reach("recover", "replay");
        // SAFETY: the child only touches the mapping and dies.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                table.reach("write", "pwrite");
                // SAFETY: ends the child without running anything of the test harness.
                unsafe { libc::_exit(0) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                nix::sys::wait::waitpid(child, None).unwrap();
            }
        }
        let next = table.seen("recover", "replay");
        assert_eq!((next.left, next.reached, next.since_death), (2, 1, 0));
        table.reach("recover", "replay");
        let next = table.seen("recover", "replay");
        assert_eq!((next.left, next.reached, next.since_death), (1, 2, 1));
    }

    #[test]
    fn who_dies_beside_another_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(&dir.path().join("points")).unwrap();
        table.arm("write", "pwrite", 1).unwrap();
        // SAFETY: the child only touches the mapping, has threads of its own, and dies.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let of_thread = |points: &'static [&'static str]| {
                    let reach = || points.iter().for_each(|point| table.reach("mkdir", point));
                    // The thread stays where it is.
                    std::thread::scope(|all| drop(all.spawn(reach).join()));
                };
                of_thread(&["start", "mkdirat"]);
                of_thread(&["start", "mkdirat", "end"]);
                table.reach("write", "start");
                table.reach("write", "pwrite");
                // SAFETY: ends the child without running anything of the test harness.
                unsafe { libc::_exit(0) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                nix::sys::wait::waitpid(child, None).unwrap();
            }
        }
        let mut beside = table.all();
        beside.retain(|seen| seen.beside > 0);
        let names: Vec<&str> = beside.iter().map(|seen| seen.name.as_str()).collect();
        assert_eq!(names, ["mkdir.mkdirat"]);
        assert_eq!(table.seen("write", "pwrite").killed, 1);
    }

    #[test]
    fn an_armed_point_can_kill_who_has_started_the_server() {
        use nix::sys::wait::{waitpid, WaitStatus};
        use nix::unistd::{fork, ForkResult};
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(&dir.path().join("points")).unwrap();
        table.arm("write", "pwrite", 1).unwrap();
        table.kill_the_keeper_at("write.pwrite").unwrap();
        // SAFETY: the children only touch the mapping and end.
        let keeper = unsafe {
            match fork().unwrap() {
                ForkResult::Child => {
                    if let Ok(ForkResult::Child) = fork() {
                        STARTED_BY.get_or_init(|| libc::getppid());
                        table.reach("write", "pwrite");
                        table.reach("write", "end");
                        libc::_exit(0);
                    }
                    libc::pause();
                    libc::_exit(1)
                }
                ForkResult::Parent { child } => child,
            }
        };
        let status = waitpid(keeper, None).unwrap();
        let by_kill = nix::sys::signal::Signal::SIGKILL;
        assert!(
            matches!(status, WaitStatus::Signaled(_, signal, _) if signal == by_kill),
            "{status:?}"
        );
        assert_eq!(table.seen("write", "pwrite").killed, 1);
    }

    #[test]
    fn a_table_that_is_full_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let table = Table::open(&dir.path().join("points")).unwrap();
        for n in 0..RECORDS {
            table.arm("opcode", &n.to_string(), 0).unwrap();
        }
        assert_eq!(table.all().len(), RECORDS);
        assert!(table.arm("opcode", "one-more", 1).is_err());
        assert!(table.arm("opcode", &"x".repeat(200), 1).is_err());
    }
}
