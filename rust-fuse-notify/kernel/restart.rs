// SPDX-License-Identifier: GPL-2.0

//! Recovery of a FUSE connection whose server was restarted.
//!
//! A server that takes over a connection says `FUSE_NOTIFY_RESTARTED`. Whatever the last one left
//! unanswered is held then, each cached inode is shown to the new server, and when that has said
//! COMMIT the inodes it does not know are revoked and the held requests are sent again.
//!
//! There are three rings:
//!
//! 1. `proto`, the pure core: it decides. It knows nothing of the kernel, and is also compiled
//!    and tested outside of it.
//! 2. The abstractions `conn`, `inode` and `flight`: all of the `unsafe` but for the entry
//!    points in this file.
//! 3. The C code: `dev_restart.c` does what is done to queues of requests, `restart_glue.c` what
//!    is done to inodes.
//!
//! `engine` puts these together. Begin there.
//!
//! C header: [`fs/fuse/restart.h`](srctree/fs/fuse/restart.h)

use kernel::{
    bindings,
    ffi::{c_int, c_void},
    prelude::*,
    types::ForeignOwnable, //
};

mod conn;
mod engine;
mod flight;
mod inode;
pub mod proto;

use conn::{Alone, Mounted, Restart};
use engine::Engine;

const __LOG_PREFIX: &[u8] = b"fuse\0";

type Handle = Pin<KBox<Engine>>;

/// Borrows the engine behind a pointer that C keeps.
///
/// # Safety
///
/// `engine` must have come from [`fuse_restart_engine_new`], and [`fuse_restart_engine_free`] must
/// not run before the borrow ends.
unsafe fn borrow<'a>(engine: *mut c_void) -> Pin<&'a Engine> {
    // SAFETY: `into_foreign()` made the pointer, and by the requirements of this function nobody
    // takes it back meanwhile. No mutable borrow is ever made.
    unsafe { <Handle as ForeignOwnable>::borrow(engine) }
}

/// Creates the engine of a connection. Returns null if there is no memory.
///
/// # Safety
///
/// `r` must stay valid until [`fuse_restart_engine_free`] returns, and have no other engine;
/// `identity` must point to two numbers.
#[export]
pub unsafe extern "C" fn fuse_restart_engine_new(
    r: *mut bindings::fuse_restart,
    identity: *const u64,
) -> *mut c_void {
    // SAFETY: By the requirements of this function.
    let identity = unsafe { *identity.cast::<[u64; 2]>() };
    // SAFETY: By the requirements of this function it outlives the engine, and has no other one.
    let (restart, alone) = unsafe { (Restart::new(r), Alone::new()) };
    match Engine::new(restart, alone, identity) {
        Ok(engine) => engine.into_foreign(),
        Err(_) => core::ptr::null_mut(),
    }
}

/// Frees the engine.
///
/// # Safety
///
/// `engine` must have come from [`fuse_restart_engine_new`]. None of its requests may be left, no
/// other function of this file may run or be called, and [`fuse_restart_engine_drop`] must have
/// been called if the engine ever had an inode.
#[export]
pub unsafe extern "C" fn fuse_restart_engine_free(engine: *mut c_void) {
    // SAFETY: `into_foreign()` made the pointer, and by the requirements of this function nobody
    // has a borrow.
    drop(unsafe { Handle::from_foreign(engine) });
}

/// A server says RESTARTED or COMMIT.
///
/// # Safety
///
/// `engine` must be alive and `out` must be valid for reads.
#[export]
pub unsafe extern "C" fn fuse_restart_engine_notify(
    engine: *mut c_void,
    out: *const bindings::fuse_notify_restarted_out,
) -> c_int {
    // SAFETY: By the requirements of this function.
    let (engine, out) = unsafe { (borrow(engine), &*out) };
    match engine.notify(&conn::demand_of(out)) {
        Ok(()) => 0,
        Err(e) => e.to_errno(),
    }
}

/// Does what can be done without waiting for the server.
///
/// # Safety
///
/// `engine` must be alive, and the superblock must not go away before this returns.
#[export]
pub unsafe extern "C" fn fuse_restart_engine_run(engine: *mut c_void) {
    // SAFETY: By the requirements of this function.
    let (engine, mounted) = unsafe { (borrow(engine), Mounted::new()) };
    engine.run(&mounted);
}

/// Ends any recovery for good: the superblock is going away.
///
/// # Safety
///
/// `engine` must be alive.
#[export]
pub unsafe extern "C" fn fuse_restart_engine_end(engine: *mut c_void) {
    // SAFETY: By the requirements of this function.
    unsafe { borrow(engine) }.end();
}

/// Returns whether a recovery is still under way.
///
/// # Safety
///
/// `engine` must be alive.
#[export]
pub unsafe extern "C" fn fuse_restart_engine_overdue(engine: *mut c_void) -> bool {
    // SAFETY: By the requirements of this function.
    unsafe { borrow(engine) }.is_recovering()
}

/// Drops all references to inodes. No request may be left.
///
/// # Safety
///
/// `engine` must be alive.
#[export]
pub unsafe extern "C" fn fuse_restart_engine_drop(engine: *mut c_void) {
    // SAFETY: By the requirements of this function.
    unsafe { borrow(engine) }.drop_inodes();
}

/// Tells the state and the numbers.
///
/// # Safety
///
/// `engine` must be alive and `stats` must be valid for writes.
#[export]
pub unsafe extern "C" fn fuse_restart_engine_stats(
    engine: *mut c_void,
    stats: *mut bindings::fuse_restart_stats,
) {
    // SAFETY: By the requirements of this function.
    let (engine, stats) = unsafe { (borrow(engine), &mut *stats) };
    engine.stats(stats);
}

#[kunit_tests(fuse_restart)]
mod tests {
    use super::proto::tables;

    #[test]
    fn verdicts() {
        assert_eq!(tables::verdicts(), Ok(()));
    }

    #[test]
    fn demands() {
        assert_eq!(tables::demands(), Ok(()));
    }

    #[test]
    fn phases() {
        assert_eq!(tables::phases(), Ok(()));
    }

    #[test]
    fn request_ids() {
        assert_eq!(tables::request_ids(), Ok(()));
    }

    #[test]
    fn slots() {
        assert_eq!(tables::slots(), Ok(()));
    }
}
