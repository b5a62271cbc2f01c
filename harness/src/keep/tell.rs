// SPDX-License-Identifier: GPL-2.0
//! What the keeper says to the kernel when its server has died.
//!
//! RESTARTED at once, long before a new server runs: from then on the kernel holds every request and wakes nobody in
//! vain. The new server says it again for itself. Kernels without the series get RESEND, which is all they know.

use std::os::fd::{AsFd, OwnedFd};

use rust_fuse_notify::std::notify::{Notifier, NotifyError};
use rust_fuse_notify::std::state::{Stage, State};
use rust_fuse_notify::std::wire::Identity;

/// What came of it.
#[derive(Debug)]
pub enum Told {
    /// The kernel holds everything and will replay to the next server.
    Restarted,
    /// Old kernel, or a server that did not sign: unanswered requests are queued again, nothing more.
    Resent,
    /// The dead server never answered INIT: the mount is of no use, make a new one.
    NeverInitialised,
    /// The kernel refused both.
    Refused(NotifyError),
}

/// Tells the kernel that the server behind `device` is gone. `init_stored`: does the state memfd hold an INIT pair?
pub fn server_died(device: &OwnedFd, init_stored: bool) -> Told {
    let kernel = Notifier::new(device.as_fd());
    match kernel.initialized() {
        Ok(true) => {}
        Ok(false) => return Told::NeverInitialised,
        Err(e) => return Told::Refused(e),
    }
    match kernel.restarted(Notifier::cookie(), Identity::UNSAID) {
        Ok(()) => Told::Restarted,
        // An old kernel, which takes notifications at any time: only the state knows. Without a stored answer no other
        // server could follow this one, whether it answered or not; a stored one the next server gives once more.
        Err(NotifyError::NotUnderstood) if !init_stored => Told::NeverInitialised,
        Err(NotifyError::NotUnderstood | NotifyError::NotGranted) => match kernel.resend() {
            Ok(()) => Told::Resent,
            Err(e) => Told::Refused(e),
        },
        Err(e) => Told::Refused(e),
    }
}

/// Does the memfd say that INIT was answered, or with what? A damaged one is left to the next server, which says what is wrong.
pub fn init_stored(state: &OwnedFd) -> bool {
    !matches!(State::peek(state.as_fd()), Ok(Stage::BeforeInit))
}
