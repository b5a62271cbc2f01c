// SPDX-License-Identifier: GPL-2.0
//! What applications do meanwhile: processes with one or two threads, all kinds of system calls, interrupted and killed.
//!
//! Each works in a directory of its own, so what it reads back is known; some operations go to names shared by all.

use std::ffi::CString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use anyhow::Result;
use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags};

use super::script::{AppOp, AppScript, Mode};
use super::shared::Shared;
use crate::raw::app::{faults_kill, Proc};
use crate::raw::ops::{self, Done};

/// Data that came back other than it went in.
const WRONG_DATA: i32 = 0;

/// What a server that keeps the contract never makes of an operation, however often it dies.
const NEVER: [i32; 6] = [
    libc::EIO,
    libc::ENOTCONN,
    libc::ECONNABORTED,
    libc::ENODEV,
    libc::ESTALE,
    libc::EPROTO,
];

pub fn start(
    index: usize,
    script: &AppScript,
    mnt: &Path,
    close: &[RawFd],
    mode: Mode,
    shared: &'static Shared,
) -> Result<Proc> {
    let (script, mnt) = (script.clone(), mnt.to_owned());
    Proc::spawn(&format!("application {index}"), close, move || {
        faults_kill();
        // By a relative name nobody leaves the mount when it is detached.
        if std::env::set_current_dir(&mnt).is_err() {
            return 0;
        }
        if let Some(micros) = script.alarm {
            alarm(micros);
        }
        let work = move |thread: usize, ops: Vec<AppOp>| {
            // Where one of them goes with chdir(), the other must not be.
            // SAFETY: only this thread's current directory, root and umask are concerned.
            let alone = unsafe { libc::unshare(libc::CLONE_FS) };
            assert_eq!(alone, 0, "unshare: {}", Errno::last());
            let mut app = App {
                base: PathBuf::from(format!("a{index}{}", ["", "t"][thread])),
                kept: None,
            };
            let _ = ops::mkdir(&app.base);
            let mut step = 0;
            while !shared.stopped() {
                let op = ops[step % ops.len()];
                shared.app_op();
                if let Err(e) = app.run(op) {
                    let code = e as i32;
                    let wrong = e == Errno::UnknownErrno || NEVER.contains(&code);
                    if wrong && mode == Mode::Honest {
                        shared.is_wrong(index, step % ops.len(), code.max(WRONG_DATA));
                    }
                }
                step += 1;
            }
        };
        let mut backwards = script.ops.clone();
        backwards.reverse();
        let twin = script
            .twin
            .then(|| std::thread::spawn(move || work(1, backwards)));
        work(0, script.ops);
        twin.map_or(0, |t| i32::from(t.join().is_err()))
    })
}

extern "C" fn nothing(_: i32) {}

/// Interrupts system calls with a handler that does nothing and restarts nothing.
fn alarm(micros: u32) {
    use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
    let action = SigAction::new(
        SigHandler::Handler(nothing),
        SaFlags::empty(),
        SigSet::empty(),
    );
    let time = libc::timeval {
        tv_sec: 0,
        tv_usec: micros.into(),
    };
    let timer = libc::itimerval {
        it_interval: time,
        it_value: time,
    };
    // SAFETY: the handler does nothing, and the kernel only reads the timer.
    unsafe {
        let _ = sigaction(Signal::SIGALRM, &action);
        libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut());
    }
}

struct App {
    base: PathBuf,
    kept: Option<RawFd>,
}

impl App {
    fn own(&self, kind: &str, n: u8) -> PathBuf {
        self.base.join(format!("{kind}{n}"))
    }

    fn run(&mut self, op: AppOp) -> Done<()> {
        let shared = |n: u8| PathBuf::from(format!("f{n}"));
        match op {
            AppOp::Stat(n) => ops::stat(&self.own("f", n)).map(drop),
            AppOp::Missing(n) => match ops::stat(&self.own("none", n)) {
                // Nobody ever made it.
                Ok(_) => Err(Errno::UnknownErrno),
                Err(e) => Err(e),
            },
            AppOp::Mkdir(n) => ops::mkdir(&self.own("d", n)),
            AppOp::Rmdir(n) => ops::rmdir(&self.own("d", n)),
            AppOp::RoundTrip(n, len) => self.round_trip(n, len.into()),
            AppOp::Unlink(n) => ops::unlink(&self.own("f", n)),
            AppOp::Rename(a, b) => {
                ops::rename(&self.own("f", a), &self.own("f", b), RenameFlags::empty())
            }
            AppOp::Exchange(a, b) => ops::rename(
                &self.own("f", a),
                &self.own("f", b),
                RenameFlags::RENAME_EXCHANGE,
            ),
            AppOp::Link(a, b) => ops::link(&self.own("f", a), &self.own("l", b)),
            AppOp::Symlink(n) => self.symlink(n),
            AppOp::List => ops::listdir(&self.base).map(drop),
            AppOp::Truncate(n, len) => {
                self.with(&self.own("f", n), |fd| ops::ftruncate(fd, len.into()))
            }
            AppOp::Chmod(n) => ops::chmod(&self.own("f", n), 0o600),
            AppOp::Xattr(n) => self.xattr(n),
            AppOp::Map(n) => self.map(n),
            AppOp::Fsync(n) => self.with(&self.own("f", n), |fd| {
                ops::pwrite(fd, b"synced", 0)?;
                ops::fsync(fd)
            }),
            AppOp::Seek(n) => self.with(&self.own("f", n), |fd| ops::seek_data(fd, 0).map(drop)),
            AppOp::Lock(n) => self.with(&shared(n), ops::lock),
            AppOp::Splice(n) => {
                self.with(&self.own("f", n), |fd| ops::splice_read(fd, 100).map(drop))
            }
            AppOp::CopyRange(a, b) => self.with(&self.own("f", a), |from| {
                self.with(&self.own("f", b), |to| {
                    ops::copy_file_range(from, to, 64).map(drop)
                })
            }),
            AppOp::Allocate(n) => self.with(&self.own("f", n), |fd| ops::fallocate(fd, 0, 100)),
            AppOp::Statfs => nix::sys::statfs::statfs(&self.base).map(drop),
            AppOp::Keep(n) => {
                if let Some(fd) = self.kept.take() {
                    let _ = ops::pread(fd, 10, 0);
                    let _ = ops::close(fd);
                }
                self.kept = Some(ops::open(&self.own("f", n), OFlag::O_RDWR)?);
                Ok(())
            }
            AppOp::Poll => self.kept.map_or(Ok(()), |fd| ops::poll_now(fd).map(drop)),
            AppOp::Chdir(n) => {
                // Below a directory that may be removed meanwhile, and back. The descriptor holds the place.
                let here = ops::open(Path::new("."), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
                let down = nix::unistd::chdir(&self.own("d", n));
                let listed = down.and_then(|()| ops::stat(Path::new(".")).map(drop));
                let back = nix::unistd::fchdir(unsafe_borrow(here));
                let _ = ops::close(here);
                // Without the way back every name would be another one.
                if back.is_err() {
                    // SAFETY: leaves at once; nothing of this process is needed any more.
                    unsafe { libc::_exit(0) }
                }
                listed
            }
            AppOp::SharedStat(n) => ops::stat(&shared(n)).map(drop),
            AppOp::SharedWrite(n) => {
                self.with(&shared(n), |fd| ops::pwrite(fd, b"shared", 0).map(drop))
            }
        }
    }

    fn with(&self, path: &Path, run: impl FnOnce(RawFd) -> Done<()>) -> Done<()> {
        let fd = ops::open(path, OFlag::O_RDWR)?;
        let result = run(fd);
        result.and(ops::close(fd).map(drop))
    }

    /// What was written must be what is read, whatever happened to servers in between.
    fn round_trip(&self, n: u8, len: usize) -> Done<()> {
        let path = self.own("r", n);
        let data: Vec<u8> = (0..len)
            .map(|i| (i * 7 + len + usize::from(n)) as u8)
            .collect();
        let fd = ops::open(&path, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_TRUNC)?;
        let wrote = fill(fd, &data);
        let closed = ops::close(fd);
        wrote.and(closed)?;
        let fd = ops::open(&path, OFlag::O_RDONLY)?;
        let read = ops::pread(fd, len + 1, 0);
        let size = ops::fstat(fd).map(|s| s.stx_size);
        ops::close(fd)?;
        let (read, size) = (read?, size?);
        if read != data || size != len as u64 {
            let same = read.iter().zip(&data).take_while(|(a, b)| a == b).count();
            eprintln!(
                "{}: {} bytes of {len} were read, the first {same} right, then {:x?}; the size is {size}",
                path.display(),
                read.len(),
                &read[same..read.len().min(same + 8)],
            );
            return Err(Errno::UnknownErrno);
        }
        gone_once(ops::unlink(&path))
    }

    fn symlink(&self, n: u8) -> Done<()> {
        let path = self.own("s", n);
        ops::symlink("where/it/leads", &path)?;
        let target = ops::readlink(&path)?;
        gone_once(ops::unlink(&path))?;
        match target == "where/it/leads" {
            true => Ok(()),
            false => Err(Errno::UnknownErrno),
        }
    }

    fn xattr(&self, n: u8) -> Done<()> {
        let path = self.own("f", n);
        ops::setxattr(&path, "user.fuzz", &[n; 20])?;
        let (path, name) = (c_path(&path), c"user.fuzz");
        let mut value = [0u8; 40];
        // SAFETY: two strings that end, and the buffer's own length.
        let got = unsafe {
            libc::getxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        match Errno::result(got)? {
            20 if value[..20] == [n; 20] => Ok(()),
            _ => Err(Errno::UnknownErrno),
        }
    }

    /// Writes through a shared mapping, and reads by read(2).
    fn map(&self, n: u8) -> Done<()> {
        let path = self.own("m", n);
        let fd = ops::open(&path, OFlag::O_RDWR | OFlag::O_CREAT)?;
        let result = fill(fd, &[n; 8192]).and_then(|()| {
            // SAFETY: a new mapping of a file that has these two pages; removed before anybody can shorten it.
            unsafe {
                let at = libc::mmap(
                    std::ptr::null_mut(),
                    8192,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED,
                    fd,
                    0,
                );
                if at == libc::MAP_FAILED {
                    return Err(Errno::last());
                }
                at.cast::<u8>().add(4096).write_volatile(0x77);
                let seen = at.cast::<u8>().read_volatile();
                libc::munmap(at, 8192);
                if seen != n {
                    return Err(Errno::UnknownErrno);
                }
            }
            match ops::pread(fd, 1, 4096)?.as_slice() {
                [0x77] => Ok(()),
                _ => Err(Errno::UnknownErrno),
            }
        });
        result.and(ops::close(fd))
    }
}

/// Writes all of it; a signal may cut a write short.
fn fill(fd: RawFd, data: &[u8]) -> Done<()> {
    let mut done = 0;
    while done < data.len() {
        done += ops::pwrite(fd, &data[done..], done as i64)?;
    }
    Ok(())
}

/// The name was there a moment ago: if it is not, then the removal was executed twice.
fn gone_once(removed: Done<()>) -> Done<()> {
    match removed {
        Err(Errno::ENOENT) => Err(Errno::UnknownErrno),
        other => other,
    }
}

fn c_path(path: &Path) -> CString {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).expect("no NUL in the names here")
}

fn unsafe_borrow(fd: RawFd) -> std::os::fd::BorrowedFd<'static> {
    // SAFETY: the caller closes it after the call it is borrowed for.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) }
}
