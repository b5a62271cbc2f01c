// SPDX-License-Identifier: GPL-2.0
//! Unmounts in a thread of its own: umount2(2) waits for writeback, which waits for a server, which may die
//! and be started again meanwhile, by the loop that must therefore not wait here.  Looking for who keeps the mount busy
//! may wait in the same way (see [`busy`]), so it is done here too.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::busy::{self, Holder};
use super::mount::Ours;

const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    Clean,
    Lazily,
}

impl How {
    pub fn name(self) -> &'static str {
        match self {
            How::Clean => "clean",
            How::Lazily => "lazily",
        }
    }
}

/// How it ended, and who holds the mount if it is busy.
pub struct Outcome {
    pub how: How,
    pub result: nix::Result<()>,
    pub holders: Vec<Holder>,
}

pub struct Unmounter {
    mountpoint: PathBuf,
    done: Arc<EventFd>,
    sender: Sender<Outcome>,
    results: Receiver<Outcome>,
    running: bool,
    busy: bool,
}

impl Unmounter {
    pub fn new(mountpoint: PathBuf) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let done = Arc::new(EventFd::from_flags(flags).context("eventfd")?);
        let (sender, results) = channel();
        Ok(Self {
            mountpoint,
            done,
            sender,
            results,
            running: false,
            busy: false,
        })
    }

    /// `device`: of the connection, by which it is known.
    pub fn start(&mut self, how: How, connection: u32, device: OwnedFd) {
        if self.running {
            return;
        }
        self.running = true;
        self.busy = false;
        let (mountpoint, done, sender) = (
            self.mountpoint.clone(),
            self.done.clone(),
            self.sender.clone(),
        );
        std::thread::spawn(move || {
            // A failed send or write means that the keeper has ended.
            let ours = Ours {
                mountpoint: &mountpoint,
                connection,
                device: &device,
            };
            let (result, holders) = match how {
                How::Clean => unless_held(|| ours.unmount(), || busy::holders(&mountpoint)),
                How::Lazily => (ours.unmount_lazily(), Vec::new()),
            };
            let _ = sender.send(Outcome {
                how,
                result,
                holders,
            });
            let _ = done.write(1);
        });
    }

    pub fn running(&self) -> bool {
        self.running
    }

    /// Did the last attempt fail because the mount is in use?
    pub fn was_busy(&self) -> bool {
        self.busy
    }

    pub fn finished(&mut self) -> Option<Outcome> {
        let _ = self.done.read();
        let outcome = self.results.try_recv().ok()?;
        self.running = false;
        self.busy = outcome.result == Err(Errno::EBUSY);
        Some(outcome)
    }
}

/// Tries again while the mount is busy and nobody is to be seen who holds it, for at most a second.  A process between
/// fork and exec has every file of its parent open, and whoever ends closes his files after he has gone from /proc.
fn unless_held(
    mut unmount: impl FnMut() -> nix::Result<()>,
    mut holders: impl FnMut() -> Vec<Holder>,
) -> (nix::Result<()>, Vec<Holder>) {
    for _ in 0..TRIES {
        match unmount() {
            Err(Errno::EBUSY) => {}
            result => return (result, Vec::new()),
        }
        let seen = holders();
        if !seen.is_empty() {
            return (Err(Errno::EBUSY), seen);
        }
        std::thread::sleep(PAUSE);
    }
    (Err(Errno::EBUSY), Vec::new())
}

impl AsFd for Unmounter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_for_a_moment_is_not_busy() {
        let mut attempts = 0;
        let (result, holders) = unless_held(
            || {
                attempts += 1;
                match attempts {
                    1 | 2 => Err(Errno::EBUSY),
                    _ => Ok(()),
                }
            },
            Vec::new,
        );
        assert_eq!((result, holders.len(), attempts), (Ok(()), 0, 3));
    }

    #[test]
    fn who_is_seen_is_told_at_once() {
        let mut attempts = 0;
        let holder = || Holder {
            pid: 7,
            name: "sh".into(),
            how: "cwd".into(),
        };
        let busy = || {
            attempts += 1;
            Err(Errno::EBUSY)
        };
        let (result, holders) = unless_held(busy, || vec![holder()]);
        assert_eq!((result, holders.len(), attempts), (Err(Errno::EBUSY), 1, 1));
    }

    #[test]
    fn held_by_no_process_comes_to_an_end() {
        let mut attempts = 0;
        let busy = || {
            attempts += 1;
            Err(Errno::EBUSY)
        };
        let (result, holders) = unless_held(busy, Vec::new);
        assert_eq!((result, holders.len()), (Err(Errno::EBUSY), 0));
        assert_eq!(attempts, TRIES);
    }

    #[test]
    fn other_errors_are_not_tried_again() {
        let mut attempts = 0;
        let denied = || {
            attempts += 1;
            Err(Errno::EPERM)
        };
        assert_eq!(unless_held(denied, Vec::new).0, Err(Errno::EPERM));
        assert_eq!(attempts, 1);
    }
}
