// SPDX-License-Identifier: GPL-2.0
//! What the memfd looks like, and the check that it is ours.
//!
//! ```text
//! 0        header: magic, version, checksum, identity, capacities (fixed); counters (change)
//! 0x1000   the INIT reply
//! 0x2000   the INIT request, read straight into here
//! 0xa000   the requests in flight
//! 0x12000  journal | handle table | node table | the server's arena, each from a page boundary
//! ```
//!
//! # Compatibility
//!
//! A server is upgraded, and downgraded again, while its state lives on. So each version of this crate reads what the
//! next one and the previous one write:
//!
//! 1. The *revision* may grow with every release. A new revision may give a meaning to bytes that the previous one left
//!    zero and does not read; zero must mean "as before". It may not make a reader of the previous revision misread
//!    anything: sizes, places and states of slots stay. So both read both, and nothing is converted.
//! 2. What does not go that way is a new *layout*, in two releases: the first reads the new layout and still writes the
//!    old one, the second writes the new one and still reads the old one.
//! 3. The header page and the places of the INIT pair, at offsets 0 to 0x12000, keep their form in every layout: that
//!    is how a layout is recognised, and what [`super::State::discard`] carries over.
//!
//! `compat_tests.rs` holds both against a state that the previous version wrote, and a reader of the previous version
//! against ours. A server's own records in the journal (opcodes and arguments of intents) follow the same rule.

use std::io;
use std::os::fd::BorrowedFd;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::region::Region;
use super::{handles, journal, nodes, Config, StateError};
use crate::std::wire::Identity;

/// "FUSErst" and the byte order.
pub(super) const MAGIC: u64 = u64::from_ne_bytes(*b"FUSErst\x01");
/// In its place while a state is being discarded: the INIT pair is good, nothing else is.
pub(super) const DISCARDING: u64 = u64::from_ne_bytes(*b"FUSEdsc\x01");
/// The layout that is written; changes as the second rule says.
pub(super) const VERSION: u32 = 1;
/// Layouts that are read.
const READABLE: std::ops::RangeInclusive<u32> = 1..=1;
/// The revision of the layout, see the first rule. 1: [`DISCARDED_BELOW_AT`]. 2: [`FLIGHTS_AT`], and the arena; a state
/// that has one is for servers that need it, and is refused by revision 1 for its size.
const REVISION: u32 = 2;

/// Offset of the magic: stored last, so a state that has it is complete.
pub(super) const MAGIC_AT: usize = 0;
/// Offset of [`Fixed`].
const FIXED_AT: usize = 8;
/// Offset of the counter that makes nodeids and handles unique.
pub(super) const STAMP_AT: usize = 128;
/// Offset of the number of node slots ever used.
pub(super) const NODES_USED_AT: usize = 136;
/// Offset of the number of handle slots ever used.
pub(super) const HANDLES_USED_AT: usize = 144;
/// Offset of the length of the INIT request; 0: none was read.
pub(super) const REQUEST_LEN_AT: usize = 152;
/// Offset of the length of the INIT reply; 0: there is none yet.
pub(super) const REPLY_LEN_AT: usize = 160;
/// Offset of the mark that the kernel has the reply.
pub(super) const ANSWERED_AT: usize = 168;
/// Offset of the id below which nothing is known of requests that a dead server had read; 0: no state was discarded.
/// Since revision 1.
pub(super) const DISCARDED_BELOW_AT: usize = 176;
/// Offset of the number of requests that were refused because servers died of them. Since revision 2.
pub(super) const REFUSED_AT: usize = 184;
/// Offset of the mark that the server keeps [`super::Flights`]. Since revision 2.
pub(super) const WATCHED_AT: usize = 192;
/// Bytes of the header, all of which are zero in an empty state.
pub(super) const HEADER_LEN: usize = 4096;

/// Offset of the INIT reply.
pub(super) const REPLY_AT: usize = 0x1000;
/// Room for the INIT reply, in bytes.
pub(super) const REPLY_MAX: usize = 0x1000;
/// Offset of the INIT request.
pub(super) const REQUEST_AT: usize = 0x2000;
/// Room for the INIT request; a read of the device wants at least 8 KiB, more than the message has. Up to revision 1
/// twice as much, of which the second half stayed zero.
pub(super) const REQUEST_MAX: usize = 0x8000;
/// Offset of the requests in flight. Since revision 2.
pub(super) const FLIGHTS_AT: usize = 0xa000;
pub(super) const TABLES_AT: usize = 0x12000;

const PAGE: usize = 4096;
/// 1 TiB.
const MAX_ARENA_PAGES: u32 = 1 << 28;

/// The part of the header that never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Fixed {
    checksum: u64,
    version: u32,
    /// In the spare bytes of revision 0.
    revision: u32,
    identity: [u64; 2],
    nodes: u32,
    handles: u32,
    journal: u32,
    /// In the spare bytes of revision 1.
    arena_pages: u32,
    len: u64,
}

/// Where the tables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) config: Config,
    pub(super) journal: usize,
    pub(super) handles: usize,
    pub(super) nodes: usize,
    pub(super) arena: usize,
    pub(super) len: usize,
}

impl Layout {
    pub(super) fn of(config: &Config) -> Result<Layout, StateError> {
        for (table, capacity, max) in [
            ("nodes", config.nodes, nodes::MAX_CAPACITY),
            ("handles", config.handles, handles::MAX_CAPACITY),
            ("journal", config.journal, journal::MAX_CAPACITY),
            // An arena may be missing.
            ("arena", config.arena_pages.max(2), MAX_ARENA_PAGES),
        ] {
            if !(2..=max).contains(&capacity) {
                return Err(StateError::Capacity {
                    table,
                    capacity,
                    max,
                });
            }
        }
        let pages = |slots: u32, size: usize| (slots as usize * size).next_multiple_of(4096);
        let journal = TABLES_AT;
        let handles = journal + pages(config.journal, journal::SLOT_LEN);
        let nodes = handles + pages(config.handles, handles::SLOT_LEN);
        let arena = nodes + pages(config.nodes, nodes::SLOT_LEN);
        let len = arena + pages(config.arena_pages, PAGE);
        Ok(Layout {
            config: *config,
            journal,
            handles,
            nodes,
            arena,
            len,
        })
    }

    fn fixed(&self, identity: Identity) -> Fixed {
        let mut fixed = Fixed {
            checksum: 0,
            version: VERSION,
            revision: REVISION,
            identity: identity.0,
            nodes: self.config.nodes,
            handles: self.config.handles,
            journal: self.config.journal,
            arena_pages: self.config.arena_pages,
            len: self.len as u64,
        };
        fixed.checksum = checksum(&fixed);
        fixed
    }

    /// The layout that fills a file of `size` bytes, near to `config`.
    pub(super) fn filling(config: &Config, size: u64) -> Option<Layout> {
        let size = usize::try_from(size).ok()?;
        let mut config = *config;
        loop {
            // As few nodes as possible, to see where they begin.
            config.nodes = 2;
            let nodes = Layout::of(&config).ok()?.nodes;
            let slots = size
                .checked_sub(nodes + config.arena_pages as usize * PAGE)
                .map_or(0, |len| len / nodes::SLOT_LEN);
            if slots >= 16 {
                config.nodes = u32::try_from(slots).ok()?;
                return Layout::of(&config).ok().filter(|found| found.len == size);
            }
            if config.handles + config.journal <= 4 {
                return None;
            }
            config.handles = (config.handles / 2).max(2);
            config.journal = (config.journal / 2).max(2);
        }
    }

    /// Makes an empty region of this layout a state of `identity`.
    pub(super) fn write(&self, region: &Region, identity: Identity) {
        region.put(FIXED_AT, &self.fixed(identity));
        region.store(STAMP_AT, 1);
        self.finish(region);
    }

    /// Makes a used region an empty state of `identity`, but for the INIT pair; [`Layout::finish`] makes it valid.
    pub(super) fn write_anew(
        &self,
        region: &Region,
        identity: Identity,
        stamp: u64,
    ) -> io::Result<()> {
        region.publish(MAGIC_AT, DISCARDING);
        region.punch(TABLES_AT, self.len - TABLES_AT)?;
        let kept = [REQUEST_LEN_AT, REPLY_LEN_AT, ANSWERED_AT];
        // The stamp is never smaller than it was, also if this ends here and is begun again.
        region.store(STAMP_AT, stamp);
        for at in (8..HEADER_LEN).step_by(8) {
            if at != STAMP_AT && !kept.contains(&at) {
                region.store(at, 0);
            }
        }
        region.put(FIXED_AT, &self.fixed(identity));
        Ok(())
    }

    /// The store that makes a state of what was written.
    pub(super) fn finish(&self, region: &Region) {
        region.publish(MAGIC_AT, MAGIC);
    }
}

/// FNV-1a over everything but the checksum itself. It is there against files that are not ours, not against an
/// attacker: whoever can write the memfd can do as the server can.
fn checksum(fixed: &Fixed) -> u64 {
    let seed = 0xcbf2_9ce4_8422_2325;
    fixed.as_bytes()[8..].iter().fold(seed, |sum: u64, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// What a memfd holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing, or what a server left that was killed before its state was complete.
    Empty,
    /// What a server left that was killed while it discarded a state.
    Discarding,
    /// A complete state.
    State {
        layout: Layout,
        identity: Identity,
        answered: bool,
        /// The answer to INIT is kept, whether the kernel has it or not.
        replied: bool,
    },
}

/// Looks at a memfd of `size` bytes without changing it.
pub(super) fn inspect(fd: BorrowedFd<'_>, size: u64) -> Result<Found, StateError> {
    if size == 0 {
        return Ok(Found::Empty);
    }
    let mut page = [0; HEADER_LEN];
    let got =
        nix::sys::uio::pread(fd, &mut page, 0).map_err(StateError::io("reading the header of"))?;
    if got < HEADER_LEN {
        return Err(StateError::Foreign("it is shorter than a header"));
    }
    let word = |at: usize| u64::from_ne_bytes(page[at..at + 8].try_into().unwrap_or_default());
    let rest = FIXED_AT + size_of::<Fixed>();
    let Ok(fixed) = Fixed::read_from_bytes(&page[FIXED_AT..rest]) else {
        return Err(StateError::Foreign("it is shorter than a header"));
    };
    if word(MAGIC_AT) == 0 {
        // Killed while it was laid out: whatever was stored is a part of the fixed header or the first stamp.
        let others_are_zero = (rest..HEADER_LEN)
            .step_by(8)
            .all(|at| word(at) == 0 || (at == STAMP_AT && word(at) == 1));
        if others_are_zero && [0, VERSION].contains(&fixed.version) {
            return Ok(Found::Empty);
        }
        return Err(StateError::Foreign("it has no magic number"));
    }
    if word(MAGIC_AT) == DISCARDING {
        return Ok(Found::Discarding);
    }
    if word(MAGIC_AT) != MAGIC {
        return Err(StateError::Foreign("its magic number is another"));
    }
    if fixed.checksum != checksum(&fixed) {
        return Err(StateError::Foreign("its checksum is wrong"));
    }
    if fixed.version > *READABLE.end() {
        return Err(StateError::Newer {
            found: fixed.version,
            ours: VERSION,
        });
    }
    if fixed.version < *READABLE.start() {
        return Err(StateError::Older {
            found: fixed.version,
            ours: VERSION,
        });
    }
    let layout = Layout::of(&Config {
        nodes: fixed.nodes,
        handles: fixed.handles,
        journal: fixed.journal,
        arena_pages: fixed.arena_pages,
    })?;
    if layout.len as u64 != fixed.len || fixed.len != size {
        return Err(StateError::Foreign("its size does not fit its header"));
    }
    Ok(Found::State {
        layout,
        identity: Identity(fixed.identity),
        answered: word(ANSWERED_AT) != 0,
        replied: word(REPLY_LEN_AT) != 0,
    })
}
