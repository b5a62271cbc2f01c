// SPDX-License-Identifier: GPL-2.0
//! SIGTERM: die at once while mounted, finish when unmounted.
//!
//! A keeper sends it to replace the server, which may die at any moment anyway, and after it has
//! unmounted, when the server is about to remove what it left in the backing.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{raise, SigSet, Signal};
use rust_fuse_notify::std::state::State;

/// How long the clean-up after an unmount may take once SIGTERM has come. Whoever sends it has a limit of its own, which
/// is shorter, and sees what a machine is busy with; the crash matrix found 5 s to be too short on one that was.
const FINISH: Duration = Duration::from_secs(60);

/// Call it before other threads are made: they must not take the signal.
pub fn on_term(device: OwnedFd, state: Arc<State>) -> anyhow::Result<()> {
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    term.thread_block().context("cannot block SIGTERM")?;
    std::thread::Builder::new()
        .name("sigterm".into())
        .spawn(move || loop {
            if term.wait().is_ok() {
                if unmounted(&device) {
                    std::thread::sleep(FINISH); // the end of main() ends this thread as well
                }
                // What it has in its hands is not what it died of.
                state.flights().leave();
                // As if the signal had not been caught: whoever sent it sees what it expects.
                let _ = term.thread_unblock();
                let _ = raise(Signal::SIGTERM);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// The kernel shows POLLERR on a device whose connection is gone.
fn unmounted(device: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(device.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds[0]
            .revents()
            .is_some_and(|e| e.contains(PollFlags::POLLERR))
}
