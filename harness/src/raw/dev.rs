// SPDX-License-Identifier: GPL-2.0
//! The device itself: reading messages, writing answers and notifications, waiting for it to become readable.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use zerocopy::{Immutable, IntoBytes};

use super::msg::Message;
use super::wire::{self, OutHeader, RestartedOut};

nix::ioctl_read!(fuse_dev_ioc_clone, 229, 0, u32);

/// Largest WRITE the kit negotiates; a read buffer has room for it and for the headers.
pub const MAX_WRITE: u32 = 1 << 17;
const BUFFER: usize = MAX_WRITE as usize + 4096;

/// An open `/dev/fuse` (or `/dev/cuse`).
pub struct Device {
    file: File,
    buffer: Vec<u8>,
}

/// What reading the device brought.
pub enum Read1 {
    Message(Message),
    /// Nothing arrived within the time.
    Nothing,
    Failed(Errno),
}

impl Device {
    pub fn open(path: &str) -> io::Result<Device> {
        Ok(Device::from_file(
            File::options().read(true).write(true).open(path)?,
        ))
    }

    fn from_file(file: File) -> Device {
        Device {
            file,
            buffer: vec![0; BUFFER],
        }
    }

    /// A second descriptor with a queue of its own (`FUSE_DEV_IOC_CLONE`), as multi-threaded servers make them.
    pub fn clone_queue(&self) -> io::Result<Device> {
        let other = Device::open("/dev/fuse")?;
        let mut fd = self.file.as_raw_fd() as u32;
        // SAFETY: the ioctl reads one u32 through the pointer, which lives until it returns.
        unsafe { fuse_dev_ioc_clone(other.file.as_raw_fd(), &mut fd) }?;
        Ok(other)
    }

    /// The same open file under a second descriptor, as a keeper holds it.
    pub fn duplicate(&self) -> io::Result<Device> {
        Ok(Device::from_file(self.file.try_clone()?))
    }

    pub fn raw(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Events now pending, waiting up to `limit` for one of `events` (errors always count).
    pub fn poll(&self, events: PollFlags, limit: Duration) -> io::Result<PollFlags> {
        poll_one(self.file.as_fd(), events, limit)
    }

    /// Reads one message, waiting up to `limit`.
    ///
    /// What poll promised may be gone: a request whose inode was revoked ends inside `read(2)`, which would then wait
    /// for the next one. So the description is non-blocking for just this read.
    pub fn read(&mut self, limit: Duration) -> anyhow::Result<Read1> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let ready = self.poll(PollFlags::POLLIN, left)?;
            if !ready.intersects(PollFlags::POLLIN | PollFlags::POLLERR | PollFlags::POLLHUP) {
                return Ok(Read1::Nothing);
            }
            self.set_nonblocking(true)?;
            let result = self.file.read(&mut self.buffer);
            self.set_nonblocking(false)?;
            match result {
                Ok(n) => return Ok(Read1::Message(Message::parse(&self.buffer[..n])?)),
                Err(e) => match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
                    // The request was ended while it was being copied: take the next one.
                    Errno::ENOENT | Errno::EINTR => continue,
                    Errno::EAGAIN if Instant::now() < deadline => continue,
                    Errno::EAGAIN => return Ok(Read1::Nothing),
                    errno => return Ok(Read1::Failed(errno)),
                },
            }
        }
    }

    pub fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        let flags = if on {
            OFlag::O_RDWR | OFlag::O_NONBLOCK
        } else {
            OFlag::O_RDWR
        };
        fcntl(&self.file, FcntlArg::F_SETFL(flags))?;
        Ok(())
    }

    /// Reads without looking at poll first; for what must block, or fail, in `read(2)` itself.
    pub fn read_blocking(&mut self) -> anyhow::Result<Read1> {
        match self.file.read(&mut self.buffer) {
            Ok(n) => Ok(Read1::Message(Message::parse(&self.buffer[..n])?)),
            Err(e) => Ok(Read1::Failed(Errno::from_raw(
                e.raw_os_error().unwrap_or(0),
            ))),
        }
    }

    /// Writes bytes as they are: the way to be wrong on purpose.
    pub fn write_raw(&self, bytes: &[u8]) -> Result<usize, Errno> {
        (&self.file)
            .write(bytes)
            .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))
    }

    /// Answers `unique` with an error (positive errno; 0 for a bare success).
    pub fn reply_error(&self, unique: u64, errno: i32) -> Result<(), Errno> {
        self.reply(unique, -errno, &[])
    }

    pub fn reply_ok(&self, unique: u64, payload: &[u8]) -> Result<(), Errno> {
        self.reply(unique, 0, payload)
    }

    /// The same by `splice(2)` with `SPLICE_F_MOVE`: the kernel may take the page itself into its cache.
    pub fn reply_moved(&self, unique: u64, page: &[u8]) -> Result<(), Errno> {
        let header = OutHeader {
            len: (16 + page.len()) as u32,
            error: 0,
            unique,
        };
        let (read, write) = nix::unistd::pipe()?;
        // One buffer for the header, and one for the page.
        nix::unistd::write(&write, header.as_bytes())?;
        nix::unistd::write(&write, page)?;
        self.splice_moving(read.as_fd(), 16 + page.len())
    }

    /// Writes what is in a pipe with `SPLICE_F_MOVE`.
    pub fn splice_moving(&self, pipe: BorrowedFd<'_>, len: usize) -> Result<(), Errno> {
        // SAFETY: two open descriptors and no offsets.
        let n = unsafe {
            libc::splice(
                pipe.as_raw_fd(),
                std::ptr::null_mut(),
                self.file.as_raw_fd(),
                std::ptr::null_mut(),
                len,
                libc::SPLICE_F_MOVE,
            )
        };
        Errno::result(n).map(drop)
    }

    fn reply(&self, unique: u64, error: i32, payload: &[u8]) -> Result<(), Errno> {
        let header = OutHeader {
            len: (16 + payload.len()) as u32,
            error,
            unique,
        };
        self.write_raw(&[header.as_bytes(), payload].concat())
            .map(drop)
    }

    /// Sends a notification: a fixed structure, then whatever follows it.
    pub fn notify<T: IntoBytes + Immutable>(
        &self,
        code: i32,
        head: &T,
        tail: &[u8],
    ) -> Result<(), Errno> {
        self.reply(0, code, &[head.as_bytes(), tail].concat())
    }

    pub fn restarted(&self, out: RestartedOut) -> Result<(), Errno> {
        self.notify(wire::notify::RESTARTED, &out, &[])
    }

    /// The probe of the protocol, safe at any time: a COMMIT nobody waits for. The answer is always an error.
    pub fn probe(&self) -> Errno {
        let out = RestartedOut {
            cookie: wire::COOKIE_BIT,
            flags: wire::RESTARTED_COMMIT,
            ..Default::default()
        };
        match self.restarted(out) {
            Ok(()) => Errno::UnknownErrno,
            Err(e) => e,
        }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl From<Device> for OwnedFd {
    fn from(device: Device) -> OwnedFd {
        device.file.into()
    }
}

/// Waits up to `limit` for an event on one descriptor. Empty flags: none came.
pub fn poll_one(fd: BorrowedFd<'_>, events: PollFlags, limit: Duration) -> io::Result<PollFlags> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a wait that ends a fraction too early would spin.
        let millis = left.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
        let mut fds = [PollFd::new(fd, events)];
        match nix::poll::poll(
            &mut fds,
            PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX),
        ) {
            Ok(_) => return Ok(fds[0].revents().unwrap_or(PollFlags::empty())),
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
    }
}
