// SPDX-License-Identifier: GPL-2.0

//! Ways to break the kernel, each of which the model must notice.

use super::check::{
    COMMITTED, COUNTS, ERRORS, ORDER, REPLY, REPORT, STRANGER, SUCCESSOR, TWICE, UNTOLD, WAITS,
};

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Seed {
    /// The sweep leaves queued FORGETs where they are.
    KeepForgets,
    /// A late LOOKUP is counted for an inode that is there already.
    CountLate,
    /// A late LOOKUP makes an inode, which was shown to no server.
    BornLate,
    /// Bad inodes are noticed when a request is built, not when it is queued or RELEASE finds it held.
    BadBeforeSendOnly,
    /// The report does not wait for requests in transit.
    ReportUnsettled,
    /// Requests of applications are delivered before COMMIT.
    DeliverEarly,
    /// Resent requests carry the RESEND bit, but no epoch.
    ResendBitOnly,
    /// The sweep holds replays and the report as if they were requests.
    SweepReplays,

    // Beyond the list of the issue.
    /// RELEASE does not look at what is held.
    BadNotInHeld,
    /// A late LOOKUP says what generation an inode has that is there already.
    StaleLate,
    /// A FORGET is queued whatever its epoch.
    ForgetAnyEpoch,
    /// Requests are handed over in the order in which the sweep found them.
    Unsorted,
    /// A reader does not look whether the epoch has changed under it.
    ReaderIgnoresEpoch,
    /// Requests that a dying reader or writer had are ended, not requeued.
    DyingCopyFails,
    /// A new RESTARTED leaves what an uncommitted server revoked.
    NoReset,
    /// Inodes are revoked as they are answered, not at RELEASE.
    RevokeAtOnce,
    /// The nodeid that a server did not know keeps its lookup count.
    KeepUnknownCount,
    /// A requeued request does not say that it may have been seen.
    RequeueUnmarked,
    /// The other inodes are replayed whatever the answer to the root.
    NoFence,
    /// COMMIT is taken whatever its epoch.
    CommitAnyEpoch,
    /// Held requests get new ids.
    NewIds,
    /// An answer is judged though its epoch is over.
    JudgeOld,
}

/// A seed, the model that notices it, and the property that fails there.
pub struct Row {
    pub seed: Seed,
    pub size: &'static str,
    pub property: &'static str,
}

const fn row(seed: Seed, size: &'static str, property: &'static str) -> Row {
    Row {
        seed,
        size,
        property,
    }
}

/// All of them.
pub const TABLE: [Row; 22] = [
    row(Seed::KeepForgets, "counts", COUNTS),
    row(Seed::CountLate, "counts", COUNTS),
    row(Seed::BornLate, "counts", UNTOLD),
    row(Seed::BadBeforeSendOnly, "orders", SUCCESSOR),
    row(Seed::ReportUnsettled, "orders", TWICE),
    row(Seed::DeliverEarly, "orders", SUCCESSOR),
    row(Seed::ResendBitOnly, "twice", REPLY),
    row(Seed::SweepReplays, "twice", WAITS),
    row(Seed::BadNotInHeld, "orders", SUCCESSOR),
    row(Seed::StaleLate, "successor", ERRORS),
    row(Seed::ForgetAnyEpoch, "counts", COUNTS),
    row(Seed::Unsorted, "counts", ORDER),
    row(Seed::ReaderIgnoresEpoch, "orders", WAITS),
    row(Seed::DyingCopyFails, "orders", ERRORS),
    row(Seed::NoReset, "twice", COUNTS),
    row(Seed::RevokeAtOnce, "twice", COMMITTED),
    row(Seed::KeepUnknownCount, "successor", COUNTS),
    row(Seed::RequeueUnmarked, "orders", TWICE),
    row(Seed::NoFence, "stranger", STRANGER),
    row(Seed::CommitAnyEpoch, "twice", UNTOLD),
    row(Seed::NewIds, "counts", ORDER),
    row(Seed::JudgeOld, "twice", REPORT),
];
