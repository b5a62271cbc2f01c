// SPDX-License-Identifier: GPL-2.0
//! Why a connection could not be taken over.

use std::io;

use nix::errno::Errno;

use super::ServerError;
use crate::std::message::MessageError;
use crate::std::notify::NotifyError;
use crate::std::wire::Identity;

/// Why a connection could not be taken over. In every case the next instance can try again, unless the variant
/// says that the mount is gone.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Unmounted or aborted.
    #[error("the file system was unmounted, or its connection aborted: there is nothing to take over; mount it again")]
    Gone,
    /// A descriptor of `/dev/fuse` with which nothing is mounted.
    #[error("nothing is mounted with this descriptor of /dev/fuse: mount(2) with its number in fd= first")]
    NotMounted,
    /// Reading or writing failed.
    #[error("{doing}: {errno}")]
    Device {
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// A notification was refused.
    #[error(transparent)]
    Notify(#[from] NotifyError),
    /// The kernel refused the identity.
    #[error("this mount is of another file system than {ours}: the kernel refused its identity and changed nothing; start the right server")]
    WrongIdentity {
        /// What was offered.
        ours: Identity,
    },
    /// The server did not know the root that it was shown.
    #[error(
        "the root was refused ({reason}): this is another file system, or its root was replaced; the kernel holds \
         everything and revoked nothing, so the right server can still take over"
    )]
    RootRefused {
        /// What the server or the kernel had against it.
        reason: String,
    },
    /// This instance could not look whether it knows an inode.
    #[error(
        "inode {nodeid:#x} could not be looked at: {errno}; the kernel holds everything and revoked nothing: see to \
         what is short (memory, descriptors), the next instance is shown it again"
    )]
    NothingLearned {
        /// Its nodeid.
        nodeid: u64,
        /// What [`super::Recover::replay`] said.
        errno: Errno,
    },
    /// Somebody else said RESTARTED during this recovery.
    #[error("another instance took the connection over meanwhile: see that only one is started at a time")]
    Superseded,
    /// The connection was served before, and the state of that is missing.
    #[error(
        "the connection was served before, but this state knows nothing of it: pass the memfd of the last instance, \
         or unmount and mount again"
    )]
    StateLost,
    /// The state was served with, the connection was not.
    #[error("the state is of an earlier mount: start with an empty memfd, as this mount's INIT is still unanswered")]
    StateOfEarlierMount,
    /// INIT was read by an instance that died before it could be kept, by a signal in the middle of its `read(2)`.
    #[error("the kernel waits for no answer to INIT any more: an earlier instance died reading it; mount again")]
    InitLost,
    /// Something that is no INIT came first.
    #[error("the first message on the connection is no INIT of protocol 7, but {0}")]
    NotInit(String),
    /// The author's closure failed.
    #[error("making the session: {0}")]
    Session(#[source] io::Error),
    /// The session did not answer INIT.
    #[error("the session did not answer INIT: {0}")]
    NoReply(String),
    /// The session's descriptor is not the one it was given.
    #[error("the session does not use the descriptor that it was given, so the connection cannot be put under it")]
    OtherDescriptor,
    /// Another server than the one that answered INIT.
    #[error(
        "this server answers INIT otherwise than the one that was mounted with: {what} was {stored:#x}, is {now:#x}; \
         the kernel goes on with the old answer, so configure the server as before, or unmount and mount again"
    )]
    InitDiffers {
        /// Which part of the reply.
        what: &'static str,
        /// What the kernel was told.
        stored: u64,
        /// What this server would have told it.
        now: u64,
    },
    /// The kernel sent nonsense.
    #[error("the kernel sent no proper message during the recovery: {0}")]
    Message(#[from] MessageError),
    /// The kernel sent what has no place in a recovery.
    #[error("the kernel sent opcode {opcode} (nodeid {nodeid:#x}) during the recovery, before {expected}")]
    Unexpected {
        /// Its opcode.
        opcode: u32,
        /// Its nodeid.
        nodeid: u64,
        /// What should have come.
        expected: &'static str,
    },
    /// [`super::Recover::resolve`] failed.
    #[error("resolving what the last instance left half done: {0}")]
    Resolve(#[source] ServerError),
    /// [`super::Recover::finish`] failed.
    #[error("finishing the recovery: {0}")]
    Finish(#[source] ServerError),
}

/// For `map_err` around a system call on the device.
pub(super) fn device(doing: &'static str) -> impl FnOnce(Errno) -> AdoptError {
    move |errno| match errno {
        Errno::ENODEV | Errno::ENOTCONN | Errno::ECONNABORTED => AdoptError::Gone,
        errno => AdoptError::Device { doing, errno },
    }
}
