// SPDX-License-Identifier: GPL-2.0

//! Requests of the engine's own.
//!
//! A [`Slot`] is memory for one request: [`Replay`] or [`Report`]. It is allocated once and used
//! again and again:
//!
//! 1. *idle*: nobody uses it.
//! 2. *taken*: the engine fills it.
//! 3. *in flight*: it belongs to the queues, which read the arguments and write the answer.
//! 4. *landed*: `end()` ran, in whatever task ended the request. It only took note and kicked the
//!    engine, which takes the slot again, reads the answer and makes it idle.
//!
//! A slot that is in flight when its recovery is over is ended by the sweep, or by the reader or
//! writer that is just copying it. Until then it is not used, nor is its memory given back: see
//! [`Berth`].

use super::{
    conn::{report_of, Restart},
    inode::Claim,
    proto::{
        verdict::Shown,
        wire::{RestartedIn, GETATTR_REPLAY}, //
    }, //
};
use core::{
    cell::UnsafeCell,
    mem::{size_of, ManuallyDrop},
    ops::Deref,
    pin::Pin, //
};
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
const TAKEN: u32 = 1;
const IN_FLIGHT: u32 = 2;
const LANDED: u32 = 3;

/// What differs between the kinds of request.
///
/// # Safety
///
/// [`Kind::describe`] must set up arguments that point to this object only, and no longer than it
/// is.
pub(super) unsafe trait Kind: Default + Send {
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
/// - In the state `IN_FLIGHT`, `args` and `kind` belong to the queues.
/// - In the state `TAKEN` they belong to whoever changed the state to that.
/// - In the other states nobody uses them.
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

// SAFETY: By the type invariants `args` and `kind` have one user at a time, whatever its thread.
unsafe impl<K: Kind> Send for Slot<K> {}

// SAFETY: As above; everything else is atomic, or never written.
unsafe impl<K: Kind> Sync for Slot<K> {}

impl<K: Kind> Slot<K> {
    /// An idle slot.
    fn new(restart: Restart) -> Self {
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

    /// Takes the slot if its state is `from`.
    fn seize(&self, from: u32) -> bool {
        // INVARIANT: Nobody else changed the state to `TAKEN`, and in no state that this is called
        // for does anybody use the slot. Pairs with each release: what the last user did is seen.
        self.state.cmpxchg(from, TAKEN, Acquire).is_ok()
    }

    /// Fills the slot and sends it with `send`.
    ///
    /// # Safety
    ///
    /// `send` must pass the arguments to a queue that calls `end()` once, unless it returns an
    /// error. Until then the slot must not be freed.
    unsafe fn send_with(
        self: Pin<&Self>,
        kind: K,
        send: impl FnOnce(*mut bindings::fuse_args) -> Result,
    ) -> Result {
        if !self.seize(IDLE) {
            return Err(EBUSY);
        }
        {
            // SAFETY: By the type invariants these are ours as long as the slot is taken.
            let (args, mine) = unsafe { (&mut *self.args.get(), &mut *self.kind.get()) };
            *mine = kind;
            *args = bindings::fuse_args::default();
            // SAFETY: By the type invariants of `Restart`.
            unsafe { bindings::fuse_restart_fill_creds(self.restart.as_ptr(), args) };
            mine.describe(args);
            args.end = Some(landed::<K>);
        }
        // By the type invariants the arguments come first, and `end()` gets back to the slot: this
        // points to the slot, not to a field of it.
        let args = core::ptr::from_ref(self.get_ref()).cast_mut().cast();
        // INVARIANT: From now on the queues have it. They may be done before `send()` returns.
        self.state.store(IN_FLIGHT, Relaxed);
        send(args).inspect_err(|_| {
            // INVARIANT: They never got it.
            self.state.store(IDLE, Release);
        })
    }

    /// Makes a slot idle whose request has ended; returns the error that it ended with, and what
    /// `read` finds in it.
    ///
    /// Returns `None`, and does nothing, if it has not.
    fn take_with<R>(&self, read: impl FnOnce(&K) -> R) -> Option<(i32, R)> {
        if !self.seize(LANDED) {
            return None;
        }
        let error = self.error.load(Relaxed);
        // SAFETY: By the type invariants it is ours as long as the slot is taken.
        let found = read(unsafe { &*self.kind.get() });
        // INVARIANT: It is not used any more.
        self.state.store(IDLE, Release);
        Some((error, found))
    }
}

/// A slot on the heap, which stays there as long as a request uses it.
///
/// None is in flight when the engine goes away: C frees it when the connection has no request
/// left. Should that ever be wrong then memory is lost, not used after it was freed.
pub(super) struct Berth<K: Kind>(ManuallyDrop<Pin<KBox<Slot<K>>>>);

impl<K: Kind> Berth<K> {
    /// Memory for an idle slot.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(super) fn new(restart: Restart) -> Result<Self> {
        let slot = KBox::pin(Slot::new(restart), GFP_KERNEL_ACCOUNT)?;
        Ok(Self(ManuallyDrop::new(slot)))
    }
}

impl<K: Kind> Deref for Berth<K> {
    type Target = Slot<K>;

    fn deref(&self) -> &Slot<K> {
        &self.0
    }
}

impl<K: Kind> Drop for Berth<K> {
    fn drop(&mut self) {
        // Pairs with the release in `landed()`.
        if self.0.state.load(Acquire) == IN_FLIGHT {
            pr_err!("a request of a recovery is still in flight, its memory is lost\n");
            return;
        }
        // SAFETY: It is not used after this.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}

impl Berth<Replay> {
    /// Sends a replay, which is void if `epoch` is over.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `EBUSY` if the slot is not idle.
    pub(super) fn send(&self, replay: Replay, epoch: u32) -> Result {
        let chan = self.restart.chan();
        // SAFETY: `fuse_chan_send_replay()` does as is required: if it does not return an error
        // then `end()` is called, be it in there. A `Berth` frees no slot before that.
        unsafe {
            self.0.as_ref().send_with(replay, |args| {
                to_result(bindings::fuse_chan_send_replay(chan, args, epoch))
            })
        }
    }
}

impl Slot<Replay> {
    /// Makes the slot idle if its request has ended; returns the error that it ended with, and
    /// what the server answered.
    pub(super) fn take(&self) -> Option<(i32, bindings::fuse_attr)> {
        self.take_with(|replay| replay.output.attr)
    }
}

impl Berth<Report> {
    /// Sends the report.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `EBUSY` if the slot is not idle.
    pub(super) fn send(&self, report: Report, cookie: u64, epoch: u32) -> Result {
        let chan = self.restart.chan();
        // SAFETY: As for a replay.
        unsafe {
            self.0.as_ref().send_with(report, |args| {
                to_result(bindings::fuse_chan_send_report(chan, args, cookie, epoch))
            })
        }
    }
}

impl Slot<Report> {
    /// Makes the slot idle if its request has ended; returns whether it had.
    pub(super) fn take(&self) -> bool {
        self.take_with(|_| ()).is_some()
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
    // SAFETY: By the requirements of this function and since `args` is the first field. Nobody ever
    // has a mutable reference to a slot.
    let slot = unsafe { &*slot };
    // From `LANDED` on the slot is somebody else's, and may be gone.
    let restart = slot.restart;
    slot.error.store(error, Relaxed);
    // INVARIANT: The queues are done with it. Pairs with the acquire in `seize()`.
    slot.state.store(LANDED, Release);
    restart.kick();
}
