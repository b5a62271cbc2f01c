// SPDX-License-Identifier: GPL-2.0
//! INIT: played to a session over a socketpair, signed with the identity, compared with what was said before.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    recv, send, shutdown, socketpair, AddressFamily, MsgFlags, Shutdown, SockFlag, SockType,
};
use zerocopy::{FromBytes, IntoBytes};

use super::error::AdoptError;
use crate::std::wire::{
    Identity, InHeader, InitIn, InitOut, OutHeader, FUSE_INIT, FUSE_INIT_EXT, FUSE_RESTARTABLE,
    INIT_OUT_IDENTITY,
};

/// Shortest body of a reply to INIT, that of protocol 7.5 to 7.22.
const SHORTEST_REPLY: usize = 24;
const HEADER: usize = size_of::<OutHeader>();

/// Whether a message is the INIT of a protocol that can be answered in one step.
pub(super) fn check_request(message: &[u8]) -> Result<(), AdoptError> {
    let wrong = |what: String| Err(AdoptError::NotInit(what));
    let Ok((header, body)) = InHeader::read_from_prefix(message) else {
        return wrong(format!("{} bytes", message.len()));
    };
    if header.len as usize != message.len() {
        return wrong(format!(
            "{} bytes that say they are {}",
            message.len(),
            header.len
        ));
    }
    if header.opcode != FUSE_INIT {
        return wrong(format!("opcode {}", header.opcode));
    }
    match InitIn::read_from_prefix(body) {
        // With another major version the server answers twice; Linux has never had one.
        Ok((init, _)) if init.major == 7 => Ok(()),
        Ok((init, _)) => wrong(format!("version {}.{}", init.major, init.minor)),
        Err(_) => wrong(format!("{} bytes of INIT", body.len())),
    }
}

/// Lets the author's closure make a session that answers `request`, and takes the reply.
///
/// INIT is small, so it waits in the socket's buffer: no second thread is needed.
pub(super) fn play<S: AsFd>(
    request: &[u8],
    session: impl FnOnce(OwnedFd) -> io::Result<S>,
) -> Result<(S, Vec<u8>), AdoptError> {
    let failed = |doing| move |errno| AdoptError::Device { doing, errno };
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(failed("making a socket pair for the handshake"))?;
    send(ours.as_raw_fd(), request, MsgFlags::MSG_NOSIGNAL)
        .map_err(failed("playing INIT to the session"))?;
    // A session that reads on after INIT finds the end instead of waiting for ever.
    shutdown(ours.as_raw_fd(), Shutdown::Write).map_err(failed("playing INIT to the session"))?;
    let given = inode(theirs.as_fd()).map_err(failed("looking at the socket pair"))?;
    let session = session(theirs).map_err(AdoptError::Session)?;
    if inode(session.as_fd()) != Ok(given) {
        return Err(AdoptError::OtherDescriptor);
    }
    let mut reply = vec![0; 4096];
    let len = match recv(ours.as_raw_fd(), &mut reply, MsgFlags::MSG_DONTWAIT) {
        Ok(len) => len,
        Err(Errno::EAGAIN) => return Err(AdoptError::NoReply("nothing was written".into())),
        Err(errno) => return Err(failed("reading the session's reply to INIT")(errno)),
    };
    reply.truncate(len);
    check_reply(request, &reply)?;
    Ok((session, reply))
}

fn inode(fd: BorrowedFd<'_>) -> Result<(u64, u64), Errno> {
    nix::sys::stat::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}

fn check_reply(request: &[u8], reply: &[u8]) -> Result<(), AdoptError> {
    let wrong = |what: String| Err(AdoptError::NoReply(what));
    let unique = InHeader::read_from_prefix(request).map_or(0, |(header, _)| header.unique);
    let Ok((header, body)) = OutHeader::read_from_prefix(reply) else {
        return wrong(format!("{} bytes were written", reply.len()));
    };
    if header.error != 0 {
        return wrong(format!(
            "it said {}",
            io::Error::from_raw_os_error(header.error.wrapping_neg())
        ));
    }
    if header.len as usize != reply.len() || header.unique != unique || body.len() < SHORTEST_REPLY
    {
        return wrong(format!(
            "{} bytes for request {} were written",
            reply.len(),
            header.unique
        ));
    }
    Ok(())
}

/// The body of a reply; what an old protocol leaves out is zero.
pub(super) fn reply_body(reply: &[u8]) -> InitOut {
    let mut out = InitOut::default();
    let body = reply.get(HEADER..).unwrap_or_default();
    for (to, from) in out.as_mut_bytes().iter_mut().zip(body) {
        *to = *from;
    }
    out
}

/// Whether the kernel offered the contract and the session signed it.
pub(super) fn is_signed(request: &[u8], reply: &[u8]) -> bool {
    let body = request.get(size_of::<InHeader>()..).unwrap_or_default();
    let Ok((init, rest)) = InitIn::read_from_prefix(body) else {
        return false;
    };
    let high = u32::read_from_prefix(rest).map_or(0, |(flags2, _)| flags2);
    let offered = u64::from(init.flags) & FUSE_INIT_EXT != 0
        && u64::from(high) & (FUSE_RESTARTABLE >> 32) != 0;
    offered && reply_body(reply).all_flags() & FUSE_RESTARTABLE != 0
}

/// Puts the identity into a reply that signs the contract.
pub(super) fn put_identity(reply: &mut [u8], identity: Identity) {
    if let Some(place) = reply.get_mut(HEADER + INIT_OUT_IDENTITY..HEADER + size_of::<InitOut>()) {
        place.copy_from_slice(identity.0.as_bytes());
    }
}

/// Whether a server that would answer `now` can serve a kernel that was answered `stored`.
pub(super) fn compare(stored: &InitOut, now: &InitOut) -> Result<(), AdoptError> {
    let differs = |what, stored, now| Err(AdoptError::InitDiffers { what, stored, now });
    // The kernel shapes its messages by the server's minor version.
    if stored.minor != now.minor || stored.major != now.major {
        return differs(
            "the version of the protocol",
            u64::from(stored.minor),
            u64::from(now.minor),
        );
    }
    if stored.all_flags() != now.all_flags() {
        return differs("the set of flags", stored.all_flags(), now.all_flags());
    }
    // The server's buffers are made for its own limit.
    if now.max_write < stored.max_write {
        return differs(
            "max_write",
            u64::from(stored.max_write),
            u64::from(now.max_write),
        );
    }
    Ok(())
}

/// Puts `device` under the descriptor that `session` owns.
pub(super) fn put_under<S: AsFd>(device: BorrowedFd<'_>, session: &S) -> Result<(), AdoptError> {
    loop {
        // SAFETY: the number belongs to the session, which lives; what is behind it was made by `play` for no other
        // purpose than to be replaced here, and nobody else holds it by this number.
        let result = unsafe {
            libc::dup3(
                device.as_raw_fd(),
                session.as_fd().as_raw_fd(),
                libc::O_CLOEXEC,
            )
        };
        match Errno::result(result) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(AdoptError::Device {
                    doing: "putting the device under the session",
                    errno,
                })
            }
        }
    }
}
