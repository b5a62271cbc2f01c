// SPDX-License-Identifier: GPL-2.0

//! The connection, as the engine sees it.
//!
//! [`Restart`] is a handle to the C half, `struct fuse_restart`. Its methods are the only way from
//! the engine to queues, lists of inodes and work items.

use super::{
    inode::InodeRef,
    proto::{
        ids,
        phase::Phase,
        verdict::Verdict,
        wire::{self, RestartedIn, RestartedOut}, //
    }, //
};
use core::mem::size_of;
use kernel::{
    bindings,
    prelude::*,
    str::CStr, //
};

// The numbers of the core are those of the header.
const _: () = {
    assert!(size_of::<RestartedOut>() == size_of::<bindings::fuse_notify_restarted_out>());
    assert!(size_of::<RestartedIn>() == size_of::<bindings::fuse_notify_restarted_in>());
    assert!(wire::COMMIT == bindings::FUSE_RESTARTED_COMMIT);
    assert!(wire::COOKIE == 1 << 62);
    assert!(wire::GETATTR_REPLAY == bindings::FUSE_GETATTR_REPLAY);
    assert!(wire::NOTIFY_RESTARTED as u32 == bindings::fuse_notify_code_FUSE_NOTIFY_RESTARTED);
    assert!(ids::EPOCH_SHIFT == bindings::FUSE_UNIQUE_EPOCH_SHIFT);
    assert!(wire::INIT_IDENTITY_OFFSET == core::mem::offset_of!(bindings::fuse_init_out, identity));
};

/// Translates a notification for the core.
pub(super) fn demand_of(out: &bindings::fuse_notify_restarted_out) -> RestartedOut {
    RestartedOut {
        cookie: out.cookie,
        flags: out.flags,
        epoch: out.epoch,
        identity: out.identity,
    }
}

/// Translates the report for the server.
pub(super) fn report_of(report: &RestartedIn) -> bindings::fuse_notify_restarted_in {
    bindings::fuse_notify_restarted_in {
        epoch: report.epoch,
        flags: report.flags,
        replayed: report.replayed,
        confirmed: report.confirmed,
        revoked: report.revoked,
        held: report.held,
        lowest_owed: report.lowest_owed,
        hold_ns: report.hold_ns,
        root_ns: report.root_ns,
        replay_ns: report.replay_ns,
        settle_ns: report.settle_ns,
        spare: report.spare,
    }
}

/// The name of a phase, for C.
pub(super) fn name(phase: Phase) -> &'static CStr {
    match phase {
        Phase::Serving => c"serving",
        Phase::Held => c"held",
        Phase::Root => c"root",
        Phase::Refused => c"refused",
        Phase::Replay => c"replay",
        Phase::Settle => c"settle",
        Phase::Prepared => c"prepared",
        Phase::Release => c"release",
        Phase::Gone => c"dead",
    }
}

/// Proof that the file system is mounted: its superblock is there, and so is its list of inodes.
pub(super) struct Mounted(());

impl Mounted {
    /// Creates the proof.
    ///
    /// # Safety
    ///
    /// The superblock must not go away before the proof does.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// Proof that nobody else works on the recovery.
///
/// There is one for each `struct fuse_restart`. The engine has it, under its lock.
pub(super) struct Alone(());

impl Alone {
    /// Creates the proof.
    ///
    /// # Safety
    ///
    /// It must be the only one for its `struct fuse_restart`, as long as it exists.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

/// A handle to the C half of a recovery.
///
/// # Invariants
///
/// The pointers are valid as long as the engine, and so is what they point to: C creates the
/// engine with it and frees the engine first.
#[derive(Clone, Copy)]
pub(super) struct Restart {
    r: *mut bindings::fuse_restart,
    fch: *mut bindings::fuse_chan,
}

// SAFETY: The C functions that are called with the pointers take locks of their own; for those that
// need more than that it takes an `Alone`.
unsafe impl Send for Restart {}

// SAFETY: As above.
unsafe impl Sync for Restart {}

impl Restart {
    /// Creates a handle.
    ///
    /// # Safety
    ///
    /// `r` must be initialized, and it and its channel must stay valid as long as the engine that
    /// the handle is for.
    pub(super) unsafe fn new(r: *mut bindings::fuse_restart) -> Self {
        // INVARIANT: By the requirements of this function.
        Self {
            r,
            // SAFETY: By the requirements of this function.
            fch: unsafe { (*r).fch },
        }
    }

    /// The pointer, for the abstractions of this directory.
    pub(super) fn as_ptr(self) -> *mut bindings::fuse_restart {
        self.r
    }

    /// The channel, for the abstractions of this directory.
    pub(super) fn chan(self) -> *mut bindings::fuse_chan {
        self.fch
    }

    /// Takes everything away from the last server; returns the new epoch, or `None` if the
    /// connection is gone.
    pub(super) fn hold(self) -> Option<u32> {
        // SAFETY: By the type invariants.
        match unsafe { bindings::fuse_chan_hold(self.fch) } {
            0 => None,
            epoch => Some(epoch),
        }
    }

    /// Lets reads fail until the next [`Restart::hold`].
    pub(super) fn refuse(self, epoch: u32) {
        // SAFETY: By the type invariants. If the epoch is over then nothing is to be refused.
        unsafe { bindings::fuse_chan_refuse(self.fch, epoch) };
    }

    /// Lets the server send notifications again: it has committed.
    pub(super) fn commit(self, epoch: u32) {
        // SAFETY: By the type invariants.
        unsafe { bindings::fuse_chan_commit(self.fch, epoch) };
    }

    /// Returns whether no request is in anybody's hands. If one is then the engine will run again.
    pub(super) fn is_settled(self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { bindings::fuse_chan_settled(self.fch) }
    }

    /// Returns how many requests are held, and the lowest original id among them.
    pub(super) fn owed(self) -> (u64, u64) {
        let mut count = 0;
        // SAFETY: By the type invariants; `count` is valid for the duration of the call.
        let lowest = unsafe { bindings::fuse_chan_owed(self.fch, &mut count) };
        (count, lowest)
    }

    /// Hands the held requests to the server, and returns how many these are; `None` if the epoch
    /// is over.
    pub(super) fn unhold(self, epoch: u32) -> Option<u64> {
        let mut resent = 0;
        // SAFETY: By the type invariants; `resent` is valid for the duration of the call.
        unsafe { bindings::fuse_chan_unhold(self.fch, epoch, &mut resent) }.then_some(resent)
    }

    /// Returns whether the connection was neither aborted nor closed.
    pub(super) fn is_connected(self) -> bool {
        // SAFETY: By the type invariants.
        unsafe { bindings::fuse_chan_connected(self.fch) }
    }

    /// Lets the engine run, soon.
    pub(super) fn kick(self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::fuse_restart_kick(self.r) };
    }

    /// Lets the engine run when there may be memory again.
    pub(super) fn retry(self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::fuse_restart_retry(self.r) };
    }

    /// Limits the time of a recovery, unless it is limited already.
    pub(super) fn arm(self, _: &mut Alone) {
        // SAFETY: By the type invariants; nobody else is in there.
        unsafe { bindings::fuse_restart_arm(self.r) };
    }

    /// Takes the limit away.
    pub(super) fn disarm(self, _: &mut Alone) {
        // SAFETY: By the type invariants; nobody else is in there.
        unsafe { bindings::fuse_restart_disarm(self.r) };
    }

    /// Gets the root inode.
    pub(super) fn root(self, _: &mut Alone, _: &Mounted, epoch: u32) -> Option<InodeRef> {
        // SAFETY: By the type invariants; the superblock is there, and nobody else in there.
        let inode = unsafe { bindings::fuse_restart_root(self.r, epoch) };
        // SAFETY: If it is not null then a reference came with it.
        unsafe { InodeRef::from_raw(self, inode) }
    }

    /// Gets the inode after `last` that is to be replayed in `epoch`.
    pub(super) fn next(
        self,
        _: &mut Alone,
        _: &Mounted,
        last: Option<&InodeRef>,
        epoch: u32,
    ) -> Option<InodeRef> {
        let last = last.map_or(core::ptr::null_mut(), InodeRef::as_ptr);
        // SAFETY: By the type invariants; the superblock is there, nobody else is in there, and
        // `last` is null or referenced, so still in its list.
        let inode = unsafe { bindings::fuse_restart_next(self.r, last, epoch) };
        // SAFETY: If it is not null then a reference came with it.
        unsafe { InodeRef::from_raw(self, inode) }
    }

    /// Forgets revocations that were not committed.
    pub(super) fn reset(self, _: &mut Alone) {
        // SAFETY: By the type invariants; nobody else is in there.
        unsafe { bindings::fuse_restart_reset(self.r) };
    }

    /// Revokes what is to be revoked.
    pub(super) fn release(self, _: &mut Alone, epoch: u32) {
        // SAFETY: By the type invariants; nobody else is in there.
        unsafe { bindings::fuse_restart_release(self.r, epoch) };
    }

    /// Drops page caches and references that the recovery left over, later.
    pub(super) fn teardown(self) {
        // SAFETY: By the type invariants.
        unsafe { bindings::fuse_restart_teardown(self.r) };
    }

    /// Traces the phase.
    pub(super) fn trace_phase(self, epoch: u32, phase: Phase) {
        // SAFETY: By the type invariants; the name is static.
        unsafe { bindings::fuse_restart_trace_phase(self.r, epoch, name(phase).as_char_ptr()) };
    }

    /// Traces a verdict.
    pub(super) fn trace_verdict(self, epoch: u32, nodeid: u64, verdict: Verdict) {
        let verdict = match verdict {
            Verdict::Void => 0,
            Verdict::Confirmed => 1,
            Verdict::RevokedCounted => 2,
            Verdict::RevokedUnknown => 3,
        };
        // SAFETY: By the type invariants.
        unsafe { bindings::fuse_restart_trace_verdict(self.r, epoch, nodeid, verdict) };
    }
}

/// The time, in nanoseconds.
pub(super) fn now() -> u64 {
    // SAFETY: There are no requirements.
    unsafe { bindings::fuse_restart_ktime() }
}
