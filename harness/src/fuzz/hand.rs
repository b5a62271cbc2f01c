// SPDX-License-Identifier: GPL-2.0
//! What a server's hand can do to the descriptor: every way to write an answer, a notification, or nonsense.

use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::time::Duration;

use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::script::{How, Lie, Note, Which, Who};
use crate::raw::answer::is_entry_reply;
use crate::raw::app::Proc;
use crate::raw::dev::Device;
use crate::raw::msg::Message;
use crate::raw::tree::Answer;
use crate::raw::uffd::Abyss;
use crate::raw::wait::{wait_for, Rng};
use crate::raw::wire::*;

/// An address at which nothing is ever mapped.
const NOWHERE: usize = 0x10;

fn bytes_of(unique: u64, answer: &Answer) -> Vec<u8> {
    let (error, payload) = match answer {
        Answer::Ok(payload) => (0, payload.as_slice()),
        Answer::Err(errno) => (-errno, &[][..]),
        Answer::Nothing => (0, &[][..]),
    };
    let header = OutHeader {
        len: (16 + payload.len()) as u32,
        error,
        unique,
    };
    [header.as_bytes(), payload].concat()
}

fn patch_header(bytes: &mut [u8], change: impl FnOnce(&mut OutHeader)) {
    if let Ok((header, _)) = OutHeader::mut_from_prefix(bytes) {
        change(header);
    }
}

/// Answers `m` in the way wanted. `Ok` says that the kernel took it.
pub fn answer(
    dev: &Device,
    m: &Message,
    truth: &Answer,
    how: How,
    rng: &mut Rng,
) -> Result<(), Errno> {
    let unique = m.unique();
    let mut bytes = bytes_of(unique, truth);
    // Nobody could take over a mount whose root was misrepresented from the start; that is told elsewhere.
    let how = match how {
        How::Lie(_) | How::Flip(_) | How::Noise(_)
            if m.nodeid() == ROOT && m.replay().is_none() && !is_entry_reply(m.opcode()) =>
        {
            How::Truth
        }
        how => how,
    };
    match how {
        How::Truth => {}
        How::Twice => {
            let first = dev.write_raw(&bytes).map(drop);
            let second = dev.write_raw(&bytes).map(drop);
            // Taking an answer twice is the one thing that must never be.
            return match (first, second) {
                (Ok(()), Ok(())) => Err(Errno::EALREADY),
                (first, _) => first,
            };
        }
        How::Pieces => return pieces(dev, &bytes, rng),
        How::Splice => return splice(dev, &bytes),
        How::Short(n) => {
            let keep = 16 + usize::from(n).min(bytes.len() - 16);
            bytes.truncate(keep);
            patch_header(&mut bytes, |h| h.len = keep as u32);
        }
        How::Longer(n) => {
            bytes.resize(bytes.len() + usize::from(n), 0x5a);
            let len = bytes.len() as u32;
            patch_header(&mut bytes, |h| h.len = len);
        }
        How::Error(errno) => bytes = bytes_of(unique, &Answer::Err(errno)),
        How::Code(code) => patch_header(&mut bytes, |h| h.error = code),
        How::Noise(n) => {
            let noise = (0..n).map(|_| rng.next() as u8).collect();
            bytes = bytes_of(unique, &Answer::Ok(noise));
        }
        How::Flip(n) => {
            for _ in 0..n {
                let at = 16 + rng.below((bytes.len() - 16).max(1));
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << rng.below(8);
                }
            }
        }
        How::Lie(lie) => tell(m, &mut bytes[16..], lie),
        How::Id(bits) => patch_header(&mut bytes, |h| h.unique ^= bits),
        How::Length(by) => patch_header(&mut bytes, |h| {
            h.len = h.len.wrapping_add_signed(by.into());
        }),
        How::Fault => return fault(dev, &bytes),
        How::Forked => return forked(dev, &bytes),
        How::Drown if bytes.len() > 16 => return drown(dev, &bytes),
        How::Drown => {}
    }
    dev.write_raw(&bytes).map(drop)
}

/// Puts a lie into the attributes or the entry of an answer.
fn tell(m: &Message, payload: &mut [u8], lie: Lie) {
    let entry = is_entry_reply(m.opcode());
    if let (true, Ok((entry, _))) = (entry, EntryOut::mut_from_prefix(payload)) {
        match lie {
            Lie::Node(id) => entry.nodeid = id,
            Lie::Generation => entry.generation ^= 1,
            _ => {}
        }
    }
    let at = match m.opcode() {
        op::GETATTR | op::SETATTR => 16,
        _ if entry => 40,
        _ => return,
    };
    let Some(Ok((attr, _))) = payload.get_mut(at..).map(Attr::mut_from_prefix) else {
        return;
    };
    match lie {
        Lie::Kind => attr.mode ^= libc::S_IFDIR ^ libc::S_IFREG,
        Lie::Ino => attr.ino ^= 0x55,
        Lie::Size => attr.size = [0, 1 << 40, i64::MAX as u64][attr.ino as usize % 3],
        Lie::Mode => attr.mode = 0,
        Lie::Invalid => attr.size = u64::MAX,
        Lie::Node(_) | Lie::Generation => {}
    }
}

/// The same bytes from several places, some of them empty.
fn pieces(dev: &Device, bytes: &[u8], rng: &mut Rng) -> Result<(), Errno> {
    let mut vectors = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() && vectors.len() < 16 {
        let n = rng.below(rest.len().min(40) + 1);
        let (head, tail) = rest.split_at(n);
        vectors.push(std::io::IoSlice::new(head));
        rest = tail;
    }
    vectors.push(std::io::IoSlice::new(rest));
    nix::sys::uio::writev(dev, &vectors).map(drop)
}

fn splice(dev: &Device, bytes: &[u8]) -> Result<(), Errno> {
    let (read, write) = nix::unistd::pipe()?;
    if bytes.len() > 60_000 {
        return dev.write_raw(bytes).map(drop);
    }
    let iov = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: one vector over the slice; vmsplice only reads it, and it outlives the splice below.
    Errno::result(unsafe { libc::vmsplice(write.as_raw_fd(), &iov, 1, 0) })?;
    dev.splice_moving(read.as_fd(), bytes.len())
}

/// The header is there, what should follow it is not.
fn fault(dev: &Device, bytes: &[u8]) -> Result<(), Errno> {
    let vectors = [
        libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: 16,
        },
        libc::iovec {
            iov_base: NOWHERE as *mut libc::c_void,
            iov_len: bytes.len() - 16,
        },
    ];
    // SAFETY: the first vector is the slice's, the second is for the kernel to refuse.
    Errno::result(unsafe { libc::writev(dev.raw(), vectors.as_ptr(), 2) }).map(drop)
}

/// A process writes the answer, and is killed while it does.
fn forked(dev: &Device, bytes: &[u8]) -> Result<(), Errno> {
    let writer = Proc::spawn("a writer that is killed", &[], || {
        i32::from(dev.write_raw(bytes).is_err())
    });
    drop(writer);
    // Nobody knows.
    Err(Errno::EINPROGRESS)
}

/// A process whose answer's payload never comes is killed while the kernel waits for it.
fn drown(dev: &Device, bytes: &[u8]) -> Result<(), Errno> {
    let server = nix::unistd::getpid();
    let writer = Proc::spawn("a writer that drowns", &[], || {
        // A rival may be killed, and its writer would hold the request, and the mount, for ever.
        // SAFETY: plain numbers.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
        if nix::unistd::getppid() != server {
            return 98;
        }
        Abyss::new(1 << 18).map_or(99, |a| {
            a.write_to(dev.raw(), &bytes[..16], bytes.len() - 16)
        })
    });
    if let Ok(writer) = writer {
        let file = format!("/proc/{}/syscall", writer.tid());
        let writes = libc::SYS_writev.to_string();
        let _ = wait_for("the writer to write", Duration::from_millis(50), || {
            let text = std::fs::read_to_string(&file).unwrap_or_default();
            Ok(text.split(' ').next() == Some(&writes) || writer.ended()?)
        });
    }
    Err(Errno::EINPROGRESS)
}

/// Reads with a buffer that is too small, or not there.
pub fn bad_read(dev: &Device, small: bool) {
    let mut buffer = [0u8; 100];
    let (at, len) = if small {
        (buffer.as_mut_ptr() as usize, buffer.len())
    } else {
        (NOWHERE, 1 << 18)
    };
    let _ = dev.set_nonblocking(true);
    // SAFETY: the small buffer is ours; the other address is for the kernel to refuse.
    unsafe { libc::read(dev.raw(), at as *mut libc::c_void, len) };
    let _ = dev.set_nonblocking(false);
}

/// Bytes whose header is made from a number: nearly right, or nothing at all.
/// Writes `len` bytes made from `seed`, most of them with a header that looks like one.
pub fn raw(dev: &Device, len: u16, seed: u64) -> Result<(), Errno> {
    dev.write_raw(&nonsense(len, seed)).map(drop)
}

/// What of this nonsense is none: RESEND has never looked at what follows its header.
pub fn is_resend(len: u16, seed: u64) -> bool {
    let mut found = false;
    patch_header(&mut nonsense(len, seed), |h| {
        found = h.unique == 0 && h.error == notify::RESEND && h.len == u32::from(len);
    });
    found
}

fn nonsense(len: u16, seed: u64) -> Vec<u8> {
    let mut rng = Rng(seed);
    let mut bytes: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
    let (shape, code) = (rng.below(4), [12, 12, 1, 7, 5, 0][rng.below(6)]);
    patch_header(&mut bytes, |h| {
        if shape > 0 {
            h.len = len.into();
        }
        if shape > 1 {
            h.unique = 0;
            h.error = code;
        }
        if shape > 2 {
            h.len = 48;
        }
    });
    if code == 12 && bytes.len() >= 48 && rng.below(2) == 0 {
        // A RESTARTED with all but one thing right.
        let out = RestartedOut {
            cookie: rng.next() | COOKIE_BIT,
            flags: 2 << rng.below(31),
            ..Default::default()
        };
        bytes[16..48].copy_from_slice(out.as_bytes());
    }
    bytes
}

pub fn identity(who: Who, right: [u64; 2]) -> [u64; 2] {
    match who {
        Who::Right => right,
        Who::Nobody => [0; 2],
        Who::Stranger => [right[1], right[0]],
    }
}

pub fn epoch(which: Which, now: u32) -> u32 {
    match which {
        Which::Now => now,
        Which::Last => now.wrapping_sub(1),
        Which::Next => now.wrapping_add(1),
        Which::Zero => 0,
        Which::Far(n) => n,
    }
}

/// The bytes of a notification about one of `nodes`.
pub fn note(note: Note, nodes: &[u64]) -> Vec<u8> {
    let mut rng = Rng(note.seed);
    let mut node = || match rng.below(8) {
        0 => rng.next(),
        1 => ROOT,
        _ => nodes[rng.below(nodes.len())],
    };
    let (a, b) = (node(), node());
    let off = [0, 1, 4096, -1, i64::MAX][rng.below(5)];
    let name = [&b"f0\0"[..], b"a0\0", b"a1\0", b"none\0", b"a0", b"\0"][rng.below(6)];
    let namelen = name.len() as u32 - 1 + u32::from(rng.below(8) == 0);
    let mut body = match note.code {
        notify::POLL => PollWakeupOut { kh: rng.next() % 8 }.as_bytes().to_vec(),
        notify::INVAL_INODE => InvalInodeOut {
            ino: a,
            off,
            len: rng.below(2) as i64 * 4096,
        }
        .as_bytes()
        .to_vec(),
        notify::INVAL_ENTRY => [
            InvalEntryOut {
                parent: a,
                namelen,
                flags: rng.below(2) as u32,
            }
            .as_bytes(),
            name,
        ]
        .concat(),
        notify::STORE => [
            StoreOut {
                nodeid: a,
                offset: off as u64,
                size: 100,
                padding: 0,
            }
            .as_bytes(),
            &[7; 100],
        ]
        .concat(),
        notify::RETRIEVE => RetrieveOut {
            notify_unique: rng.next(),
            nodeid: a,
            offset: off as u64,
            size: [0, 4096, u32::MAX][rng.below(3)],
            padding: 0,
        }
        .as_bytes()
        .to_vec(),
        notify::DELETE => [
            DeleteOut {
                parent: a,
                child: b,
                namelen,
                padding: 0,
            }
            .as_bytes(),
            name,
        ]
        .concat(),
        notify::PRUNE => [
            PruneOut {
                count: [1, 2, u32::MAX][rng.below(3)],
                ..Default::default()
            }
            .as_bytes(),
            a.as_bytes(),
        ]
        .concat(),
        _ => Vec::new(),
    };
    let wanted = body.len().saturating_add_signed(note.extra.into());
    body.resize(wanted, 0x5a);
    let header = OutHeader {
        len: (16 + body.len()) as u32,
        error: note.code,
        unique: 0,
    };
    [header.as_bytes(), &body].concat()
}

/// A process that waits in `read(2)` of the device. Made of a duplicate, it blocks whatever others set.
pub fn reader(dev: &Device) -> anyhow::Result<Proc> {
    let raw = dev.raw();
    Proc::spawn("a reader that is killed", &[], move || {
        // SAFETY: the descriptor lives in this process until it leaves with _exit.
        let file = std::mem::ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(raw) });
        let mut buffer = vec![0u8; 1 << 18];
        i32::from(std::io::Read::read(&mut &*file, &mut buffer).is_err())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup() -> Message {
        let header = InHeader {
            len: 42,
            opcode: op::LOOKUP,
            unique: 6,
            nodeid: ROOT,
            ..Default::default()
        };
        Message {
            header,
            body: b"a\0".to_vec(),
        }
    }

    #[test]
    fn a_lie_changes_what_it_says_it_does() {
        let truth = EntryOut {
            nodeid: 9,
            attr: Attr {
                mode: libc::S_IFREG | 0o644,
                ino: 3,
                ..Default::default()
            },
            ..Default::default()
        };
        let told = |lie| {
            let mut bytes = truth.as_bytes().to_vec();
            tell(&lookup(), &mut bytes, lie);
            EntryOut::read_from_bytes(&bytes).unwrap()
        };
        assert_eq!(told(Lie::Kind).attr.mode, libc::S_IFDIR | 0o644);
        assert_ne!(told(Lie::Ino).attr.ino, 3);
        assert_eq!(told(Lie::Node(5)).nodeid, 5);
        assert_eq!(told(Lie::Invalid).attr.size, u64::MAX);
        assert_ne!(told(Lie::Generation).generation, 0);
    }

    #[test]
    fn notifications_have_the_length_they_say() {
        for code in 0..14 {
            for seed in 0..50 {
                for extra in [0, -8, 100] {
                    let bytes = note(Note { code, seed, extra }, &[1, 100]);
                    let (header, _) = OutHeader::read_from_prefix(&bytes).unwrap();
                    assert_eq!(header.len as usize, bytes.len());
                    assert_eq!((header.unique, header.error), (0, code));
                }
            }
        }
    }

    #[test]
    fn a_resend_with_a_tail_is_no_nonsense() {
        assert!(is_resend(5000, 1654004609911954735));
        let found = (0..4000).filter(|seed| is_resend(49, *seed)).count();
        // One of six codes; length and id are right in one of four shapes, and the other two are not.
        assert!((4000 / 24 / 2..4000 / 24 * 2).contains(&found), "{found}");
        assert!((0..4000).all(|seed| !is_resend(15, seed)));
    }
}
