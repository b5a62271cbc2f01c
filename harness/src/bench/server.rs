// SPDX-License-Identifier: GPL-2.0
//! The server under the benchmarks: one thread, one buffer, no allocation a message.
//!
//! It knows a flat directory of files `n0`..; a file's nodeid is its number plus [`FIRST`]. Whoever wants it to
//! return looks up a name that begins with `stop`.

use std::os::fd::RawFd;

use anyhow::{bail, Result};
use libc::{S_IFDIR, S_IFREG};
use nix::errno::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::raw::wire::{
    op, Attr, AttrOut, EntryOut, GetattrIn, InHeader, OpenOut, OutHeader, ReadIn, Report, WriteIn,
    WriteOut, GETATTR_REPLAY, ROOT,
};

/// Nodeid of `n0`.
pub const FIRST: u64 = 1000;
const HOUR: u64 = 3600;
const FOPEN_DIRECT_IO: u32 = 1;

/// A page on a page's boundary. The kernel copies page by page: where a buffer begins decides how many instructions
/// a message costs, and must not be left to the allocator when instructions are counted.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub struct Page([u8; 4096]);

pub fn pages(count: usize) -> Vec<Page> {
    vec![Page([0; 4096]); count]
}

pub struct Server {
    fd: RawFd,
    inodes: u64,
    input: Vec<Page>,
    output: Vec<Page>,
    /// Replays answered since the last report.
    pub replayed: u64,
    /// Called now and then during replays, for samples.
    pub every: Option<(u64, Box<dyn FnMut()>)>,
}

/// Why [`Server::serve`] returned.
#[derive(Debug)]
pub enum Stop {
    /// Somebody looked up `stop`.
    Asked,
    Report(Report),
}

impl Server {
    pub fn new(fd: RawFd, inodes: u64) -> Server {
        let room = crate::raw::dev::MAX_WRITE as usize / 4096 + 1;
        Server {
            fd,
            inodes,
            input: pages(room),
            output: pages(room),
            replayed: 0,
            every: None,
        }
    }

    /// Answers messages until there is a reason to stop.
    pub fn serve(&mut self) -> Result<Stop> {
        loop {
            // SAFETY: the buffer is as long as said.
            let n = unsafe {
                libc::read(
                    self.fd,
                    self.input.as_mut_ptr().cast(),
                    self.input.len() * 4096,
                )
            };
            let n = match Errno::result(n) {
                Ok(n) => n as usize,
                Err(Errno::EINTR | Errno::ENOENT) => continue,
                Err(e) => bail!("reading the device failed: {e}"),
            };
            let Ok((header, body)) = InHeader::read_from_prefix(&self.input.as_bytes()[..n]) else {
                bail!("a message of {n} bytes")
            };
            if header.opcode == op::NOTIFY_REPLY {
                let Ok(report) = Report::read_from_bytes(body) else {
                    bail!("a report of {} bytes", body.len())
                };
                return Ok(Stop::Report(report));
            }
            let stop = header.opcode == op::LOOKUP && body.starts_with(b"stop");
            let body = 40..n;
            let (error, len) = self.answer(&header, body);
            if matches!(header.opcode, op::FORGET | op::BATCH_FORGET | op::INTERRUPT) {
                continue;
            }
            let out = OutHeader {
                len: 16 + len as u32,
                error: -error,
                unique: header.unique,
            };
            self.output.as_mut_bytes()[..16].copy_from_slice(out.as_bytes());
            // SAFETY: the buffer is longer than the answer.
            let n = unsafe { libc::write(self.fd, self.output.as_ptr().cast(), 16 + len) };
            match Errno::result(n) {
                // The requester was killed meanwhile: its business.
                Ok(_) | Err(Errno::ENOENT) => {}
                Err(e) => bail!(
                    "the kernel refused the answer to {}: {e}",
                    op::name(header.opcode)
                ),
            }
            if stop {
                return Ok(Stop::Asked);
            }
        }
    }

    /// Puts the payload behind the room for the header; gives errno and length.
    fn answer(&mut self, header: &InHeader, body: std::ops::Range<usize>) -> (i32, usize) {
        match header.opcode {
            op::LOOKUP => {
                let number = file_number(&self.input.as_bytes()[body]);
                match number.filter(|n| *n < self.inodes) {
                    Some(n) => self.put(&EntryOut {
                        nodeid: FIRST + n,
                        generation: 1,
                        entry_valid: HOUR,
                        attr_valid: HOUR,
                        attr: attr(FIRST + n),
                        ..Default::default()
                    }),
                    None => (libc::ENOENT, 0),
                }
            }
            op::GETATTR | op::SETATTR => {
                let replay = GetattrIn::read_from_prefix(&self.input.as_bytes()[body]).is_ok_and(
                    |(arg, _)| {
                        header.opcode == op::GETATTR && arg.getattr_flags & GETATTR_REPLAY != 0
                    },
                );
                if replay {
                    self.replayed += 1;
                    if let Some((n, sample)) = &mut self.every {
                        if self.replayed.is_multiple_of(*n) {
                            sample();
                        }
                    }
                }
                self.put(&AttrOut {
                    attr_valid: HOUR,
                    attr: attr(header.nodeid),
                    ..Default::default()
                })
            }
            op::OPEN => self.put(&OpenOut {
                fh: header.nodeid,
                open_flags: FOPEN_DIRECT_IO,
                backing_id: 0,
            }),
            op::OPENDIR => self.put(&OpenOut {
                fh: header.nodeid,
                ..Default::default()
            }),
            op::READ => match ReadIn::read_from_prefix(&self.input.as_bytes()[body]) {
                // Whatever bytes are in the buffer: nobody looks at them.
                Ok((arg, _)) => (0, (arg.size as usize).min(4096)),
                Err(_) => (libc::EINVAL, 0),
            },
            op::WRITE => match WriteIn::read_from_prefix(&self.input.as_bytes()[body]) {
                Ok((arg, _)) => self.put(&WriteOut {
                    size: arg.size,
                    padding: 0,
                }),
                Err(_) => (libc::EINVAL, 0),
            },
            op::FLUSH | op::RELEASE | op::RELEASEDIR => (0, 0),
            _ => (libc::ENOSYS, 0),
        }
    }

    fn put<T: IntoBytes + Immutable>(&mut self, value: &T) -> (i32, usize) {
        let bytes = value.as_bytes();
        self.output.as_mut_bytes()[16..16 + bytes.len()].copy_from_slice(bytes);
        (0, bytes.len())
    }
}

/// The number in `nNUMBER\0`.
fn file_number(name: &[u8]) -> Option<u64> {
    let digits = name.strip_prefix(b"n")?.strip_suffix(b"\0")?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn attr(nodeid: u64) -> Attr {
    let mode = if nodeid == ROOT {
        S_IFDIR | 0o755
    } else {
        S_IFREG | 0o644
    };
    Attr {
        ino: nodeid,
        size: 1 << 20,
        mode,
        nlink: 1,
        blksize: 4096,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_by_their_number() {
        assert_eq!(file_number(b"n17\0"), Some(17));
        for other in [&b"stop\0"[..], b"n17", b"n\0", b"nx\0", b""] {
            assert_eq!(file_number(other), None);
        }
    }
}
