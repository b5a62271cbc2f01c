// SPDX-License-Identifier: GPL-2.0
//! Taking over a connection: the library owns the handshake.
//!
//! A FUSE library such as `fuser` insists on answering INIT itself, and the kernel says INIT only once. So the
//! library that runs the session never sees the real descriptor during its handshake: it gets one end of a
//! socketpair, finds INIT there (the kernel's, or the one that was kept), answers it, and then the real descriptor
//! is put under the number that it owns.
//!
//! ```text
//! first start    INIT from the kernel -> session -> reply + identity -> memfd -> kernel
//! later          RESTARTED -> resolve() -> replay()* -> report -> finish()
//!                kept INIT -> session -> reply, compared -> COMMIT
//! old kernel     resolve() -> finish(None) -> kept INIT -> session -> RESEND
//! ```
//!
//! A server may be killed at any point of this. The next one begins again: RESTARTED voids what was, counts are
//! *set*, and an INIT that was read and not answered lies in the memfd.

mod error;
mod handshake;
mod recovery;
mod rehearse;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod fake_kernel;
#[cfg(test)]
mod test_support;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

pub use error::AdoptError;
pub use rehearse::{rehearse, RehearseError};

use super::device;
use super::message::{Replay, Report};
use super::notify::{Notifier, NotifyError, Support};
use super::state::{Keep, State};
use super::wire::{Attr, Identity, FUSE_ATOMIC_O_TRUNC, FUSE_FLOCK_LOCKS, FUSE_POSIX_LOCKS};

/// An error of the server's own.
pub type ServerError = Box<dyn std::error::Error + Send + Sync>;

/// What only the author of a server knows, asked for during a recovery. At the first start nothing of it is called.
///
/// A server that changes nothing, or whose every change can be repeated, implements [`Recover::replay`] and no more.
pub trait Recover {
    /// Resolve every intent of [`super::state::Journal::unresolved`]: find it done, finish it or undo it. Called
    /// before the first replay is answered, also on kernels without replays. As it is here it is for servers that
    /// have no intents.
    ///
    /// # Errors
    /// Whatever keeps the server from going on; the adoption ends with it.
    fn resolve(&mut self, state: &State) -> Result<(), ServerError> {
        match state.journal().unresolved().first() {
            None => Ok(()),
            Some(intent) => Err(format!(
                "request {:#x} (opcode {}) may or may not have been executed, and this server does not implement \
                 Recover::resolve",
                intent.id, intent.opcode
            )
            .into()),
        }
    }

    /// The kernel shows an inode. Return its attributes if it is the same file still; the kernel compares `ino` and
    /// the type in `mode`, and takes no other from here. A node of the table gets the kernel's lookup count then;
    /// [`super::state::NodeTable::replayed`] finds it. Must not wait for a lock that an application holds.
    ///
    /// # Errors
    /// A positive errno (`ESTALE` for what is not known): applications get `EIO` for this inode from now on. An
    /// error for the root (nodeid 1) refuses the whole recovery. What is of this instance and says nothing of the
    /// file, `EMFILE`, `ENFILE`, `ENOMEM`, `EINTR` and `EAGAIN`, is not an answer: the adoption ends with
    /// [`AdoptError::NothingLearned`], and the next instance is shown everything again.
    fn replay(&mut self, state: &State, replay: &Replay) -> Result<Attr, i32>;

    /// All inodes were shown: call [`State::settle`], which is all that is done here. Called before COMMIT. `None`:
    /// this kernel replays nothing, the tables stay as they are.
    ///
    /// # Errors
    /// Whatever keeps the server from going on; the adoption ends with it.
    fn finish(&mut self, state: &State, report: Option<&Report>) -> Result<(), ServerError> {
        if let Some(report) = report {
            state.settle(report, |_| Keep::Drop);
        }
        Ok(())
    }
}

/// How a connection was taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// First server on this mount; what a later one can expect.
    First(Support),
    /// Recovered with replay, report and COMMIT.
    Recovered {
        /// The kernel's report.
        report: Report,
        /// From RESTARTED until COMMIT could be said.
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
    /// `device` is mounted, and blocking if the session expects that (fuser does).
    pub fn new(device: OwnedFd, state: Arc<State>) -> Adopt {
        Adopt { device, state }
    }

    /// Takes the connection over. `session` gets a descriptor on which it finds INIT, answers it, and hands back
    /// what owns that descriptor, without reading on; with fuser: `|fd| Session::from_fd(fs, fd, acl, config)`.
    ///
    /// # Errors
    /// [`AdoptError`]; unless it says that the mount is gone, the next instance can try again.
    pub fn run<R, S, F>(self, recover: &mut R, session: F) -> Result<Adopted<S>, AdoptError>
    where
        R: Recover,
        S: AsFd,
        F: FnOnce(OwnedFd) -> io::Result<S>,
    {
        let ours = self.state.identity();
        let fd = self.device.as_fd();
        let (session, how) = match self.stage()? {
            Stage::Unread => {
                let request = self.read_init()?;
                self.first(&request, ours, session)?
            }
            Stage::Read(request) => self.first(&request, ours, session)?,
            Stage::JustAnswered => (self.play_again(session)?, How::First(self.support()?)),
            Stage::Serving => self.later(recover, session)?,
        };
        handshake::put_under(fd, &session)?;
        if let How::Recovered { .. } | How::First(Support::Granted) = how {
            tracing::debug!(?how, "took the connection over");
        }
        Ok(Adopted {
            session,
            how: self.release(how, ours)?,
            notifier: Notifier::owned(self.device),
        })
    }

    /// What has to be said once the session is on the real descriptor.
    fn release(&self, how: How, identity: Identity) -> Result<How, AdoptError> {
        let notifier = Notifier::new(self.device.as_fd());
        match how {
            How::Recovered { report, took } => {
                match notifier.commit(report.cookie, report.epoch, identity) {
                    Ok(()) => Ok(How::Recovered { report, took }),
                    Err(NotifyError::WrongEpoch { .. }) => Err(AdoptError::Superseded),
                    Err(other) => Err(other.into()),
                }
            }
            How::Resent => match notifier.resend() {
                Ok(()) => Ok(How::Resent),
                Err(NotifyError::NotUnderstood) if !self.is_gone()? => {
                    tracing::warn!("this kernel has neither RESTARTED nor RESEND: requests that the dead server had read stay unanswered");
                    Ok(How::Nothing)
                }
                Err(NotifyError::NotUnderstood) => Err(AdoptError::Gone),
                Err(other) => Err(other.into()),
            },
            other => Ok(other),
        }
    }
}

/// Without the series, or without the flag.
const NOT_GUARANTEED: &str = "after a crash unanswered requests are resent if the kernel can (Linux 6.9), no more: a \
    request that a reader dies over gets EIO, those that nobody had read are not held, cached inodes are not checked, \
    and lookup counts drift";

/// How far earlier instances came with the handshake.
enum Stage {
    /// The kernel's INIT is unread.
    Unread,
    /// It was read, and the kernel waits for its answer.
    Read(Vec<u8>),
    /// The reply of an earlier instance has just been written.
    JustAnswered,
    /// The kernel had its answer before.
    Serving,
}

impl Adopt {
    fn stage(&self) -> Result<Stage, AdoptError> {
        let (fd, init) = (self.device.as_fd(), self.state.init());
        if init.is_answered() {
            return Ok(Stage::Serving);
        }
        if let Some(reply) = init.reply() {
            // Killed around its write: the kernel knows the request's id as long as it has no answer.
            match device::write(fd, &reply) {
                Ok(()) => {
                    init.set_answered();
                    return Ok(Stage::JustAnswered);
                }
                Err(Errno::ENOENT) if self.is_initialized()? => {
                    init.set_answered();
                    return Ok(Stage::Serving);
                }
                // A new mount with the memfd of one that never came to life.
                Err(Errno::ENOENT) => return Ok(Stage::Unread),
                Err(errno) => {
                    return Err(error::device("answering INIT for an instance that died")(
                        errno,
                    ))
                }
            }
        }
        match init.request() {
            // Before INIT is answered nothing else is to be read, so this one is new.
            Some(_) if device::is_readable(fd).map_err(error::device("polling"))? => {
                Ok(Stage::Unread)
            }
            Some(request) => Ok(Stage::Read(request)),
            None => Ok(Stage::Unread),
        }
    }

    fn is_initialized(&self) -> Result<bool, AdoptError> {
        let notifier = Notifier::new(self.device.as_fd());
        Ok(notifier.probe()? != Support::OldKernel || notifier.initialized()?)
    }

    fn is_gone(&self) -> Result<bool, AdoptError> {
        device::is_gone(self.device.as_fd()).map_err(error::device("polling"))
    }

    fn read_init(&self) -> Result<Vec<u8>, AdoptError> {
        let fd = self.device.as_fd();
        // Reading would take a request from an application, which only the missing state could answer.
        match Notifier::new(fd).probe() {
            Ok(Support::OldKernel) => {}
            Ok(_) => return Err(AdoptError::StateLost),
            Err(NotifyError::Io(error)) if error.raw_os_error() == Some(libc::EPERM) => {
                return Err(AdoptError::NotMounted)
            }
            Err(other) => return Err(other.into()),
        }
        loop {
            match self.state.init().read_request(fd) {
                Ok(request) => return Ok(request),
                Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                    Errno::EINTR | Errno::ENOENT => {}
                    Errno::EAGAIN => {
                        device::wait_readable(fd).map_err(error::device("waiting for INIT"))?
                    }
                    errno => return Err(error::device("reading INIT")(errno)),
                },
            }
        }
    }

    /// First start: the kernel's INIT goes to the session, the session's reply to the kernel.
    fn first<S: AsFd>(
        &self,
        request: &[u8],
        identity: Identity,
        session: impl FnOnce(OwnedFd) -> io::Result<S>,
    ) -> Result<(S, How), AdoptError> {
        handshake::check_request(request)?;
        let (session, mut reply) = handshake::play(request, session)?;
        if handshake::is_signed(request, &reply) {
            handshake::put_identity(&mut reply, identity);
        }
        let init = self.state.init();
        if !init.set_reply(&reply) {
            return Err(AdoptError::NoReply(format!(
                "{} bytes were written",
                reply.len()
            )));
        }
        match device::write(self.device.as_fd(), &reply) {
            Ok(()) => init.set_answered(),
            Err(Errno::ENOENT) if self.is_gone()? => return Err(AdoptError::Gone),
            Err(Errno::ENOENT) => return Err(AdoptError::InitLost),
            Err(errno) => return Err(error::device("answering INIT")(errno)),
        }
        Ok((session, How::First(self.support()?)))
    }

    /// What a later instance can expect; said once if that is less than the promise.
    fn support(&self) -> Result<Support, AdoptError> {
        let support = Notifier::new(self.device.as_fd()).probe()?;
        match support {
            Support::Granted => self.warn_of_what_breaks_the_contract(),
            Support::NotGranted if self.is_signed() => tracing::warn!(
                "the kernel did not grant FUSE_RESTARTABLE, although the server signed: passthrough and io_uring \
                 exclude it; {NOT_GUARANTEED}"
            ),
            Support::NotGranted => {
                tracing::warn!("the server did not ask for FUSE_RESTARTABLE: {NOT_GUARANTEED}")
            }
            Support::OldKernel => {
                tracing::warn!("this kernel has no FUSE_NOTIFY_RESTARTED: {NOT_GUARANTEED}")
            }
        }
        Ok(support)
    }

    /// Clause 3 of the contract: what cannot survive a server must not be negotiated, unless the server knows how.
    fn warn_of_what_breaks_the_contract(&self) {
        let flags =
            handshake::reply_body(&self.state.init().reply().unwrap_or_default()).all_flags();
        if flags & (FUSE_POSIX_LOCKS | FUSE_FLOCK_LOCKS) != 0 {
            tracing::warn!(
                "the server keeps locks for the kernel: every later instance must know them"
            );
        }
        if flags & FUSE_ATOMIC_O_TRUNC != 0 {
            tracing::warn!(
                "the server truncates on OPEN: a resent one can erase what was written since"
            );
        }
    }

    /// Whether the kept handshake asked for recovery.
    fn is_signed(&self) -> bool {
        let init = self.state.init();
        init.request()
            .zip(init.reply())
            .is_some_and(|(request, reply)| handshake::is_signed(&request, &reply))
    }

    /// Plays the kept INIT; the session must answer it as the kernel was answered.
    fn play_again<S: AsFd>(
        &self,
        session: impl FnOnce(OwnedFd) -> io::Result<S>,
    ) -> Result<S, AdoptError> {
        let init = self.state.init();
        let (Some(request), Some(stored)) = (init.request(), init.reply()) else {
            return Err(AdoptError::StateLost);
        };
        let (session, reply) = handshake::play(&request, session)?;
        handshake::compare(
            &handshake::reply_body(&stored),
            &handshake::reply_body(&reply),
        )?;
        Ok(session)
    }

    fn later<R: Recover, S: AsFd>(
        &self,
        recover: &mut R,
        session: impl FnOnce(OwnedFd) -> io::Result<S>,
    ) -> Result<(S, How), AdoptError> {
        let (fd, state) = (self.device.as_fd(), &*self.state);
        let stored = handshake::reply_body(&state.init().reply().ok_or(AdoptError::StateLost)?);
        let began = Instant::now();
        let Some(cookie) = self.say_restarted(fd, state.identity())? else {
            recover.resolve(state).map_err(AdoptError::Resolve)?;
            recover.finish(state, None).map_err(AdoptError::Finish)?;
            return Ok((self.play_again(session)?, How::Resent));
        };
        state.nodes().begin_replay();
        recover.resolve(state).map_err(AdoptError::Resolve)?;
        let report = recovery::replay_all(fd, cookie, stored.max_write, recover, state)?;
        recover
            .finish(state, Some(&report))
            .map_err(AdoptError::Finish)?;
        let session = self.play_again(session)?;
        Ok((
            session,
            How::Recovered {
                report,
                took: began.elapsed(),
            },
        ))
    }

    /// The cookie of the recovery, or `None` where there is none to be had.
    fn say_restarted(
        &self,
        fd: BorrowedFd<'_>,
        identity: Identity,
    ) -> Result<Option<u64>, AdoptError> {
        // What is then not guaranteed was said when the mount was made, once.
        if !self.is_signed() {
            tracing::debug!("the mount was made without FUSE_RESTARTABLE");
            return Ok(None);
        }
        let cookie = Notifier::cookie();
        match Notifier::new(fd).restarted(cookie, identity) {
            Ok(()) => Ok(Some(cookie)),
            Err(NotifyError::NotGranted) => {
                tracing::debug!("the kernel did not grant FUSE_RESTARTABLE");
                Ok(None)
            }
            Err(NotifyError::WrongIdentity(ours)) => Err(AdoptError::WrongIdentity { ours }),
            Err(NotifyError::NotUnderstood) if self.is_gone()? => Err(AdoptError::Gone),
            // The kernel knows the notification, or the flag would not be in the reply.
            Err(NotifyError::NotUnderstood) => Err(AdoptError::StateOfEarlierMount),
            Err(NotifyError::Gone) => Err(AdoptError::Gone),
            Err(other) => Err(other.into()),
        }
    }
}
