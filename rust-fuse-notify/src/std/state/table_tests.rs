// SPDX-License-Identifier: GPL-2.0
//! The tables against models: counts, nodeids, slots and pages that are used again.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::*;

use super::tests::{node, open, report, IDENTITY, SMALL};
use super::*;

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
    let all: Vec<_> = (0..298)
        .map(|which| state.nodes().lookup(&node(which)).unwrap().nodeid)
        .collect();
    assert!(matches!(
        state.nodes().lookup(&node(999)),
        Err(StateError::Full { capacity: 300, .. })
    ));
    assert_eq!(state.nodes().lookup(&node(3)).unwrap().lookups, 2);
    state.nodes().forget(all[7], 1);
    assert!(state.nodes().remove(all[7]));
    assert!(state.nodes().lookup(&node(999)).is_ok());

    let new = NewHandle {
        nodeid: 1,
        flags: 0,
        kind: HandleKind::Directory,
        opener: 0,
        aux: [0; 2],
    };
    let fhs: BTreeSet<_> = (0..20)
        .map(|_| state.handles().insert(&new).unwrap())
        .collect();
    assert_eq!(fhs.len(), 20);
    assert!(matches!(
        state.handles().insert(&new),
        Err(StateError::Full { capacity: 20, .. })
    ));
    assert!(state.handles().remove(*fhs.first().unwrap()).is_some());
    assert!(!fhs.contains(&state.handles().insert(&new).unwrap()));
}

#[test]
fn settle_makes_the_table_the_replayed_set() {
    let fd = State::create_memfd().unwrap();
    let state = open(&fd).unwrap();
    state.nodes().set_root(&node(0));
    let ids: Vec<u64> = (1..=5)
        .map(|which| state.nodes().lookup(&node(which)).unwrap().nodeid)
        .collect();
    let [confirmed, dropped, owed, kept, stale] = ids[..] else {
        panic!()
    };
    let handle = |nodeid| NewHandle {
        nodeid,
        flags: 0,
        kind: HandleKind::File,
        opener: 0,
        aux: [0; 2],
    };
    let stays = state.handles().insert(&handle(confirmed)).unwrap();
    let goes = state.handles().insert(&handle(dropped)).unwrap();
    for (id, nodeid) in [(10, stale), (20, owed)] {
        let mut slot = state.journal().begin(id, &Intent::default()).unwrap();
        slot.outcome(&Ok(Success {
            nodeid,
            ..Success::default()
        }))
        .unwrap();
    }
    state.nodes().begin_replay();
    assert!(state.nodes().confirm(1, 1));
    state.nodes().show(dropped);
    assert!(state.nodes().confirm(confirmed, 42));
    assert!(!state.nodes().confirm(confirmed ^ 1 << 40, 42));
    let mut shown = Vec::new();
    let settled = state.settle(&report(Some(15)), |node| {
        assert_eq!(node.lookups, 0);
        shown.push(node.nodeid);
        if node.nodeid == kept {
            Keep::Keep
        } else {
            Keep::Drop
        }
    });
    let expected = Settled {
        dropped: 2,
        kept_unused: 2,
        handles_dropped: 1,
        outcomes_dropped: 1,
    };
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
    state.nodes().show(confirmed);
    state.settle(&report(None), |_| Keep::Drop);
    assert_eq!(state.nodes().len(), 1);
    assert!(state.journal().is_empty());
}

/// The answer to its CREATE was late: the kernel has the handle and no inode.
#[test]
fn what_was_created_late_keeps_its_handle() {
    let fd = State::create_memfd().unwrap();
    let create = || {
        let state = open(&fd).unwrap();
        let nodeid = state.nodes().lookup(&node(2)).unwrap().nodeid;
        let new = NewHandle {
            nodeid,
            flags: libc::O_RDWR,
            kind: HandleKind::File,
            opener: 30,
            aux: [0; 2],
        };
        (nodeid, state.handles().insert(&new).unwrap())
    };
    let (nodeid, fh) = create();
    for looked_up in [false, true, false] {
        let state = open(&fd).unwrap();
        state.nodes().begin_replay();
        let settled = state.settle(&report(Some(40)), |_| Keep::Drop);
        assert_eq!((settled.kept_unused, settled.dropped), (1, 0));
        assert!(state.handles().get(fh).is_some());
        if looked_up {
            assert_eq!(state.nodes().add_lookup(nodeid), Some(1));
        }
    }
    let state = open(&fd).unwrap();
    // Its application was killed meanwhile: there is nothing but a RELEASE.
    assert_eq!(state.release(fh).unwrap().nodeid, nodeid);
    assert!(state.remove_node(nodeid));
    assert_eq!(state.release(fh), None);
    let (nodeid, fh) = {
        drop(state);
        create()
    };
    let state = open(&fd).unwrap();
    // In use otherwise.
    assert_eq!(state.release(fh), None);
    assert!(state.nodes().get(nodeid).is_some());
}

#[test]
fn free_pages_are_given_back() {
    let fd = State::create_memfd().unwrap();
    let config = Config {
        nodes: 100_000,
        ..SMALL
    };
    let state = State::open(fd.try_clone().unwrap(), IDENTITY, &config).unwrap();
    let ids: Vec<u64> = (0..60_000)
        .map(|which| state.nodes().lookup(&node(which)).unwrap().nodeid)
        .collect();
    let blocks = || nix::sys::stat::fstat(&fd).unwrap().st_blocks * 512;
    let full = blocks();
    assert!(full > 60_000 * 256);
    // Every 1000th stays.
    for (i, id) in ids.iter().enumerate().filter(|(i, _)| i % 1000 != 0) {
        assert!(
            state.nodes().forget(*id, 1).is_some() && state.nodes().remove(*id),
            "{i}"
        );
    }
    assert!(blocks() < full / 2, "{} of {full} bytes are left", blocks());
    // Nor does the next instance take the memory again, which looks at all that is left.
    let before = blocks();
    drop(state);
    let state = State::open(fd.try_clone().unwrap(), IDENTITY, &config).unwrap();
    assert_eq!(blocks(), before);
    assert_eq!(state.nodes().len(), 60);
    for (i, id) in ids.iter().enumerate() {
        let found = state.nodes().get(*id);
        assert_eq!(
            found.map(|node| node.info),
            (i % 1000 == 0).then(|| node(i as u64))
        );
    }
    for which in 60_000..120_000 {
        state.nodes().lookup(&node(which)).unwrap();
    }
    assert_eq!(state.nodes().len(), 60_060);
    drop(state);
    let state = State::open(fd.try_clone().unwrap(), IDENTITY, &config).unwrap();
    assert_eq!(state.nodes().len(), 60_060);
}

/// A page that became free, and is used again when its turn to be given back comes.
#[test]
fn pages_in_use_are_not_given_back() {
    let config = Config {
        nodes: 100_000,
        ..SMALL
    };
    let state = State::open(State::create_memfd().unwrap(), IDENTITY, &config).unwrap();
    let make = |which| state.nodes().lookup(&node(which)).unwrap().nodeid;
    let free =
        |nodeid| assert!(state.nodes().forget(nodeid, 1).is_some() && state.nodes().remove(nodeid));
    let ids: Vec<u64> = (0..30_000).map(make).collect();
    ids[..10_000].iter().copied().for_each(free);
    let again: Vec<u64> = (50_000..60_000).map(make).collect();
    assert_eq!(
        again[0] as u32, ids[0] as u32,
        "another slot is used, the test tests nothing"
    );
    ids[10_000..].iter().copied().for_each(free);
    for (which, nodeid) in (50_000..).zip(again) {
        assert_eq!(
            state.nodes().get(nodeid).map(|node| node.info),
            Some(node(which))
        );
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
}

/// Lookups and FORGETs of the same files from several threads: no count is lost, no nodeid names two files.
#[test]
fn threads() {
    let config = Config {
        nodes: 1000,
        handles: 1000,
        journal: 8,
        arena_pages: 0,
    };
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
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        let which = (random >> 33) % 50;
                        let found = state.nodes().lookup(&node(which)).unwrap();
                        *held.entry(found.nodeid).or_default() += 1;
                        assert_eq!(state.nodes().get(found.nodeid).unwrap().info, node(which));
                        // Gives back what it holds of another.
                        if let Some(nodeid) = held
                            .keys()
                            .copied()
                            .nth((random >> 20) as usize % held.len())
                        {
                            let count = held.remove(&nodeid).unwrap();
                            if state.nodes().forget(nodeid, count).is_some() {
                                state.remove_node(nodeid);
                            }
                        }
                        let id = worker << 32 | (turn + 1);
                        let mut slot = state
                            .journal()
                            .begin(
                                id,
                                &Intent {
                                    opcode: worker as u32,
                                    ..Intent::default()
                                },
                            )
                            .unwrap();
                        slot.outcome(&Err(worker as i32 + 1)).unwrap();
                        assert_eq!(
                            state.journal().lookup(id),
                            Some(Recorded::Outcome(Err(worker as i32 + 1)))
                        );
                        slot.done();
                    }
                    held
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .collect()
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
        println!(
            "{what}: {took:?}, {:.0} ns each",
            took.as_nanos() as f64 / times as f64
        );
    };
    let mut state = State::open(clone(), IDENTITY, &config).unwrap();
    for count in [100_000_u64, 1_000_000] {
        let mut ids = Vec::new();
        timed(&format!("{count} new nodes"), count, &mut || {
            ids = (0..count)
                .map(|which| state.nodes().lookup(&node(which)).unwrap().nodeid)
                .collect();
        });
        let blocks = nix::sys::stat::fstat(&fd).unwrap().st_blocks * 512;
        println!("memory of the state: {} KiB", blocks / 1024);
        timed("lookups of known files", count, &mut || {
            (0..count).for_each(|which| assert!(state.nodes().lookup(&node(which)).is_ok()));
        });
        timed("get", count, &mut || {
            ids.iter()
                .for_each(|id| assert!(state.nodes().get(*id).is_some()));
        });
        timed("confirm", count, &mut || {
            ids.iter()
                .for_each(|id| assert!(state.nodes().confirm(*id, 1)))
        });
        timed("settle, all confirmed", count, &mut || {
            state.settle(&report(None), |_| Keep::Drop);
        });
        timed("open again", count, &mut || {
            state = State::open(clone(), IDENTITY, &config).unwrap()
        });
        timed("forget and remove", count, &mut || {
            for id in &ids {
                state.nodes().forget(*id, 2);
                assert!(state.nodes().remove(*id));
            }
        });
        let blocks = nix::sys::stat::fstat(&fd).unwrap().st_blocks * 512;
        println!("memory of the state: {} KiB", blocks / 1024);
    }
    let intent = Intent {
        opcode: 9,
        names: [b"a name of some length", b""],
        before: &[1; 40],
        ..Intent::default()
    };
    timed("journal: begin, outcome, done", 1_000_000, &mut || {
        for id in 1..=1_000_000 {
            let mut slot = state.journal().begin(id, &intent).unwrap();
            slot.outcome(&Ok(Success::default())).unwrap();
            slot.done();
        }
    });
}
