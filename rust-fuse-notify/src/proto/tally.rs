// SPDX-License-Identifier: GPL-2.0

//! The numbers of one recovery and of all of them.

use super::verdict::Verdict;
use super::wire::RestartedIn;

/// One recovery.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Inodes confirmed.
    pub confirmed: u64,
    /// Inodes revoked.
    pub revoked: u64,
    /// Replays of which nothing was learned.
    pub void: u64,
    /// Requests that were held at the report.
    pub held: u64,
    /// Requests handed over at the release.
    pub resent: u64,
    /// Time in each phase, in nanoseconds.
    pub hold_ns: u64,
    /// See `hold_ns`.
    pub root_ns: u64,
    /// See `hold_ns`.
    pub replay_ns: u64,
    /// See `hold_ns`.
    pub settle_ns: u64,
    /// From COMMIT until requests were delivered, in nanoseconds.
    pub release_ns: u64,
}

impl Tally {
    /// Counts one verdict.
    pub fn count(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Confirmed => self.confirmed += 1,
            Verdict::RevokedCounted | Verdict::RevokedUnknown => self.revoked += 1,
            Verdict::Void => self.void += 1,
        }
    }

    /// Inodes that were shown to the server and answered.
    pub fn replayed(&self) -> u64 {
        self.confirmed + self.revoked
    }

    /// The report for the server.
    pub fn report(&self, epoch: u32, lowest_owed: u64) -> RestartedIn {
        RestartedIn {
            epoch,
            flags: 0,
            replayed: self.replayed(),
            confirmed: self.confirmed,
            revoked: self.revoked,
            held: self.held,
            lowest_owed,
            hold_ns: self.hold_ns,
            root_ns: self.root_ns,
            replay_ns: self.replay_ns,
            settle_ns: self.settle_ns,
            spare: [0; 2],
        }
    }
}

/// All recoveries of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Recoveries that reached SERVING.
    pub recoveries: u64,
    /// Sum of [`Tally::replayed`], of recoveries that were voided as well.
    pub replayed: u64,
    /// Sum of [`Tally::confirmed`].
    pub confirmed: u64,
    /// Sum of [`Tally::revoked`].
    pub revoked: u64,
    /// Sum of [`Tally::void`].
    pub void: u64,
    /// Sum of [`Tally::resent`].
    pub resent: u64,
}

impl Totals {
    /// Adds a recovery that ended, `served` if it reached SERVING.
    pub fn add(&mut self, tally: &Tally, served: bool) {
        self.recoveries += u64::from(served);
        self.replayed += tally.replayed();
        self.confirmed += tally.confirmed;
        self.revoked += tally.revoked;
        self.void += tally.void;
        self.resent += tally.resent;
    }
}
