// SPDX-License-Identifier: GPL-2.0
//! Asynchronous reads, of both kinds that Linux has: `io_submit(2)` and io_uring. One read at a time, on the bare
//! system calls, so that a scenario decides when to look for the result.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::errno::Errno;

use super::ops::Done;

const PREAD: u16 = 0;
const PWRITE: u16 = 1;

/// One transfer under way; the buffer stays where it is until it ended.
pub struct Aio {
    context: u64,
    _control: Box<Control>,
    buffer: Vec<u8>,
}

/// `struct iocb` of the kernel.
#[repr(C)]
#[derive(Default)]
struct Control {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    reqprio: i16,
    fd: u32,
    buf: u64,
    nbytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    resfd: u32,
}

impl Aio {
    /// Submits a read of the file's first `len` bytes.
    pub fn read(fd: RawFd, len: usize) -> Done<Aio> {
        Aio::submit(fd, PREAD, vec![0u8; len], 0)
    }

    /// Submits a write.
    pub fn write(fd: RawFd, bytes: &[u8], offset: i64) -> Done<Aio> {
        Aio::submit(fd, PWRITE, bytes.to_vec(), offset)
    }

    fn submit(fd: RawFd, opcode: u16, mut buffer: Vec<u8>, offset: i64) -> Done<Aio> {
        let mut context = 0u64;
        // SAFETY: the kernel fills `context`.
        Errno::result(unsafe { libc::syscall(libc::SYS_io_setup, 1, &mut context) })?;
        let mut control = Box::new(Control {
            fd: fd as u32,
            buf: buffer.as_mut_ptr() as u64,
            nbytes: buffer.len() as u64,
            opcode,
            offset,
            ..Default::default()
        });
        let list = [&mut *control as *mut Control];
        // SAFETY: one control block, which lives as long as this object, and so does its buffer.
        Errno::result(unsafe { libc::syscall(libc::SYS_io_submit, context, 1, list.as_ptr()) })?;
        Ok(Aio {
            context,
            _control: control,
            buffer,
        })
    }

    /// Waits up to `limit`; the bytes read, or the errno of the read.
    pub fn wait(self, limit: Duration) -> Done<Vec<u8>> {
        let mut event = [0i64; 4];
        let limit = libc::timespec {
            tv_sec: limit.as_secs() as i64,
            tv_nsec: 0,
        };
        // SAFETY: room for one event of 32 bytes.
        let n = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                1,
                1,
                event.as_mut_ptr(),
                &limit,
            )
        };
        if Errno::result(n)? == 0 {
            // The buffer may still be written to.
            std::mem::forget(self);
            return Err(Errno::ETIMEDOUT);
        }
        // SAFETY: nothing is under way any more.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
        outcome(event[2], self.buffer)
    }
}

fn outcome(result: i64, mut buffer: Vec<u8>) -> Done<Vec<u8>> {
    if result < 0 {
        return Err(Errno::from_raw(-result as i32));
    }
    buffer.truncate(result as usize);
    Ok(buffer)
}

/// A ring with room for a few entries, and one read under way.
pub struct Uring {
    ring: OwnedFd,
    rings: *mut u8,
    entries: *mut u8,
    params: Params,
    buffer: Vec<u8>,
}

// SAFETY: the mappings belong to the object and are used by whoever has it.
unsafe impl Send for Uring {}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    resv: [u32; 3],
    /// head, tail, ring_mask, ring_entries, flags, dropped, array
    sq_off: [u32; 10],
    /// head, tail, ring_mask, ring_entries, overflow, cqes
    cq_off: [u32; 10],
}

const MAP: usize = 1 << 16;
const OFF_SQ_RING: i64 = 0;
const OFF_SQES: i64 = 0x1000_0000;
const FEAT_SINGLE_MMAP: u32 = 1;
const OP_READ: u8 = 22;
const ENTER_GETEVENTS: u32 = 1;

impl Uring {
    /// Submits a read of the file's first `len` bytes. `ENOSYS` if the kernel has no io_uring.
    pub fn read(fd: RawFd, len: usize) -> Done<Uring> {
        let mut params = Params::default();
        // SAFETY: the kernel fills `params`; the descriptor is fresh.
        let ring = unsafe {
            let fd = Errno::result(libc::syscall(libc::SYS_io_uring_setup, 4, &mut params))?;
            OwnedFd::from_raw_fd(fd as RawFd)
        };
        if params.features & FEAT_SINGLE_MMAP == 0 {
            return Err(Errno::ENOSYS);
        }
        let sq_size = params.sq_off[6] as usize + params.sq_entries as usize * 4;
        let cq_size = params.cq_off[5] as usize + params.cq_entries as usize * 16;
        let rings = map(&ring, sq_size.max(cq_size).min(MAP), OFF_SQ_RING)?;
        let entries = map(&ring, params.sq_entries as usize * 64, OFF_SQES)?;
        let mut this = Uring {
            ring,
            rings,
            entries,
            params,
            buffer: vec![0; len],
        };
        this.submit(fd)?;
        Ok(this)
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: the kernel says that there is an aligned word in the mapping.
        unsafe { &*self.rings.add(offset as usize).cast::<AtomicU32>() }
    }

    fn submit(&mut self, fd: RawFd) -> Done<()> {
        let mut entry = [0u8; 64];
        entry[0] = OP_READ;
        entry[4..8].copy_from_slice(&fd.to_ne_bytes());
        entry[16..24].copy_from_slice(&(self.buffer.as_mut_ptr() as u64).to_ne_bytes());
        entry[24..28].copy_from_slice(&(self.buffer.len() as u32).to_ne_bytes());
        // SAFETY: the first of the entries that are mapped.
        unsafe { std::ptr::copy_nonoverlapping(entry.as_ptr(), self.entries, 64) };
        self.word(self.params.sq_off[6]).store(0, Ordering::Relaxed);
        self.word(self.params.sq_off[1]).store(1, Ordering::Release);
        self.enter(1, 0)
    }

    fn enter(&self, submit: u32, wait: u32) -> Done<()> {
        let flags = if wait > 0 { ENTER_GETEVENTS } else { 0 };
        // SAFETY: plain numbers, no signal mask.
        let taken = Errno::result(unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.ring.as_raw_fd(),
                submit,
                wait,
                flags,
                std::ptr::null::<u8>(),
                0,
            )
        })?;
        // An entry that was not taken would be waited for in vain.
        if taken != i64::from(submit) {
            return Err(Errno::EBADE);
        }
        Ok(())
    }

    /// Waits for the end; the bytes read, or the errno of the read.
    pub fn wait(mut self) -> Done<Vec<u8>> {
        self.enter(0, 1)?;
        if self.word(self.params.cq_off[1]).load(Ordering::Acquire) == 0 {
            return Err(Errno::EAGAIN);
        }
        // SAFETY: the first completion was written: user data, then the result.
        let result = unsafe {
            self.rings
                .add(self.params.cq_off[5] as usize + 8)
                .cast::<i32>()
                .read_volatile()
        };
        outcome(result.into(), std::mem::take(&mut self.buffer))
    }
}

fn map(ring: &OwnedFd, size: usize, offset: i64) -> Done<*mut u8> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh mapping of the ring; it is left mapped, a scenario makes few.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            prot,
            libc::MAP_SHARED | libc::MAP_POPULATE,
            ring.as_raw_fd(),
            offset,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    Ok(at.cast())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_read_a_plain_file() {
        let file = std::fs::File::open("Cargo.toml").expect("tests run in the crate's directory");
        let wanted = std::fs::read("Cargo.toml").expect("the same")[..20].to_vec();
        let fd = file.as_raw_fd();
        let limit = Duration::from_secs(10);
        for result in [
            Aio::read(fd, 20).and_then(|a| a.wait(limit)),
            Uring::read(fd, 20).and_then(Uring::wait),
        ] {
            match result {
                // A container may forbid either.
                Err(Errno::ENOSYS | Errno::EPERM) => {}
                other => assert_eq!(other, Ok(wanted.clone())),
            }
        }
    }
}
