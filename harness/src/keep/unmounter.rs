// SPDX-License-Identifier: GPL-2.0
//! Unmounts in a thread of its own: umount2(2) waits for writeback, which waits for a server, which may die
//! and be started again meanwhile, by the loop that must therefore not wait here.  Looking for who keeps the mount busy
//! may wait in the same way (see [`busy`]), so it is done here too.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::Arc;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::busy::{self, Holder};
use super::mount;

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

    pub fn start(&mut self, how: How) {
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
            let result = match how {
                How::Clean => mount::unmount(&mountpoint),
                How::Lazily => mount::unmount_lazily(&mountpoint),
            };
            let holders = match result {
                Err(Errno::EBUSY) => busy::holders(&mountpoint),
                _ => Vec::new(),
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

impl AsFd for Unmounter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }
}
