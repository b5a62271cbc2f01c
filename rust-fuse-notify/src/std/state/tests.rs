// SPDX-License-Identifier: GPL-2.0
//! The tables against models, and memfds that are not states.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use proptest::prelude::*;

use super::*;

pub(super) const IDENTITY: Identity = Identity([7, 8]);
pub(super) const SMALL: Config = Config { nodes: 300, handles: 20, journal: 4 };

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

fn report(lowest_owed: Option<u64>) -> Report {
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
        let new = NewHandle { nodeid, flags: 2, kind: HandleKind::File, opener: 1 << 63 | 44, aux: [1, 2] };
        fh = state.handles().insert(&new).unwrap();
        let intent = Intent { opcode: 9, names: [b"a", b""], before: &[1; 480], ..Intent::default() };
        let mut slot = state.journal().begin(44, &intent).unwrap();
        slot.outcome(&Ok(Success { nodeid, fh, payload: vec![3; 128] })).unwrap();
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
    let answer = Success { nodeid, fh, payload: vec![3; 128] };
    assert_eq!(state.journal().lookup(1 << 63 | 44), Some(Recorded::Outcome(Ok(answer))));
    let open = state.journal().unresolved();
    assert_eq!(open.len(), 1);
    assert_eq!((open[0].id, open[0].opcode, &open[0].names[0][..]), (45, 9, &b"a"[..]));
    assert_eq!(open[0].before, [1; 480]);
}

#[test]
fn what_is_not_our_state_is_refused_and_not_changed() {
    let zeroes = altered(|file| file.write_all_at(&[0xff], 0).unwrap());
    assert!(matches!(open(&zeroes), Err(StateError::Foreign(_))));
    // A spare byte, which nothing but the checksum covers.
    let checksum = altered(|file| file.write_all_at(&[1], 20).unwrap());
    assert!(matches!(open(&checksum), Err(StateError::Foreign("its checksum is wrong"))));
    let no_magic = altered(|file| {
        file.write_all_at(&[0; 8], 0).unwrap();
        file.write_all_at(&[0; 8], header::NODES_USED_AT as u64).unwrap();
    });
    assert!(open(&no_magic).is_ok(), "as if killed while it was laid out");
    let no_magic_but_used = altered(|file| {
        file.write_all_at(&[0; 8], 0).unwrap();
        file.write_all_at(&[1], 168).unwrap();
    });
    assert!(matches!(open(&no_magic_but_used), Err(StateError::Foreign(_))));

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
    assert_eq!(file.metadata().unwrap().size(), 0, "a file that cannot be a state was resized");
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    assert!(matches!(open(&pipe), Err(StateError::Foreign(_))));
}

fn tempfile() -> File {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = libc::O_TMPFILE;
    File::options().read(true).write(true).custom_flags(flags).open(std::env::temp_dir()).unwrap()
}

/// Writes a header with this version and a right checksum.
fn with_version(version: u32) -> OwnedFd {
    altered(|file| {
        let mut fixed = [0; 56];
        file.read_exact_at(&mut fixed, 8).unwrap();
        fixed[8..12].copy_from_slice(&version.to_ne_bytes());
        let seed = 0xcbf2_9ce4_8422_2325_u64;
        let sum = fixed[8..].iter().fold(seed, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
        fixed[..8].copy_from_slice(&sum.to_ne_bytes());
        file.write_all_at(&fixed, 8).unwrap();
    })
}

#[test]
fn versions() {
    assert!(open(&with_version(header::VERSION)).is_ok(), "the test computes the checksum wrongly");
    assert!(matches!(open(&with_version(header::VERSION + 1)), Err(StateError::Newer { .. })));
    assert!(matches!(open(&with_version(0)), Err(StateError::Older { .. })));
}

#[test]
fn damaged_slots_are_refused() {
    let layout = Layout::of(&SMALL).unwrap();
    let store = |offset: usize, word: u64| {
        let fd = altered(|file| {
            file.write_all_at(&10_u64.to_ne_bytes(), header::NODES_USED_AT as u64).unwrap();
            file.write_all_at(&10_u64.to_ne_bytes(), header::HANDLES_USED_AT as u64).unwrap();
            file.write_all_at(&50_u64.to_ne_bytes(), header::STAMP_AT as u64).unwrap();
            file.write_all_at(&word.to_ne_bytes(), offset as u64).unwrap();
        });
        open(&fd).map(drop)
    };
    let third = layout.nodes + 3 * nodes::SLOT_LEN;
    assert!(store(third, 49 << 32 | 3).is_ok());
    for bad in [49 << 32 | 4, 50 << 32 | 3, 1] {
        assert!(matches!(store(third, bad), Err(StateError::Damaged { slot: 3, .. })), "{bad:#x}");
    }
    let third = layout.handles + 3 * handles::SLOT_LEN;
    assert!(store(third, 49 << 32 | 3).is_ok());
    for bad in [49 << 32 | 4, 50 << 32 | 3, 3] {
        assert!(matches!(store(third, bad), Err(StateError::Damaged { slot: 3, .. })), "{bad:#x}");
    }
    let third = layout.journal + 3 * journal::SLOT_LEN;
    assert!(store(third, 77 << 8 | 1).is_ok());
    for bad in [77 << 8 | 3, 1, 77 << 8, u64::MAX << 8 | 1] {
        assert!(matches!(store(third, bad), Err(StateError::Damaged { slot: 3, .. })), "{bad:#x}");
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
    assert_eq!(nix::unistd::ftruncate(&fd, 0), Err(nix::errno::Errno::EPERM));
}

#[test]
fn capacities_are_checked() {
    let fd = State::create_memfd().unwrap();
    let config = Config { nodes: u32::MAX, ..SMALL };
    assert!(matches!(State::open(fd, IDENTITY, &config), Err(StateError::Capacity { .. })));
}

#[test]
fn nodeids_are_never_given_to_another_file() {
    let fd = State::create_memfd().unwrap();
    let mut seen = BTreeMap::new();
    for round in 0..3_u64 {
        let state = open(&fd).unwrap();
        for which in 0..500 {
            let new = state.nodes().lookup(&node(which * 3 + round)).unwrap();
            assert_eq!(seen.insert(new.nodeid, which * 3 + round), None);
            assert!(state.nodes().forget(new.nodeid, 1).is_some());
            assert!(state.nodes().remove(new.nodeid));
            assert_eq!(state.nodes().get(new.nodeid), None);
        }
    }
}

#[test]
fn full_tables_say_so_and_go_on() {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    let all: Vec<_> = (0..298).map(|which| state.nodes().lookup(&node(which)).unwrap().nodeid).collect();
    assert!(matches!(state.nodes().lookup(&node(999)), Err(StateError::Full { capacity: 300, .. })));
    assert_eq!(state.nodes().lookup(&node(3)).unwrap().lookups, 2);
    state.nodes().forget(all[7], 1);
    assert!(state.nodes().remove(all[7]));
    assert!(state.nodes().lookup(&node(999)).is_ok());

    let new = NewHandle { nodeid: 1, flags: 0, kind: HandleKind::Directory, opener: 0, aux: [0; 2] };
    let fhs: BTreeSet<_> = (0..20).map(|_| state.handles().insert(&new).unwrap()).collect();
    assert_eq!(fhs.len(), 20);
    assert!(matches!(state.handles().insert(&new), Err(StateError::Full { capacity: 20, .. })));
    assert!(state.handles().remove(*fhs.first().unwrap()).is_some());
    assert!(!fhs.contains(&state.handles().insert(&new).unwrap()));
}

#[test]
fn settle_makes_the_table_the_replayed_set() {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    state.nodes().set_root(&node(0));
    let ids: Vec<u64> = (1..=5).map(|which| state.nodes().lookup(&node(which)).unwrap().nodeid).collect();
    let [confirmed, dropped, owed, kept, stale] = ids[..] else { panic!() };
    let handle = |nodeid| NewHandle { nodeid, flags: 0, kind: HandleKind::File, opener: 0, aux: [0; 2] };
    let stays = state.handles().insert(&handle(confirmed)).unwrap();
    let goes = state.handles().insert(&handle(dropped)).unwrap();
    for (id, nodeid) in [(10, stale), (20, owed)] {
        let mut slot = state.journal().begin(id, &Intent::default()).unwrap();
        slot.outcome(&Ok(Success { nodeid, ..Success::default() })).unwrap();
    }
    state.nodes().begin_replay();
    assert!(state.nodes().confirm(1, 1));
    assert!(state.nodes().confirm(confirmed, 42));
    assert!(!state.nodes().confirm(confirmed ^ 1 << 40, 42));
    let mut shown = Vec::new();
    let settled = state.settle(&report(Some(15)), |node| {
        assert_eq!(node.lookups, 0);
        shown.push(node.nodeid);
        if node.nodeid == kept { Keep::Keep } else { Keep::Drop }
    });
    let expected = Settled { dropped: 2, kept_unused: 2, handles_dropped: 1, outcomes_dropped: 1 };
    assert_eq!(settled, expected);
    assert_eq!(shown, [dropped, kept, stale]);
    assert_eq!(state.nodes().get(confirmed).unwrap().lookups, 42);
    assert_eq!(state.nodes().get(owed).unwrap().lookups, 0);
    assert_eq!(state.nodes().get(dropped), None);
    assert!(state.handles().get(stays).is_some());
    assert!(state.handles().get(goes).is_none());
    // Answered again, the owed one counts 1.
    assert_eq!(state.nodes().add_lookup(owed), Some(1));
    // A second recovery starts from nothing.
    state.nodes().begin_replay();
    state.settle(&report(None), |_| Keep::Drop);
    assert_eq!(state.nodes().len(), 1);
    assert!(state.journal().is_empty());
}

#[test]
fn the_journal_evicts_outcomes_and_never_an_intent() {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    let journal = state.journal();
    let unused = state.nodes().lookup(&node(1)).unwrap().nodeid;
    state.nodes().forget(unused, 1);
    let nothing = Intent::default();
    drop(journal.begin(5, &nothing).unwrap());
    for id in [9, 7, 8] {
        let nodeid = if id == 7 { unused } else { 0 };
        let mut slot = journal.begin(id, &nothing).unwrap();
        slot.outcome(&Ok(Success { nodeid, ..Success::default() })).unwrap();
    }
    assert!(state.take_orphans().is_empty());
    let held = journal.begin(20, &nothing).unwrap();
    assert_eq!(journal.lookup(7), None, "the lowest outcome goes first");
    assert_eq!(state.take_orphans()[0].nodeid, unused);
    assert!(journal.lookup(8).is_some() && journal.lookup(9).is_some());
    let resumed = journal.resume(8).unwrap();
    drop(journal.begin(21, &nothing).unwrap());
    assert!(journal.lookup(8).is_some(), "an outcome that is being answered is not evicted");
    assert_eq!(journal.begin(22, &nothing).err(), Some(JournalError::Full { capacity: 4 }));
    resumed.done();
    assert_eq!(journal.lookup(8), None);
    held.cancel();
    assert!(journal.begin(23, &nothing).is_ok());
    assert_eq!(journal.begin(5, &nothing).err(), Some(JournalError::Known { id: 5 }));
    assert_eq!(journal.begin(1 << 63, &nothing).err(), Some(JournalError::NoId));
    assert_eq!(journal.unresolved().iter().map(|intent| intent.id).collect::<Vec<_>>(), [5, 21, 23]);
}

#[test]
fn the_journal_refuses_what_has_no_room() {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    let long = [b'x'; 256];
    let intent = Intent { names: [b"", &long], ..Intent::default() };
    assert!(matches!(state.journal().begin(1, &intent), Err(JournalError::TooLong { max: 255, .. })));
    let intent = Intent { before: &[0; 481], ..Intent::default() };
    assert!(matches!(state.journal().begin(1, &intent), Err(JournalError::TooLong { max: 480, .. })));
    let mut slot = state.journal().begin(1, &Intent { names: [&long[1..], &long[1..]], ..Intent::default() }).unwrap();
    let big = Ok(Success { payload: vec![0; 129], ..Success::default() });
    assert!(matches!(slot.outcome(&big), Err(JournalError::TooLong { max: 128, .. })));
    slot.outcome(&Err(libc::EEXIST)).unwrap();
    assert_eq!(slot.outcome(&Err(1)), Err(JournalError::Lost { id: 1 }));
    assert_eq!(state.journal().lookup(1), Some(Recorded::Outcome(Err(libc::EEXIST))));
}

#[test]
fn free_pages_are_given_back() {
    let fd = State::create_memfd().unwrap();
    let config = Config { nodes: 100_000, ..SMALL };
    let state = State::open(fd.try_clone().unwrap(), IDENTITY, &config).unwrap();
    let ids: Vec<u64> = (0..60_000).map(|which| state.nodes().lookup(&node(which)).unwrap().nodeid).collect();
    let blocks = || nix::sys::stat::fstat(&fd).unwrap().st_blocks * 512;
    let full = blocks();
    assert!(full > 60_000 * 256);
    // Every 1000th stays.
    for (i, id) in ids.iter().enumerate().filter(|(i, _)| i % 1000 != 0) {
        assert!(state.nodes().forget(*id, 1).is_some() && state.nodes().remove(*id), "{i}");
    }
    assert!(blocks() < full / 2, "{} of {full} bytes are left", blocks());
    for (i, id) in ids.iter().enumerate() {
        let found = state.nodes().get(*id);
        assert_eq!(found.map(|node| node.info), (i % 1000 == 0).then(|| node(i as u64)));
    }
    for which in 60_000..120_000 {
        state.nodes().lookup(&node(which)).unwrap();
    }
    assert_eq!(state.nodes().len(), 60_060);
}

/// A page that became free, and is used again when its turn to be given back comes.
#[test]
fn pages_in_use_are_not_given_back() {
    let config = Config { nodes: 100_000, ..SMALL };
    let state = State::open(State::create_memfd().unwrap(), IDENTITY, &config).unwrap();
    let make = |which| state.nodes().lookup(&node(which)).unwrap().nodeid;
    let free = |nodeid| assert!(state.nodes().forget(nodeid, 1).is_some() && state.nodes().remove(nodeid));
    let ids: Vec<u64> = (0..30_000).map(make).collect();
    ids[..10_000].iter().copied().for_each(free);
    let again: Vec<u64> = (50_000..60_000).map(make).collect();
    assert_eq!(again[0] as u32, ids[0] as u32, "another slot is used, the test tests nothing");
    ids[10_000..].iter().copied().for_each(free);
    for (which, nodeid) in (50_000..).zip(again) {
        assert_eq!(state.nodes().get(nodeid).map(|node| node.info), Some(node(which)));
    }
}

#[derive(Clone, Debug)]
enum Op {
    Lookup(u64),
    Forget(u64, u64),
    Remove(u64),
    Confirm(u64, u64),
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (0..40_u64).prop_map(Op::Lookup),
        3 => (0..40_u64, 1..4_u64).prop_map(|(which, count)| Op::Forget(which, count)),
        3 => (0..40_u64).prop_map(Op::Remove),
        1 => (0..40_u64, 1..4_u64).prop_map(|(which, count)| Op::Confirm(which, count)),
        1 => Just(Op::Reopen),
    ];
    proptest::collection::vec(op, 0..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn node_table_is_a_map_of_counts(ops in ops()) {
        let fd = State::create_memfd().unwrap();
        let mut state = open(&fd).unwrap();
        let mut model: HashMap<u64, (u64, u64)> = HashMap::new();
        for op in ops {
            match op {
                Op::Lookup(which) => {
                    let got = state.nodes().lookup(&node(which)).unwrap();
                    let entry = model.entry(which).or_insert((got.nodeid, 0));
                    entry.1 += 1;
                    prop_assert_eq!((got.nodeid, got.lookups), *entry);
                }
                Op::Forget(which, count) => if let Some((nodeid, lookups)) = model.get_mut(&which) {
                    *lookups = lookups.saturating_sub(count);
                    prop_assert_eq!(state.nodes().forget(*nodeid, count).is_some(), *lookups == 0);
                },
                Op::Remove(which) => if let Some((nodeid, lookups)) = model.get(&which).copied() {
                    prop_assert_eq!(state.nodes().remove(nodeid), lookups == 0);
                    if lookups == 0 {
                        model.remove(&which);
                    }
                },
                Op::Confirm(which, count) => if let Some((nodeid, lookups)) = model.get_mut(&which) {
                    prop_assert!(state.nodes().confirm(*nodeid, count));
                    *lookups = count;
                },
                Op::Reopen => {
                    drop(state);
                    state = open(&fd).unwrap();
                }
            }
            prop_assert_eq!(state.nodes().len(), model.len());
        }
        for (which, (nodeid, lookups)) in model {
            let found = state.nodes().get(nodeid).unwrap();
            prop_assert_eq!((found.lookups, found.info), (lookups, node(which)));
            prop_assert_eq!(state.nodes().find(0, &node(which).handle).map(|node| node.nodeid), Some(nodeid));
        }
    }

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

/// Lookups and FORGETs of the same files from several threads: no count is lost, no nodeid names two files.
#[test]
fn threads() {
    let config = Config { nodes: 1000, handles: 1000, journal: 8 };
    let fd = State::create_memfd().unwrap();
    let state = State::open(fd.try_clone().unwrap(), IDENTITY, &config).unwrap();
    let held: Vec<HashMap<u64, u64>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4_u64)
            .map(|worker| {
                let state = &state;
                scope.spawn(move || {
                    let mut held: HashMap<u64, u64> = HashMap::new();
                    let mut random = worker + 1;
                    for turn in 0..20_000_u64 {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        let which = (random >> 33) % 50;
                        let found = state.nodes().lookup(&node(which)).unwrap();
                        *held.entry(found.nodeid).or_default() += 1;
                        assert_eq!(state.nodes().get(found.nodeid).unwrap().info, node(which));
                        // Gives back what it holds of another.
                        if let Some(nodeid) = held.keys().copied().nth((random >> 20) as usize % held.len()) {
                            let count = held.remove(&nodeid).unwrap();
                            if state.nodes().forget(nodeid, count).is_some() {
                                state.remove_node(nodeid);
                            }
                        }
                        let id = worker << 32 | (turn + 1);
                        let mut slot = state.journal().begin(id, &Intent { opcode: worker as u32, ..Intent::default() }).unwrap();
                        slot.outcome(&Err(worker as i32 + 1)).unwrap();
                        assert_eq!(state.journal().lookup(id), Some(Recorded::Outcome(Err(worker as i32 + 1))));
                        slot.done();
                    }
                    held
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let mut counts: HashMap<u64, u64> = HashMap::new();
    for (nodeid, count) in held.into_iter().flatten() {
        *counts.entry(nodeid).or_default() += count;
    }
    let mut found = HashMap::new();
    state.nodes().for_each(|node| {
        found.insert(node.nodeid, node.lookups);
    });
    assert_eq!(found, counts);
    assert!(state.journal().is_empty());
    drop(state);
    let state = open(&fd).unwrap();
    assert_eq!(state.nodes().len(), counts.len());
}

/// Not a test: prints what the tables cost. `cargo test --release -- --ignored --nocapture measure`
#[test]
#[ignore = "a measurement"]
fn measure() {
    let fd = State::create_memfd().unwrap();
    let config = Config::default();
    let clone = || fd.try_clone().unwrap();
    let timed = |what: &str, times: u64, work: &mut dyn FnMut()| {
        let began = std::time::Instant::now();
        work();
        let took = began.elapsed();
        println!("{what}: {took:?}, {:.0} ns each", took.as_nanos() as f64 / times as f64);
    };
    let mut state = State::open(clone(), IDENTITY, &config).unwrap();
    for count in [100_000_u64, 1_000_000] {
        let mut ids = Vec::new();
        timed(&format!("{count} new nodes"), count, &mut || {
            ids = (0..count).map(|which| state.nodes().lookup(&node(which)).unwrap().nodeid).collect();
        });
        let blocks = nix::sys::stat::fstat(&fd).unwrap().st_blocks * 512;
        println!("memory of the state: {} KiB", blocks / 1024);
        timed("lookups of known files", count, &mut || {
            (0..count).for_each(|which| assert!(state.nodes().lookup(&node(which)).is_ok()));
        });
        timed("get", count, &mut || {
            ids.iter().for_each(|id| assert!(state.nodes().get(*id).is_some()));
        });
        timed("confirm", count, &mut || ids.iter().for_each(|id| assert!(state.nodes().confirm(*id, 1))));
        timed("settle, all confirmed", count, &mut || {
            state.settle(&report(None), |_| Keep::Drop);
        });
        timed("open again", count, &mut || state = State::open(clone(), IDENTITY, &config).unwrap());
        timed("forget and remove", count, &mut || {
            for id in &ids {
                state.nodes().forget(*id, 2);
                assert!(state.nodes().remove(*id));
            }
        });
        let blocks = nix::sys::stat::fstat(&fd).unwrap().st_blocks * 512;
        println!("memory of the state: {} KiB", blocks / 1024);
    }
    let intent = Intent { opcode: 9, names: [b"a name of some length", b""], before: &[1; 40], ..Intent::default() };
    timed("journal: begin, outcome, done", 1_000_000, &mut || {
        for id in 1..=1_000_000 {
            let mut slot = state.journal().begin(id, &intent).unwrap();
            slot.outcome(&Ok(Success::default())).unwrap();
            slot.done();
        }
    });
}
