// SPDX-License-Identifier: GPL-2.0
//! Whether a server could take over a mount, asked while another one serves it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::error::AdoptError;
use super::handshake;
use crate::std::state::{State, StateError};
use crate::std::wire::Identity;

/// Why a server could not take over a mount.
#[derive(Debug, thiserror::Error)]
pub enum RehearseError {
    /// This version of the crate, or this file system, has no use for the state.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is nothing to take over.
    #[error("the state is of a mount that no server has come to serve yet")]
    NotServed,
    /// The handshake would fail.
    #[error(transparent)]
    Handshake(#[from] AdoptError),
}

/// Finds out whether this server could take over from the one that uses `memfd`, before that one is ended: whether
/// the state is of a version that can be read and of the file system `identity`, and whether `session` (as for
/// [`super::Adopt::run`]) answers INIT as the kernel was answered. Only reads `memfd`, and knows no device.
///
/// What the state says of nodes, handles and operations is not looked at: that changes while another server runs.
///
/// # Errors
/// [`RehearseError`] says what is in the way; nothing was changed.
pub fn rehearse<S: AsFd>(
    memfd: BorrowedFd<'_>,
    identity: Identity,
    session: impl FnOnce(OwnedFd) -> io::Result<S>,
) -> Result<(), RehearseError> {
    let kept = State::handshake_in(memfd, identity)?.ok_or(RehearseError::NotServed)?;
    handshake::check_request(&kept.request)?;
    let (_, reply) = handshake::play(&kept.request, session)?;
    handshake::compare(
        &handshake::reply_body(&kept.reply),
        &handshake::reply_body(&reply),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::super::test_support::*;
    use super::*;

    fn bytes(mount: &Mount) -> Vec<u8> {
        let file = std::fs::File::from(mount.memfd.try_clone().unwrap());
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn overwrite(mount: &Mount, at: u64, with: &[u8]) {
        let file = std::fs::File::from(mount.memfd.try_clone().unwrap());
        file.write_all_at(with, at).unwrap();
    }

    #[test]
    fn who_could_take_over_is_told_so_and_changes_nothing() {
        let mount = Mount::served(&[10]);
        let before = bytes(&mount);
        rehearse(mount.memfd.as_fd(), IDENTITY, session(SIGNS)).unwrap();
        assert!(before == bytes(&mount));
        assert!(mount.log().is_empty(), "the kernel noticed");
        // A server was killed before it could write down how long INIT is; the next one answered it.
        overwrite(&mount, 152, &[0; 8]);
        rehearse(mount.memfd.as_fd(), IDENTITY, session(SIGNS)).unwrap();
        // Not even in the way of the next one.
        mount.adopt(&mut Server::default(), SIGNS).unwrap();
    }

    #[test]
    fn who_could_not_is_told_why() {
        let mount = Mount::served(&[]);
        let before = bytes(&mount);
        let more_flags = Answer {
            flags: SIGNS.flags | 1 << 16,
            ..SIGNS
        };
        let refused = rehearse(mount.memfd.as_fd(), IDENTITY, session(more_flags)).unwrap_err();
        assert!(
            matches!(
                refused,
                RehearseError::Handshake(AdoptError::InitDiffers {
                    what: "the set of flags",
                    ..
                })
            ),
            "{refused}"
        );
        let other = Identity([9, 9]);
        let refused = rehearse(mount.memfd.as_fd(), other, session(SIGNS)).unwrap_err();
        assert!(
            matches!(
                refused,
                RehearseError::State(StateError::WrongIdentity { .. })
            ),
            "{refused}"
        );
        assert!(before == bytes(&mount));
    }

    #[test]
    fn a_state_of_nothing_or_nonsense_is_refused() {
        let empty = State::create_memfd().unwrap();
        let refused = rehearse(empty.as_fd(), IDENTITY, session(SIGNS)).unwrap_err();
        assert!(matches!(refused, RehearseError::NotServed), "{refused}");
        // Lengths of the handshake that no server wrote, then a request that is none.
        for (at, with) in [
            (0x2000, 0),
            (0x2000, 0x8001),
            (0x2000, u64::MAX),
            (160, 0),
            (160, 4097),
        ] {
            let mount = Mount::served(&[]);
            overwrite(&mount, at, &with.to_ne_bytes());
            let refused = rehearse(mount.memfd.as_fd(), IDENTITY, session(SIGNS)).unwrap_err();
            assert!(
                matches!(refused, RehearseError::State(StateError::NoHandshake(_))),
                "{at}: {with:#x}: {refused}"
            );
        }
        let mount = Mount::served(&[]);
        overwrite(&mount, 0x2004, &[0xff; 4]);
        let refused = rehearse(mount.memfd.as_fd(), IDENTITY, session(SIGNS)).unwrap_err();
        assert!(
            matches!(refused, RehearseError::Handshake(AdoptError::NotInit(_))),
            "{refused}"
        );
    }
}
