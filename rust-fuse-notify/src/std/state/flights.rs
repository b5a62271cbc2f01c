// SPDX-License-Identifier: GPL-2.0
//! Which requests the server has in its hands: what a dead instance was about to do when it died, and how a keeper sees
//! that a live one hangs.
//!
//! A slot of 64 bytes a worker, written before the work begins and cleared after the answer: five stores, and three
//! when it ends. Nothing is locked on that way.
//!
//! What is found in the slots when a state is opened are the *suspects*; [`super::trial`] runs them one at a time.
//!
//! The slots lie behind the INIT request, in bytes that earlier revisions leave zero and never read.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use super::header::{FLIGHTS_AT, HEADER_LEN, MAGIC, REFUSED_AT, WATCHED_AT};
use super::journal::worker;
use super::region::Region;
use super::trial::{Entry, Trials};
use super::StateError;
use crate::std::wire::{is_resent, original_id};

/// Slots; a request that finds none is executed without a mark.
pub(super) const CAPACITY: usize = 256;
pub(super) const SLOT_LEN: usize = 64;

// Offsets in a slot.
/// Original id; 0: the slot is free.
const ID: usize = 0;
/// Opcode, then the caller's pid.
const WHAT: usize = 8;
const NODEID: usize = 16;
/// In the low half how often an instance died of it while it ran alone; flags above.
const TRIALS: usize = 24;
/// It is being executed now, not waiting for its turn.
const RUNNING: usize = 32;
/// How many requests were answered with this slot.
const ANSWERED: usize = 40;

/// It was being executed when a keeper found that nothing was answered any more.
pub(super) const HUNG: u64 = 1 << 32;
/// It ran alone for long and nothing happened: others go first. How often stands above the flags, see [`super::trial`].
pub(super) const SLOW: u64 = 1 << 33;

const FREE: u8 = 0;
const TAKEN: u8 = 1;

/// Opcodes that may wait for as long as another application likes: no sign of a hang.
const WAITS: [u32; 2] = [SETLKW, POLL];
const SETLKW: u32 = 33;
const POLL: u32 = 40;

/// How many deaths while it ran alone cost a request an `EIO`, unless [`Flights::set_max_tries`] says otherwise.
pub const DEFAULT_MAX_TRIES: u32 = 3;

/// A request in the hands of a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InFlight {
    /// As it came, or the original id.
    pub unique: u64,
    /// What is asked for.
    pub opcode: u32,
    /// Inode that it is about.
    pub nodeid: u64,
    /// Thread that asks; 0: the kernel itself.
    pub pid: u32,
}

impl std::fmt::Display for InFlight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = super::opcodes::name(self.opcode);
        let (opcode, id) = (self.opcode, original_id(self.unique));
        let (nodeid, pid) = (self.nodeid, self.pid);
        write!(
            f,
            "{name} (opcode {opcode}, request {id}) of nodeid {nodeid}, asked by pid {pid}"
        )
    }
}

/// The marks of a state; see [`super::State::flights`].
#[derive(Debug)]
pub struct Flights {
    pub(super) region: Arc<Region>,
    owners: Vec<AtomicU8>,
    max_tries: AtomicU32,
    /// Whether there are suspects; [`Flights::trials`] is of no interest otherwise.
    pub(super) quarantine: AtomicBool,
    pub(super) trials: Mutex<Trials>,
    pub(super) turn: Condvar,
}

impl Flights {
    pub(super) fn open(region: Arc<Region>) -> Flights {
        let owners: Vec<_> = (0..CAPACITY).map(|_| AtomicU8::new(FREE)).collect();
        let mut trials = Trials::default();
        for (slot, owner) in owners.iter().enumerate() {
            let id = region.load_published(at(slot) + ID);
            if id != 0 {
                owner.store(TAKEN, Ordering::Relaxed);
                region.store(at(slot) + RUNNING, 0);
                trials.suspect(id, slot);
            }
        }
        Flights {
            quarantine: AtomicBool::new(trials.any()),
            trials: Mutex::new(trials),
            turn: Condvar::new(),
            max_tries: AtomicU32::new(DEFAULT_MAX_TRIES),
            region,
            owners,
        }
    }

    /// After this many deaths while it ran alone a request is refused with `EIO`; 0: never.
    pub fn set_max_tries(&self, tries: u32) {
        self.max_tries.store(tries, Ordering::Relaxed);
    }

    /// Says that this server marks its requests. Until then a keeper does not look for hangs here.
    pub fn watch(&self) {
        self.region.store(WATCHED_AT, 1);
    }

    /// The server begins to work on a request. Call it before anything is done, drop what it gives back after the
    /// answer was written. May wait: a request of which an earlier instance may have died runs alone.
    pub fn enter(&self, request: InFlight) -> Flight<'_> {
        let id = original_id(request.unique);
        let mut gated = false;
        if self.quarantine.load(Ordering::Acquire) {
            let max = self.max_tries.load(Ordering::Relaxed);
            match self.gate(id, is_resent(request.unique), max) {
                Entry::Trial(slot) => {
                    self.region.publish(at(slot) + RUNNING, 1);
                    return self.flight(Some(slot), Kind::Trial);
                }
                Entry::Refused { slot, tries } => {
                    tracing::error!(
                        "{request}: the server died {tries} times while it did this and nothing else; it gets EIO now"
                    );
                    let refused = self.region.load(REFUSED_AT);
                    self.region.store(REFUSED_AT, refused + 1);
                    return self.flight(Some(slot), Kind::Refused);
                }
                Entry::Slow(slot) => {
                    self.region.publish(at(slot) + RUNNING, 1);
                    return self.flight(Some(slot), Kind::Gated);
                }
                Entry::Other => gated = true,
                Entry::Over => {}
            }
        }
        let slot = self.claim();
        if let Some(slot) = slot {
            let base = at(slot);
            let what = u64::from(request.opcode) << 32 | u64::from(request.pid);
            self.region.store(base + WHAT, what);
            self.region.store(base + NODEID, request.nodeid);
            self.region.store(base + TRIALS, 0);
            self.region.store(base + RUNNING, 1);
            self.region.publish(base + ID, id);
        }
        self.flight(slot, if gated { Kind::Gated } else { Kind::Plain })
    }

    fn flight(&self, slot: Option<usize>, kind: Kind) -> Flight<'_> {
        Flight {
            flights: self,
            slot,
            kind,
        }
    }

    fn claim(&self) -> Option<usize> {
        let first = worker() as usize % CAPACITY;
        (first..CAPACITY).chain(0..first).find(|slot| {
            self.owners[*slot]
                .compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        })
    }

    pub(super) fn flags_and_tries(&self, slot: usize) -> u64 {
        self.region.load(at(slot) + TRIALS)
    }

    pub(super) fn set_flags_and_tries(&self, slot: usize, value: u64) {
        self.region.publish(at(slot) + TRIALS, value);
    }

    pub(super) fn may_wait(&self, slot: usize) -> bool {
        let opcode = (self.region.load(at(slot) + WHAT) >> 32) as u32;
        WAITS.contains(&opcode)
    }

    /// The slot is nobody's any more.
    pub(super) fn clear(&self, slot: usize) {
        self.region.publish(at(slot) + ID, 0);
        self.region.store(at(slot) + RUNNING, 0);
        self.owners[slot].store(FREE, Ordering::Release);
    }
}

fn at(slot: usize) -> usize {
    FLIGHTS_AT + slot * SLOT_LEN
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Nobody counts it.
    Plain,
    /// Began while there were suspects.
    Gated,
    /// A suspect, alone.
    Trial,
    /// A suspect that is not tried again.
    Refused,
}

/// A request that is being worked on; dropping it says that it was answered.
#[derive(Debug)]
#[must_use]
pub struct Flight<'a> {
    flights: &'a Flights,
    slot: Option<usize>,
    kind: Kind,
}

impl Flight<'_> {
    /// The server has died of this request too often: answer `EIO` and do nothing.
    pub fn is_refused(&self) -> bool {
        self.kind == Kind::Refused
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        // Unwinding is a way to die: what it was about stays written.
        if std::thread::panicking() {
            return;
        }
        let flights = self.flights;
        // Before the slot is another's.
        match self.kind {
            Kind::Plain | Kind::Refused => {}
            Kind::Gated => flights.answered(None),
            Kind::Trial => flights.answered(self.slot),
        }
        if let Some(slot) = self.slot {
            let answered = flights.region.load(at(slot) + ANSWERED);
            flights.region.store(at(slot) + ANSWERED, answered + 1);
            flights.clear(slot);
        }
        if self.kind == Kind::Refused {
            flights.settle_quarantine();
        }
    }
}

/// What a keeper sees of a server that marks its requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pulse {
    /// The server does mark its requests.
    pub watched: bool,
    /// Requests answered since the mount.
    pub answered: u64,
    /// Requests refused because the server kept dying of them.
    pub refused: u64,
    /// What is being executed, but for what may wait for an application (`SETLKW`, `POLL`).
    pub in_hands: Vec<InFlight>,
    /// How many of the latter are being executed.
    pub may_wait: usize,
}

/// Reads the marks of a memfd that another process uses; an empty one has none.
///
/// # Errors
/// [`StateError::Io`].
pub fn pulse(fd: BorrowedFd<'_>) -> Result<Pulse, StateError> {
    let mut page = [0; HEADER_LEN];
    let mut slots = vec![0; CAPACITY * SLOT_LEN];
    for (buffer, at) in [(&mut page[..], 0), (&mut slots[..], FLIGHTS_AT)] {
        nix::sys::uio::pread(fd, buffer, at as i64).map_err(StateError::io("reading"))?;
    }
    if word(&page, 0) != MAGIC {
        return Ok(Pulse::default());
    }
    let mut pulse = Pulse {
        watched: word(&page, WATCHED_AT) != 0,
        refused: word(&page, REFUSED_AT),
        ..Pulse::default()
    };
    for slot in slots.chunks_exact(SLOT_LEN) {
        pulse.answered = pulse.answered.wrapping_add(word(slot, ANSWERED));
        let what = word(slot, WHAT);
        let flight = InFlight {
            unique: word(slot, ID),
            opcode: (what >> 32) as u32,
            nodeid: word(slot, NODEID),
            pid: what as u32,
        };
        let running = flight.unique != 0 && word(slot, RUNNING) != 0;
        match WAITS.contains(&flight.opcode) {
            _ if !running => {}
            true => pulse.may_wait += 1,
            false => pulse.in_hands.push(flight),
        }
    }
    Ok(pulse)
}

/// Writes down that the server hangs with what it has in its hands now. Kill it first.
///
/// # Errors
/// [`StateError::Io`].
pub fn blame(fd: BorrowedFd<'_>, hung: &[InFlight]) -> Result<(), StateError> {
    let mut slots = vec![0; CAPACITY * SLOT_LEN];
    nix::sys::uio::pread(fd, &mut slots, FLIGHTS_AT as i64).map_err(StateError::io("reading"))?;
    for (number, slot) in slots.chunks_exact(SLOT_LEN).enumerate() {
        let id = word(slot, ID);
        if id != 0 && hung.iter().any(|flight| flight.unique == id) {
            let flags = word(slot, TRIALS) | HUNG;
            let at = at(number) + TRIALS;
            nix::sys::uio::pwrite(fd, &flags.to_ne_bytes(), at as i64)
                .map_err(StateError::io("writing"))?;
        }
    }
    Ok(())
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap_or_default())
}
