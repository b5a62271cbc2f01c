// SPDX-License-Identifier: GPL-2.0

//! What the models must get to, or they would show nothing.

use super::check::Check;
use super::state::{Answer, Op, State, Way};
use rust_fuse_notify::proto::ids;
use rust_fuse_notify::proto::phase::Phase;

fn dead_in(s: &State, phase: Phase) -> bool {
    !s.server.alive && s.phase() == phase
}

/// Each is reached by one of the sizes at least.
pub const REACHED: [(&str, Check); 18] = [
    ("a server dies in HELD", |_, s| dead_in(s, Phase::Held)),
    ("a server dies in ROOT", |_, s| dead_in(s, Phase::Root)),
    ("a server dies in REPLAY", |_, s| dead_in(s, Phase::Replay)),
    ("a server dies in SETTLE", |_, s| dead_in(s, Phase::Settle)),
    ("a server dies in PREPARED", |_, s| {
        dead_in(s, Phase::Prepared)
    }),
    ("a server dies in RELEASE", |_, s| {
        dead_in(s, Phase::Release)
    }),
    ("a root is refused", |_, s| s.phase() == Phase::Refused),
    ("two requests are held", |_, s| s.kernel.held.len() == 2),
    ("a late answer is written", |_, s| {
        let late = |a: &super::state::App| a.req.is_some_and(|r| r.epoch < s.epoch());
        s.apps.iter().any(late)
            && s.kernel
                .transit
                .iter()
                .any(|t| t.way == Way::Write && t.dying)
    }),
    ("a late entry is consumed", |_, s| {
        s.apps
            .iter()
            .filter_map(|a| a.req)
            .any(|r| matches!(r.answer, Some(Answer::Entry { .. })) && r.epoch < s.epoch())
    }),
    ("replays of two recoveries are in flight", |_, s| {
        s.kernel.slots.iter().any(|slot| slot.epoch < s.epoch())
            && s.kernel.slots.iter().any(|slot| slot.epoch == s.epoch())
    }),
    ("an application uses a revoked inode", |_, s| {
        s.apps
            .iter()
            .any(|a| a.inode.is_some() && s.is_bad(a.inode))
    }),
    ("a revoked inode keeps its count", |_, s| {
        s.kernel.inodes.iter().any(|i| i.bad && i.nlookup > 0)
    }),
    ("a successor is in use beside it", |_, s| {
        let of = |bad| move |i: &&super::state::Inode| i.bad == bad && i.file == 0;
        let inodes = &s.kernel.inodes;
        inodes.iter().any(|i| of(true)(&i)) && inodes.iter().any(|i| of(false)(&i))
    }),
    ("what was done is asked for again", |_, s| {
        s.server.inbox.iter().any(|m| {
            let done = s.store.effects.contains(&(ids::original(m.unique) as u8));
            done && m.answer.is_none() && ids::is_resent(m.unique)
        })
    }),
    ("an inode is evicted across a RESTARTED", |_, s| {
        s.kernel.evicting.iter().any(|f| f.epoch < s.epoch())
    }),
    ("a FORGET is read after a recovery", |_, s| {
        s.phase() == Phase::Serving && s.epoch() > 0 && !s.kernel.forgets.is_empty()
    }),
    ("a created file is looked up again", |_, s| {
        s.apps
            .iter()
            .filter_map(|a| a.req)
            .any(|r| matches!(r.op, Op::Lookup(0)) && s.store.gens[0] > 0 && s.epoch() > 0)
    }),
];
