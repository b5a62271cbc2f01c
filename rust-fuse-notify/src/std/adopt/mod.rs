// SPDX-License-Identifier: GPL-2.0
//! Taking over a connection: the library owns the handshake.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use super::message::{Replay, Report};
use super::notify::{Notifier, Support};
use super::state::State;
use super::wire::{Attr, Identity};

/// Why a connection could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Not implemented.
    #[error("not yet")]
    NotYet,
}

/// An error of the server's own.
pub type ServerError = Box<dyn std::error::Error + Send + Sync>;

/// What the author of a server says during a recovery. Nothing of it is called at the first start, but
/// [`Recover::identity`].
pub trait Recover {
    /// Which file system this is; the same in every instance.
    fn identity(&self) -> Identity;

    /// Resolve every intent of [`super::state::Journal::unresolved`]: find it done, finish it or undo it. Called
    /// before the first replay is answered, also on kernels without replays.
    ///
    /// # Errors
    /// Whatever keeps the server from going on; the adoption ends with it.
    fn resolve(&mut self, state: &State) -> Result<(), ServerError>;

    /// The kernel shows an inode. If it is the same file still: [`super::state::NodeTable::confirm`] it with
    /// `nlookup` and return its attributes; the kernel compares type and inode number. Must not wait for a lock
    /// that an application holds.
    ///
    /// # Errors
    /// A positive errno (`ESTALE` for what is not known): applications get `EIO` for this inode from now on. An
    /// error for the root (nodeid 1) refuses the whole recovery.
    fn replay(&mut self, state: &State, replay: &Replay) -> Result<Attr, i32>;

    /// All inodes were shown: call [`State::settle`]. Called before COMMIT. `None`: this kernel replays nothing, the
    /// tables stay as they are.
    ///
    /// # Errors
    /// Whatever keeps the server from going on; the adoption ends with it.
    fn finish(&mut self, state: &State, report: Option<&Report>) -> Result<(), ServerError>;
}

/// How a connection was taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// First server on this mount; what a later one can expect.
    First(Support),
    /// Recovered with replay, report and COMMIT.
    Recovered {
        /// The kernel's report.
        report: Report,
        /// From RESTARTED to COMMIT.
        took: Duration,
    },
    /// The kernel sent unanswered requests again; it held nothing and replayed nothing.
    Resent,
    /// The kernel can do neither: requests that the dead server had read are never answered.
    Nothing,
}

/// A connection that was taken over, ready to be served.
#[derive(Debug)]
pub struct Adopted<S> {
    /// What the author's closure made, now on the real descriptor; for fuser: call `run()`.
    pub session: S,
    /// How it went.
    pub how: How,
    /// For notifications of the server's own.
    pub notifier: Notifier<'static>,
}

/// A descriptor of `/dev/fuse` and a state, before the connection is taken over.
#[derive(Debug)]
pub struct Adopt {
    device: OwnedFd,
    state: Arc<State>,
}

impl Adopt {
    /// `device` must be mounted (or about to be) and blocking.
    pub fn new(device: OwnedFd, state: Arc<State>) -> Adopt {
        Adopt { device, state }
    }

    /// Takes the connection over. `session` gets a descriptor on which it finds INIT, answers it, and hands back
    /// what owns that descriptor; with fuser: `|fd| Session::from_fd(fs, fd, acl, config)`.
    ///
    /// # Errors
    /// [`AdoptError`]; the next instance can try again.
    pub fn run<R, S, F>(self, _recover: &mut R, _session: F) -> Result<Adopted<S>, AdoptError>
    where
        R: Recover,
        S: AsFd,
        F: FnOnce(OwnedFd) -> io::Result<S>,
    {
        let _ = (self.device, self.state);
        Err(AdoptError::NotYet)
    }
}
