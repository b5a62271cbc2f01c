// SPDX-License-Identifier: GPL-2.0
//! Notifications that a server (or whoever keeps its descriptor) writes to `/dev/fuse`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use zerocopy::IntoBytes;

use super::device;
use super::wire::{
    Identity, OutHeader, RestartedOut, COOKIE_BIT, FUSE_NOTIFY_POLL, FUSE_NOTIFY_RESEND,
    FUSE_NOTIFY_RESTARTED, FUSE_RESTARTED_COMMIT,
};

/// What the kernel made of a notification that it did not accept. None of these changed anything.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    /// `EINVAL`.
    #[error(
        "the kernel does not understand this notification: it has no FUSE_NOTIFY_RESTARTED, or INIT was not \
         answered yet, or the connection was aborted"
    )]
    NotUnderstood,
    /// `EOPNOTSUPP`.
    #[error(
        "this connection was not granted FUSE_RESTARTABLE: its server did not sign in the INIT reply, or signed \
         together with passthrough or io_uring"
    )]
    NotGranted,
    /// `ESTALE` to the first step.
    #[error("the connection belongs to another file system: the kernel refused identity {0}")]
    WrongIdentity(Identity),
    /// `ESTALE` to the second step.
    #[error("COMMIT of epoch {epoch} came too late: another FUSE_NOTIFY_RESTARTED was accepted meanwhile, or none was")]
    WrongEpoch {
        /// The epoch that was named.
        epoch: u32,
    },
    /// `EBUSY`.
    #[error("the connection is recovering: only FUSE_NOTIFY_RESTARTED and FUSE_NOTIFY_POLL are accepted before COMMIT")]
    Recovering,
    /// `ENODEV`, `ENOTCONN`.
    #[error("the file system was unmounted or its connection was aborted")]
    Gone,
    /// A cookie without [`COOKIE_BIT`]; nothing was written.
    #[error("cookie {0:#x} lacks bit 62")]
    BadCookie(u64),
    /// Anything else.
    #[error("writing a notification to /dev/fuse: {0}")]
    Io(#[from] io::Error),
}

/// Whether a connection can be recovered with FUSE_NOTIFY_RESTARTED.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// The kernel has the series and the server signed.
    Granted,
    /// The kernel has the series, but the server did not sign.
    NotGranted,
    /// The kernel does not know the notification (or INIT was not answered yet, or the connection was aborted:
    /// the kernel has one errno for all three).
    OldKernel,
}

/// The descriptor that a [`Notifier`] writes to.
#[derive(Debug)]
enum Device<'fd> {
    Borrowed(BorrowedFd<'fd>),
    Owned(OwnedFd),
}

/// Writes notifications to a `/dev/fuse` descriptor.
///
/// Any thread may use it at any time. A notification is one `write(2)`, it is accepted or refused as a whole, and
/// success means *accepted*: nothing here waits for the server.
#[derive(Debug)]
pub struct Notifier<'fd> {
    device: Device<'fd>,
}

impl<'fd> Notifier<'fd> {
    /// Uses a descriptor of `/dev/fuse` that somebody else owns.
    pub fn new(fd: BorrowedFd<'fd>) -> Self {
        Notifier {
            device: Device::Borrowed(fd),
        }
    }

    /// A notifier that lives as long as it likes; takes a descriptor, for instance a duplicate.
    pub fn owned(fd: OwnedFd) -> Notifier<'static> {
        Notifier {
            device: Device::Owned(fd),
        }
    }

    /// First step of a recovery: from now on the kernel holds all requests and shows every cached inode.
    ///
    /// `cookie` comes back in the report; make one with [`Notifier::cookie`]. [`Identity::UNSAID`] lets the kernel
    /// compare none, as a keeper does that knows no identity.
    ///
    /// # Errors
    /// [`NotifyError::NotUnderstood`], [`NotifyError::NotGranted`], [`NotifyError::WrongIdentity`],
    /// [`NotifyError::Gone`], [`NotifyError::BadCookie`]; the connection is as it was.
    pub fn restarted(&self, cookie: u64, identity: Identity) -> Result<(), NotifyError> {
        let body = RestartedOut {
            cookie,
            flags: 0,
            epoch: 0,
            identity: identity.0,
        };
        check_cookie(cookie)?;
        self.send(FUSE_NOTIFY_RESTARTED, body.as_bytes())
            .map_err(|errno| match errno {
                Errno::ESTALE => NotifyError::WrongIdentity(identity),
                other => explain(other),
            })
    }

    /// Second step: the requests that were held go to the server that reads the descriptor.
    ///
    /// `cookie` and `epoch` are those of the report.
    ///
    /// # Errors
    /// [`NotifyError::WrongEpoch`] when another recovery has begun meanwhile; else as for
    /// [`Notifier::restarted`].
    pub fn commit(&self, cookie: u64, epoch: u32, identity: Identity) -> Result<(), NotifyError> {
        let body = RestartedOut {
            cookie,
            flags: FUSE_RESTARTED_COMMIT,
            epoch,
            identity: identity.0,
        };
        check_cookie(cookie)?;
        self.send(FUSE_NOTIFY_RESTARTED, body.as_bytes())
            .map_err(|errno| match errno {
                Errno::ESTALE => NotifyError::WrongEpoch { epoch },
                other => explain(other),
            })
    }

    /// Asks what the connection can do. Safe at any time, in any phase: it is a COMMIT that can never match.
    ///
    /// # Errors
    /// [`NotifyError::Gone`] or [`NotifyError::Io`] if the kernel's answer is none of the three.
    pub fn probe(&self) -> Result<Support, NotifyError> {
        match self.commit(COOKIE_BIT, 0, Identity::UNSAID) {
            Err(NotifyError::WrongEpoch { .. }) => Ok(Support::Granted),
            Err(NotifyError::NotGranted) => Ok(Support::NotGranted),
            Err(NotifyError::NotUnderstood) => Ok(Support::OldKernel),
            Err(other) => Err(other),
            // Epochs count from 1, so no kernel that keeps the protocol accepts this.
            Ok(()) => Err(NotifyError::Io(io::Error::other(
                "the kernel accepted a COMMIT of epoch 0, which does not exist",
            ))),
        }
    }

    /// Has everything that was read and never answered sent again; Linux 6.9 and later.
    ///
    /// # Errors
    /// [`NotifyError::NotUnderstood`] on an older kernel, [`NotifyError::Recovering`] while another recovery runs.
    pub fn resend(&self) -> Result<(), NotifyError> {
        self.send(FUSE_NOTIFY_RESEND, &[]).map_err(explain)
    }

    /// Whether INIT was answered on this connection, found by a notification that wakes nobody.
    ///
    /// Linux 6.18 and older accept notifications earlier than that, so `true` is sure only on newer ones (7.3 is).
    ///
    /// # Errors
    /// [`NotifyError::Gone`], [`NotifyError::Io`].
    pub fn initialized(&self) -> Result<bool, NotifyError> {
        // No server in this crate hands out this poll handle; if one does, its poller wakes up for nothing.
        match self.send(FUSE_NOTIFY_POLL, &u64::MAX.to_ne_bytes()) {
            Ok(()) => Ok(true),
            Err(Errno::EINVAL) => Ok(false),
            Err(other) => Err(explain(other)),
        }
    }

    /// A cookie that no other instance on this machine uses now: bit 62, the process id and the clock.
    pub fn cookie() -> u64 {
        let clock = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |time| time.as_nanos() as u64);
        // Bit 63 stays free: it would look like a resent request in a log.
        COOKIE_BIT | (((u64::from(std::process::id()) << 32) ^ clock) & (COOKIE_BIT - 1))
    }

    fn send(&self, code: i32, body: &[u8]) -> Result<(), Errno> {
        let header = OutHeader {
            len: (size_of::<OutHeader>() + body.len()) as u32,
            error: code,
            unique: 0,
        };
        let mut message = Vec::with_capacity(header.len as usize);
        message.extend_from_slice(header.as_bytes());
        message.extend_from_slice(body);
        device::write(self.as_fd(), &message)
    }
}

impl AsFd for Notifier<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.device {
            Device::Borrowed(fd) => *fd,
            Device::Owned(fd) => fd.as_fd(),
        }
    }
}

fn check_cookie(cookie: u64) -> Result<(), NotifyError> {
    if cookie & COOKIE_BIT == 0 {
        return Err(NotifyError::BadCookie(cookie));
    }
    Ok(())
}

fn explain(errno: Errno) -> NotifyError {
    match errno {
        Errno::EINVAL => NotifyError::NotUnderstood,
        Errno::EOPNOTSUPP => NotifyError::NotGranted,
        Errno::EBUSY => NotifyError::Recovering,
        Errno::ENODEV | Errno::ENOTCONN => NotifyError::Gone,
        other => NotifyError::Io(other.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::std::device::fake;
    use std::cell::RefCell;
    use std::os::fd::AsFd;
    use std::rc::Rc;

    /// Answers every write with one errno and keeps what was written.
    #[derive(Clone)]
    struct Says(Result<(), Errno>, Rc<RefCell<Vec<u8>>>);

    impl fake::Kernel for Says {
        fn write(&mut self, message: &[u8]) -> Result<(), Errno> {
            *self.1.borrow_mut() = message.to_vec();
            self.0
        }
        fn read(&mut self) -> Result<Vec<u8>, Errno> {
            unreachable!()
        }
    }

    fn with<R>(says: Result<(), Errno>, test: impl FnOnce(&Notifier<'_>) -> R) -> (R, Vec<u8>) {
        let written = Rc::default();
        let null = std::fs::File::open("/dev/null").unwrap();
        let kernel = Box::new(Says(says, Rc::clone(&written)));
        let result = fake::with(kernel, || test(&Notifier::new(null.as_fd())));
        (result, written.take())
    }

    #[test]
    fn every_errno_has_its_meaning() {
        use NotifyError::*;
        let identity = Identity([1, 2]);
        let restarted = |errno| {
            with(Err(errno), |n| n.restarted(COOKIE_BIT, identity))
                .0
                .unwrap_err()
        };
        assert!(matches!(restarted(Errno::EINVAL), NotUnderstood));
        assert!(matches!(restarted(Errno::EOPNOTSUPP), NotGranted));
        assert!(matches!(restarted(Errno::ESTALE), WrongIdentity(found) if found == identity));
        assert!(matches!(restarted(Errno::ENODEV), Gone));
        assert!(matches!(restarted(Errno::EPERM), Io(_)));
        let commit = |errno| {
            with(Err(errno), |n| n.commit(COOKIE_BIT, 5, identity))
                .0
                .unwrap_err()
        };
        assert!(matches!(commit(Errno::ESTALE), WrongEpoch { epoch: 5 }));
        assert!(matches!(
            with(Err(Errno::EBUSY), |n| n.resend()).0,
            Err(Recovering)
        ));
    }

    #[test]
    fn the_probe_knows_three_answers() {
        let probe = |says| with(says, |n| n.probe()).0;
        assert_eq!(probe(Err(Errno::ESTALE)).unwrap(), Support::Granted);
        assert_eq!(probe(Err(Errno::EOPNOTSUPP)).unwrap(), Support::NotGranted);
        assert_eq!(probe(Err(Errno::EINVAL)).unwrap(), Support::OldKernel);
        assert!(probe(Err(Errno::EBADF)).is_err());
        assert!(probe(Ok(())).is_err());
    }

    #[test]
    fn messages_are_what_the_header_file_says() {
        let (_, bytes) = with(Ok(()), |n| {
            n.commit(COOKIE_BIT | 9, 0x0102_0304, Identity([5, 6]))
                .unwrap()
        });
        let words: Vec<u32> = bytes
            .chunks(4)
            .map(|word| u32::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        // A little-endian machine has the low half of a u64 first; so do all that run these tests.
        assert_eq!(
            words,
            [48, 12, 0, 0, 9, 1 << 30, 1, 0x0102_0304, 5, 0, 6, 0]
        );
        let (_, bytes) = with(Ok(()), |n| {
            n.restarted(COOKIE_BIT | 9, Identity::UNSAID).unwrap()
        });
        assert_eq!(bytes[24..], [0; 24]);
        assert_eq!(with(Ok(()), |n| n.resend().unwrap()).1.len(), 16);
    }

    #[test]
    fn a_bad_cookie_is_not_even_written() {
        let (result, bytes) = with(Ok(()), |n| n.restarted(1, Identity::UNSAID));
        assert!(matches!(result, Err(NotifyError::BadCookie(1))) && bytes.is_empty());
        for _ in 0..1000 {
            assert_eq!(Notifier::cookie() >> 62, 1);
        }
    }
}
