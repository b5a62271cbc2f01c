// SPDX-License-Identifier: GPL-2.0
//! What is found again, and memfds that are not states.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;

use super::*;

pub(super) const IDENTITY: Identity = Identity([7, 8]);
pub(super) const SMALL: Config = Config {
    nodes: 300,
    handles: 20,
    journal: 4,
    arena_pages: 0,
};

pub(super) fn node(which: u64) -> NewNode {
    NewNode {
        handle: FileHandle::new(1, &which.to_ne_bytes()).unwrap(),
        domain: 0,
        generation: which as u32,
        ino: 1000 + which,
        mode: libc::S_IFREG,
        flags: NodeFlags::NONE,
        aux: [which; 4],
    }
}

pub(super) fn open(fd: &OwnedFd) -> Result<State, StateError> {
    State::open(fd.try_clone().unwrap(), IDENTITY, &SMALL)
}

pub(super) fn report(lowest_owed: Option<u64>) -> Report {
    Report {
        cookie: 1 << 62,
        epoch: 1,
        replayed: 1,
        confirmed: 1,
        revoked: 0,
        held: 0,
        lowest_owed,
        hold_ns: 0,
        root_ns: 0,
        replay_ns: 0,
        settle_ns: 0,
    }
}

/// A memfd of what `change` makes of a good state.
fn altered(change: impl FnOnce(&File)) -> OwnedFd {
    let fd = State::create_memfd().unwrap();
    drop(open(&fd).unwrap());
    let file = File::from(fd);
    change(&file);
    file.into()
}

#[test]
fn a_state_is_found_again() {
    let fd = State::create_memfd().unwrap();
    assert_eq!(State::peek(fd.as_fd()).unwrap(), Stage::BeforeInit);
    let (nodeid, fh);
    {
        let state = open(&fd).unwrap();
        assert!(state.is_fresh());
        state.nodes().set_root(&node(0));
        nodeid = state.nodes().lookup(&node(5)).unwrap().nodeid;
        let new = NewHandle {
            nodeid,
            flags: 2,
            kind: HandleKind::File,
            opener: 1 << 63 | 44,
            aux: [1, 2],
        };
        fh = state.handles().insert(&new).unwrap();
        let intent = Intent {
            opcode: 9,
            names: [b"a", b""],
            before: &[1; 480],
            ..Intent::default()
        };
        let mut slot = state.journal().begin(44, &intent).unwrap();
        slot.outcome(&Ok(Success {
            nodeid,
            fh,
            payload: vec![3; 128],
        }))
        .unwrap();
        drop(state.journal().begin(45, &intent).unwrap());
        state.init().set_answered();
    }
    assert_eq!(State::peek(fd.as_fd()).unwrap(), Stage::Serving);
    let state = open(&fd).unwrap();
    assert!(!state.is_fresh());
    assert_eq!(state.nodes().get(1).unwrap().info, node(0));
    let found = state.nodes().get(nodeid).unwrap();
    assert_eq!((found.lookups, found.info), (1, node(5)));
    assert_eq!(state.nodes().find(0, &node(5).handle), Some(found));
    assert_eq!(state.handles().get(fh).unwrap().info.aux, [1, 2]);
    assert_eq!(state.handles().opened_by(5 << 48 | 44).unwrap().fh, fh);
    let answer = Success {
        nodeid,
        fh,
        payload: vec![3; 128],
    };
    assert_eq!(
        state.journal().lookup(1 << 63 | 44),
        Some(Recorded::Outcome(Ok(answer)))
    );
    let open = state.journal().unresolved();
    assert_eq!(open.len(), 1);
    assert_eq!(
        (open[0].id, open[0].opcode, &open[0].names[0][..]),
        (45, 9, &b"a"[..])
    );
    assert_eq!(open[0].before, [1; 480]);
}

#[test]
fn what_is_not_our_state_is_refused_and_not_changed() {
    let zeroes = altered(|file| file.write_all_at(&[0xff], 0).unwrap());
    assert!(matches!(open(&zeroes), Err(StateError::Foreign(_))));
    // The revision, which nothing but the checksum covers.
    let checksum = altered(|file| file.write_all_at(&[7], 20).unwrap());
    assert!(matches!(
        open(&checksum),
        Err(StateError::Foreign("its checksum is wrong"))
    ));
    let no_magic = altered(|file| {
        file.write_all_at(&[0; 8], 0).unwrap();
        file.write_all_at(&[0; 8], header::NODES_USED_AT as u64)
            .unwrap();
    });
    assert!(
        open(&no_magic).is_ok(),
        "as if killed while it was laid out"
    );
    let no_magic_but_used = altered(|file| {
        file.write_all_at(&[0; 8], 0).unwrap();
        file.write_all_at(&[1], 168).unwrap();
    });
    assert!(matches!(
        open(&no_magic_but_used),
        Err(StateError::Foreign(_))
    ));

    let good = altered(|_| ());
    let other = State::open(good.try_clone().unwrap(), Identity([1, 1]), &SMALL);
    assert!(matches!(other, Err(StateError::WrongIdentity { .. })));
    assert!(open(&good).is_ok());

    let file = tempfile();
    file.write_all_at(&[3; 10000], 0).unwrap();
    assert!(matches!(open(&file.into()), Err(StateError::Foreign(_))));
    let file = tempfile();
    let fd = OwnedFd::from(file.try_clone().unwrap());
    assert!(matches!(open(&fd), Err(StateError::NoSeals(_))));
    assert_eq!(
        file.metadata().unwrap().size(),
        0,
        "a file that cannot be a state was resized"
    );
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    assert!(matches!(open(&pipe), Err(StateError::Foreign(_))));
}

fn tempfile() -> File {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_TMPFILE;
    File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(std::env::temp_dir())
        .unwrap()
}

/// Writes a header with this version and a right checksum.
fn with_version(version: u32) -> OwnedFd {
    altered(|file| {
        let mut fixed = [0; 56];
        file.read_exact_at(&mut fixed, 8).unwrap();
        fixed[8..12].copy_from_slice(&version.to_ne_bytes());
        let seed = 0xcbf2_9ce4_8422_2325_u64;
        let sum = fixed[8..].iter().fold(seed, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
        fixed[..8].copy_from_slice(&sum.to_ne_bytes());
        file.write_all_at(&fixed, 8).unwrap();
    })
}

#[test]
fn versions() {
    assert!(
        open(&with_version(header::VERSION)).is_ok(),
        "the test computes the checksum wrongly"
    );
    let newer = open(&with_version(header::VERSION + 1)).unwrap_err();
    assert!(matches!(newer, StateError::Newer { .. }), "{newer}");
    let older = open(&with_version(0)).unwrap_err();
    assert!(matches!(older, StateError::Older { .. }), "{older}");
    assert!(newer.is_discardable() && older.is_discardable());
}

#[test]
fn damaged_slots_are_refused() {
    let layout = Layout::of(&SMALL).unwrap();
    let store = |offset: usize, word: u64| {
        let fd = altered(|file| {
            file.write_all_at(&10_u64.to_ne_bytes(), header::NODES_USED_AT as u64)
                .unwrap();
            file.write_all_at(&10_u64.to_ne_bytes(), header::HANDLES_USED_AT as u64)
                .unwrap();
            file.write_all_at(&50_u64.to_ne_bytes(), header::STAMP_AT as u64)
                .unwrap();
            file.write_all_at(&word.to_ne_bytes(), offset as u64)
                .unwrap();
        });
        open(&fd).map(drop)
    };
    let third = layout.nodes + 3 * nodes::SLOT_LEN;
    assert!(store(third, 49 << 32 | 3).is_ok());
    for bad in [49 << 32 | 4, 50 << 32 | 3, 1] {
        assert!(
            matches!(store(third, bad), Err(StateError::Damaged { slot: 3, .. })),
            "{bad:#x}"
        );
    }
    let third = layout.handles + 3 * handles::SLOT_LEN;
    assert!(store(third, 49 << 32 | 3).is_ok());
    for bad in [49 << 32 | 4, 50 << 32 | 3, 3] {
        assert!(
            matches!(store(third, bad), Err(StateError::Damaged { slot: 3, .. })),
            "{bad:#x}"
        );
    }
    let third = layout.journal + 3 * journal::SLOT_LEN;
    assert!(store(third, 77 << 8 | 1).is_ok());
    for bad in [77 << 8 | 3, 1, 77 << 8, u64::MAX << 8 | 1] {
        assert!(
            matches!(store(third, bad), Err(StateError::Damaged { slot: 3, .. })),
            "{bad:#x}"
        );
    }
}

#[test]
fn a_state_in_use_is_refused() {
    let fd = State::create_memfd().unwrap();
    let _state = open(&fd).unwrap();
    // SAFETY: the child calls nothing that another thread of this process could hold a lock of.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let code = match lock(fd.as_fd()) {
                Err(StateError::InUse { pid }) if pid == nix::unistd::getppid().as_raw() => 0,
                _ => 1,
            };
            // SAFETY: ends the child without running anything of the test harness.
            unsafe { libc::_exit(code) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let status = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
    }
}

#[test]
fn nobody_can_shrink_it() {
    let fd = State::create_memfd().unwrap();
    let _state = open(&fd).unwrap();
    assert_eq!(
        nix::unistd::ftruncate(&fd, 0),
        Err(nix::errno::Errno::EPERM)
    );
}

#[test]
fn capacities_are_checked() {
    let fd = State::create_memfd().unwrap();
    let config = Config {
        nodes: u32::MAX,
        ..SMALL
    };
    assert!(matches!(
        State::open(fd, IDENTITY, &config),
        Err(StateError::Capacity { .. })
    ));
}
proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever the memfd holds, opening it ends, and what opens can be walked.
    #[test]
    fn hostile_states_do_no_harm(
        words in proptest::collection::vec((0_u64..0x20, any::<u64>(), 0..4_u32), 0..40),
        slots in proptest::collection::vec((0_usize..3, 0_usize..4, 0_usize..32, any::<u64>(), 0..3_u32), 0..60),
    ) {
        let layout = Layout::of(&SMALL).unwrap();
        let fd = altered(|file| {
            for (at, word, shrink) in words {
                // Past the fixed header, or every case would be refused there.
                file.write_all_at(&(word >> (shrink * 16)).to_ne_bytes(), 128 + at * 8).unwrap();
            }
            for (table, slot, at, word, shrink) in slots {
                let (base, len) = [
                    (layout.journal, journal::SLOT_LEN),
                    (layout.handles, handles::SLOT_LEN),
                    (layout.nodes, nodes::SLOT_LEN),
                ][table];
                let offset = base + slot * len + at * 8 % len;
                file.write_all_at(&(word >> (shrink * 24)).to_ne_bytes(), offset as u64).unwrap();
            }
        });
        if let Ok(state) = open(&fd) {
            state.nodes().for_each(|node| { state.nodes().get(node.nodeid); });
            state.handles().for_each(|handle| { state.handles().get(handle.fh); });
            for intent in state.journal().unresolved() {
                state.journal().resume(intent.id).unwrap().cancel();
            }
            state.settle(&report(None), |_| Keep::Drop);
            prop_assert!(state.nodes().lookup(&node(1)).is_ok());
        }
    }
}
