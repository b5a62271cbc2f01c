// SPDX-License-Identifier: GPL-2.0

//! Requests of the engine's own.
//!
//! A [`Slot`] is memory for one request: [`Replay`] or [`Report`]. It is allocated once and used
//! again and again:
//!
//! 1. *idle*: the engine may fill it and send it.
//! 2. *in flight*: it belongs to the queues, which read the arguments and write the answer.
//! 3. *landed*: `end()` ran, in whatever task ended the request. It only took note and kicked the
//!    engine, which reads the answer and makes the slot idle again.
//!
//! A slot that is in flight when its recovery is over is ended by the sweep, or by the reader or
//! writer that is just copying it. Until then it is not used.

use super::{
    conn::{report_of, Restart},
    inode::Claim,
    proto::{
        verdict::Shown,
        wire::{RestartedIn, GETATTR_REPLAY}, //
    }, //
};
use core::{cell::UnsafeCell, mem::size_of, pin::Pin};
use kernel::{
    bindings,
    error::to_result,
    ffi::{c_int, c_void},
    prelude::*,
    sync::atomic::{
        Acquire,
        Atomic,
        Relaxed,
        Release, //
    }, //
};

const IDLE: u32 = 0;
const IN_FLIGHT: u32 = 1;
const LANDED: u32 = 2;

/// What differs between the kinds of request.
///
/// # Safety
///
/// [`Kind::describe`] must set up arguments that point to this object only, and no longer than it
/// is.
pub(super) unsafe trait Kind: Default {
    /// Sets up `args` for this object.
    fn describe(&mut self, args: &mut bindings::fuse_args);
}

/// A GETATTR that shows an inode to the server.
#[derive(Default)]
pub(super) struct Replay {
    nodeid: u64,
    input: bindings::fuse_getattr_in,
    output: bindings::fuse_attr_out,
}

// SAFETY: The arguments are `input` and `output`, with their sizes.
unsafe impl Kind for Replay {
    fn describe(&mut self, args: &mut bindings::fuse_args) {
        args.opcode = bindings::fuse_opcode_FUSE_GETATTR as u16;
        args.nodeid = self.nodeid;
        args.in_numargs = 1;
        args.in_args[0].size = size_of::<bindings::fuse_getattr_in>() as u32;
        args.in_args[0].value = (&raw const self.input).cast::<c_void>();
        args.out_numargs = 1;
        args.out_args[0].size = size_of::<bindings::fuse_attr_out>() as u32;
        args.out_args[0].value = (&raw mut self.output).cast::<c_void>();
    }
}

impl Replay {
    /// The request for one inode.
    pub(super) fn new(claim: &Claim) -> Self {
        Self {
            nodeid: claim.nodeid,
            input: bindings::fuse_getattr_in {
                getattr_flags: GETATTR_REPLAY,
                dummy: claim.generation,
                fh: claim.nlookup,
            },
            output: bindings::fuse_attr_out::default(),
        }
    }
}

/// The part of the attributes that a verdict needs.
pub(super) fn shown(attr: &bindings::fuse_attr) -> Shown {
    Shown {
        mode: attr.mode,
        ino: attr.ino,
        size: attr.size,
    }
}

/// The report, to which there is no reply.
#[derive(Default)]
pub(super) struct Report {
    input: bindings::fuse_notify_restarted_in,
}

// SAFETY: The only argument is `input`, with its size.
unsafe impl Kind for Report {
    fn describe(&mut self, args: &mut bindings::fuse_args) {
        args.opcode = bindings::fuse_opcode_FUSE_NOTIFY_REPLY as u16;
        args.in_numargs = 1;
        args.in_args[0].size = size_of::<bindings::fuse_notify_restarted_in>() as u32;
        args.in_args[0].value = (&raw const self.input).cast::<c_void>();
        args.set_noreply(true);
    }
}

impl Report {
    pub(super) fn new(report: &RestartedIn) -> Self {
        Self {
            input: report_of(report),
        }
    }
}

/// Memory for one request.
///
/// # Invariants
///
/// - In the state `IN_FLIGHT`, `args` and `kind` belong to the queues and are not touched here.
/// - In the other states they belong to whoever has a mutable reference to the slot.
/// - `args` is the first field, so that `end()` finds the slot.
#[repr(C)]
pub(super) struct Slot<K: Kind> {
    args: UnsafeCell<bindings::fuse_args>,
    restart: Restart,
    state: Atomic<u32>,
    error: Atomic<i32>,
    kind: UnsafeCell<K>,
    /// Requests point to it while they are in flight.
    _pin: core::marker::PhantomPinned,
}

// SAFETY: By the type invariants what the queues use is not used here at the same time.
unsafe impl<K: Kind> Send for Slot<K> {}

// SAFETY: As above; without a mutable reference only the atomics are used.
unsafe impl<K: Kind> Sync for Slot<K> {}

impl<K: Kind> Slot<K> {
    /// An idle slot.
    pub(super) fn new(restart: Restart) -> Self {
        Self {
            args: UnsafeCell::new(bindings::fuse_args::default()),
            restart,
            state: Atomic::new(IDLE),
            error: Atomic::new(0),
            kind: UnsafeCell::new(K::default()),
            _pin: core::marker::PhantomPinned,
        }
    }

    /// Whether it can be sent.
    pub(super) fn is_idle(&self) -> bool {
        self.state.load(Relaxed) == IDLE
    }

    /// Whether the request has ended.
    pub(super) fn has_landed(&self) -> bool {
        // Pairs with the release in `landed()`.
        self.state.load(Acquire) == LANDED
    }

    /// Fills the slot and sends it with `send`.
    ///
    /// # Safety
    ///
    /// `send` must pass the arguments to a queue that calls `end()` once, unless it returns an
    /// error.
    unsafe fn send_with(
        self: Pin<&mut Self>,
        kind: K,
        send: impl FnOnce(*mut bindings::fuse_args) -> Result,
    ) -> Result {
        // SAFETY: The slot is not moved.
        let this = unsafe { self.get_unchecked_mut() };
        if !this.is_idle() {
            return Err(EBUSY);
        }
        *this.kind.get_mut() = kind;
        let args = this.args.get_mut();
        *args = bindings::fuse_args::default();
        // SAFETY: By the type invariants of `Restart`.
        unsafe { bindings::fuse_restart_fill_creds(this.restart.as_ptr(), args) };
        this.kind.get_mut().describe(args);
        args.end = Some(landed::<K>);
        let args = core::ptr::from_mut(this).cast();
        // INVARIANT: From now on the queues have it. They may be done before `send()` returns.
        this.state.store(IN_FLIGHT, Relaxed);
        send(args).inspect_err(|_| {
            // INVARIANT: They never got it.
            this.state.store(IDLE, Relaxed);
        })
    }

    /// Makes a slot idle whose request has ended; returns the error that it ended with.
    ///
    /// Returns `None`, and does nothing, if it has not.
    pub(super) fn take(self: Pin<&mut Self>) -> Option<i32> {
        if !self.has_landed() {
            return None;
        }
        let error = self.error.load(Relaxed);
        self.state.store(IDLE, Relaxed);
        Some(error)
    }
}

impl Slot<Replay> {
    /// Sends a replay, which is void if `epoch` is over.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `EBUSY` if the slot is not idle.
    pub(super) fn send(self: Pin<&mut Self>, replay: Replay, epoch: u32) -> Result {
        let chan = self.restart.chan();
        // SAFETY: `fuse_chan_send_replay()` does as is required: if it does not return an error
        // then `end()` is called, be it in there. The slot is pinned and not freed before.
        unsafe {
            self.send_with(replay, |args| {
                to_result(bindings::fuse_chan_send_replay(chan, args, epoch))
            })
        }
    }

    /// What the server answered. To be called before [`Slot::take`].
    pub(super) fn attr(self: Pin<&mut Self>) -> Option<bindings::fuse_attr> {
        if !self.has_landed() {
            return None;
        }
        // SAFETY: The slot is not moved, and by the type invariants it is ours.
        Some(
            unsafe { self.get_unchecked_mut() }
                .kind
                .get_mut()
                .output
                .attr,
        )
    }
}

impl Slot<Report> {
    /// Sends the report.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `EBUSY` if the slot is not idle.
    pub(super) fn send(self: Pin<&mut Self>, report: Report, cookie: u64, epoch: u32) -> Result {
        let chan = self.restart.chan();
        // SAFETY: As for a replay.
        unsafe {
            self.send_with(report, |args| {
                to_result(bindings::fuse_chan_send_report(chan, args, cookie, epoch))
            })
        }
    }
}

/// `end()` of a request. Takes note and kicks the engine: it may run in any task, under the
/// engine's lock even.
///
/// # Safety
///
/// `args` must be those of a [`Slot<K>`] that is in flight.
unsafe extern "C" fn landed<K: Kind>(args: *mut bindings::fuse_args, error: c_int) {
    let slot = args.cast::<Slot<K>>();
    // SAFETY: By the requirements of this function and since `args` is the first field. While the
    // slot is in flight nobody has a mutable reference, and the fields that are used are atomics,
    // or never written.
    let (restart, state, noted) = unsafe { ((*slot).restart, &(*slot).state, &(*slot).error) };
    noted.store(error, Relaxed);
    // INVARIANT: The queues are done with it. Pairs with the acquire in `has_landed()`.
    state.store(LANDED, Release);
    restart.kick();
}
