// SPDX-License-Identifier: GPL-2.0
//! Reading and writing whole messages on a `/dev/fuse` descriptor.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};

/// Writes one message. The device takes it whole or not at all; a signal is no reason to give up.
pub(crate) fn write(device: BorrowedFd<'_>, message: &[u8]) -> Result<(), Errno> {
    #[cfg(test)]
    if let Some(result) = fake::write(message) {
        return result;
    }
    loop {
        match nix::unistd::write(device, message) {
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

/// Reads one message; waits for it, on a non-blocking descriptor too.
pub(crate) fn read(device: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    #[cfg(test)]
    if let Some(result) = fake::read(buffer) {
        return result;
    }
    loop {
        match nix::unistd::read(device, buffer) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait_readable(device)?,
            // The request that was about to be read was interrupted; there may be another.
            Err(Errno::ENOENT) => {}
            other => return other,
        }
    }
}

/// Waits until there is something to read.
pub(crate) fn wait_readable(device: BorrowedFd<'_>) -> Result<(), Errno> {
    wait(device, PollTimeout::NONE).map(drop)
}

/// Whether there is something to read now.
pub(crate) fn is_readable(device: BorrowedFd<'_>) -> Result<bool, Errno> {
    wait(device, PollTimeout::ZERO).map(|events| events.contains(PollFlags::POLLIN))
}

/// Whether the connection was aborted or unmounted.
pub(crate) fn is_gone(device: BorrowedFd<'_>) -> Result<bool, Errno> {
    // A refused root has POLLIN beside POLLERR; it is not gone.
    wait(device, PollTimeout::ZERO)
        .map(|events| events.contains(PollFlags::POLLERR) && !events.contains(PollFlags::POLLIN))
}

fn wait(device: BorrowedFd<'_>, timeout: PollTimeout) -> Result<PollFlags, Errno> {
    let mut fds = [PollFd::new(device, PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => {}
            Err(other) => return Err(other),
            Ok(_) => return Ok(fds[0].revents().unwrap_or(PollFlags::empty())),
        }
    }
}

/// In tests: a kernel in this thread that answers, as the real one does, within the caller's `write(2)`.
#[cfg(test)]
pub(crate) mod fake {
    use std::cell::RefCell;

    use nix::errno::Errno;

    /// What a test plays.
    pub(crate) trait Kernel {
        fn write(&mut self, message: &[u8]) -> Result<(), Errno>;
        /// The next message, or an error. Nothing to read would block for ever: a test that gets there panics.
        fn read(&mut self) -> Result<Vec<u8>, Errno>;
    }

    thread_local! {
        static KERNEL: RefCell<Option<Box<dyn Kernel>>> = const { RefCell::new(None) };
    }

    /// Runs `test` with `kernel` behind every descriptor that this thread reads and writes.
    pub(crate) fn with<R>(kernel: Box<dyn Kernel>, test: impl FnOnce() -> R) -> R {
        KERNEL.with(|slot| *slot.borrow_mut() = Some(kernel));
        let result = test();
        KERNEL.with(|slot| *slot.borrow_mut() = None);
        result
    }

    pub(super) fn write(message: &[u8]) -> Option<Result<(), Errno>> {
        KERNEL.with(|slot| {
            slot.borrow_mut()
                .as_mut()
                .map(|kernel| kernel.write(message))
        })
    }

    pub(super) fn read(buffer: &mut [u8]) -> Option<Result<usize, Errno>> {
        KERNEL.with(|slot| {
            slot.borrow_mut().as_mut().map(|kernel| {
                let message = kernel.read()?;
                let room = buffer.get_mut(..message.len()).ok_or(Errno::EINVAL)?;
                room.copy_from_slice(&message);
                Ok(message.len())
            })
        })
    }
}
