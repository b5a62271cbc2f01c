// SPDX-License-Identifier: GPL-2.0

//! The tests of the core as tables, for cargo on the host and KUnit in the kernel alike.
//!
//! Each function returns the first row that does not hold.

use super::ids;
use super::phase::{Machine, Phase};
use super::verdict::{judge, Answer, Known, Shown, Verdict};
use super::window::{Window, SLOTS};
use super::wire::{Demand, Refusal, RestartedOut, COMMIT, COOKIE};

const FILE: u32 = 0o100644;
const DIR: u32 = 0o040755;

/// One row each: what the kernel knows, what the server answers, what follows.
pub fn verdicts() -> Result<(), usize> {
    let file = Known {
        kind: FILE,
        ino: Some(7),
    };
    let root = Known {
        kind: DIR,
        ino: None,
    };
    let attr = |mode, ino, size| Answer::Attr(Shown { mode, ino, size });
    let max = i64::MAX as u64;
    let table = [
        (file, attr(FILE, 7, 0), Verdict::Confirmed),
        // Permissions and size are not identity.
        (file, attr(0o100000, 7, max), Verdict::Confirmed),
        (file, attr(FILE, 8, 0), Verdict::RevokedCounted),
        (file, attr(DIR, 7, 0), Verdict::RevokedCounted),
        (file, attr(0, 7, 0), Verdict::RevokedCounted),
        (file, attr(FILE, 7, max + 1), Verdict::RevokedCounted),
        (file, Answer::Error, Verdict::RevokedUnknown),
        (file, Answer::Over, Verdict::Void),
        (root, attr(DIR, 1, 0), Verdict::Confirmed),
        (root, attr(DIR, 2, 0), Verdict::Confirmed),
        (root, attr(FILE, 1, 0), Verdict::RevokedCounted),
        (root, Answer::Error, Verdict::RevokedUnknown),
    ];
    check(table.iter().map(|&(k, a, v)| judge(k, a) == v))
}

/// One row each: the notification, what is asked or why it is refused.
pub fn demands() -> Result<(), usize> {
    let known = [0x11, 0x22];
    let out = |cookie, flags, epoch, identity| RestartedOut {
        cookie,
        flags,
        epoch,
        identity,
    };
    let table = [
        (out(COOKIE, 0, 0, [0, 0]), Ok(Demand::Restarted)),
        (out(COOKIE | 5, 0, 0, known), Ok(Demand::Restarted)),
        (out(COOKIE, COMMIT, 3, known), Ok(Demand::Commit(3))),
        (out(1, 0, 0, known), Err(Refusal::Malformed)),
        (out(COOKIE, 2, 0, known), Err(Refusal::Malformed)),
        (out(COOKIE, 0, 0, [0x11, 0]), Err(Refusal::WrongIdentity)),
        (out(COOKIE, 0, 9, known), Err(Refusal::Malformed)),
        (out(COOKIE, COMMIT, 1, [1, 2]), Err(Refusal::WrongIdentity)),
        (out(COOKIE, COMMIT, 1, [0, 0]), Err(Refusal::WrongIdentity)),
        // A malformed one is that, whoever sent it.
        (out(0, 0, 0, [1, 2]), Err(Refusal::Malformed)),
    ];
    check(table.iter().map(|(o, d)| o.demand(known) == *d))
}

/// The path of a recovery, then what leads astray.
pub fn phases() -> Result<(), usize> {
    let mut m = Machine::new();
    let path = [
        m.phase() == Phase::Serving,
        m.commit(0) == Err(Refusal::WrongEpoch),
        m.restarted(1).is_ok() && m.phase() == Phase::Held,
        !m.root_answered(true) && !m.replayed() && !m.prepared() && !m.released(),
        m.root_sent() && m.phase() == Phase::Root,
        m.root_answered(true) && m.phase() == Phase::Replay,
        m.commit(1) == Err(Refusal::WrongEpoch),
        m.replayed() && m.phase() == Phase::Settle,
        m.prepared() && m.phase() == Phase::Prepared,
        m.commit(0) == Err(Refusal::WrongEpoch),
        m.phase() == Phase::Prepared,
        m.commit(1).is_ok() && m.phase() == Phase::Release,
        m.commit(1) == Err(Refusal::WrongEpoch),
        m.released() && m.phase() == Phase::Serving,
        m.commit(1) == Err(Refusal::WrongEpoch),
        // The root is refused; only RESTARTED helps.
        m.restarted(2).is_ok() && m.root_sent() && m.root_answered(false),
        m.phase() == Phase::Refused && m.commit(2).is_err() && !m.replayed(),
        m.restarted(3).is_ok() && m.phase() == Phase::Held,
        m.is_current(3) && !m.is_current(2),
        // Gone stays gone.
        {
            m.end();
            m.restarted(4) == Err(Refusal::Gone) && m.commit(3) == Err(Refusal::Gone)
        },
        !m.is_current(3) && !m.root_sent() && m.phase() == Phase::Gone,
    ];
    check(path.into_iter())
}

/// Ids keep their low 48 bits, and no two epochs in a row share one.
pub fn request_ids() -> Result<(), usize> {
    let first = ids::resent(0x1234, 1);
    let table = [
        ids::original(0x1234) == 0x1234,
        !ids::is_resent(0x1234),
        first == 1 << 63 | 1 << 48 | 0x1234,
        ids::is_resent(first) && ids::original(first) == 0x1234,
        ids::resent(first, 2) == 1 << 63 | 2 << 48 | 0x1234,
        ids::resent(first, 2) != first,
        ids::resent(first, 0x1ff) == 1 << 63 | 0xff << 48 | 0x1234,
        // No id of a request has the bit of a cookie.
        ids::resent(u64::MAX, 0xffff_ffff) & COOKIE == 0,
    ];
    check(table.into_iter())
}

/// Slots are given out once, and no more than there are.
pub fn slots() -> Result<(), usize> {
    let mut w = Window::new();
    let mut all = true;
    for i in 0..SLOTS {
        all &= w.take() == Some(i);
    }
    let table = [
        all,
        w.in_flight() == SLOTS as u32,
        w.take().is_none(),
        w.give(5) && !w.give(5),
        w.in_flight() == SLOTS as u32 - 1,
        w.take() == Some(5),
        !w.give(SLOTS),
    ];
    check(table.into_iter())
}

fn check(rows: impl Iterator<Item = bool>) -> Result<(), usize> {
    for (row, holds) in rows.enumerate() {
        if !holds {
            return Err(row);
        }
    }
    Ok(())
}
