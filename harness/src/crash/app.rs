// SPDX-License-Identifier: GPL-2.0
//! Executes the operations of one process, each with its result as a line of text.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{channel, Receiver, Sender};

use nix::errno::Errno;
use nix::fcntl::{open, renameat2, AtFlags, OFlag, RenameFlags, AT_FDCWD};
use nix::sys::mman::{mmap, msync, munmap, MapFlags, MsFlags, ProtFlags};
use nix::sys::stat::{
    fchmodat, fstat, lstat, mknod, umask, utimensat, FchmodatFlags, FileStat, Mode, SFlag,
    UtimensatFlags,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{self, Gid, Uid, UnlinkatFlags};

use super::op::{pattern, sum, Op, Proc};
use super::shown::{entries, xattr, xattr_names, Shown};

/// Status of a process that has done nothing, which is nothing to compare.
pub const CANNOT_BEGIN: i32 = 77;

/// Does everything that `proc` does below `dir`, a line for each into `log`. Runs in a process of its own.
pub fn run(proc: &Proc, dir: &Path, log: File, blocks: bool) -> i32 {
    crate::raw::app::faults_kill();
    match begin(proc, dir) {
        Ok(()) => {}
        Err(e) => {
            let _ = writeln!(&log, "cannot begin: {e:?}");
            return CANNOT_BEGIN;
        }
    }
    let mut app = App {
        shown: Shown::new(blocks),
        files: BTreeMap::new(),
        streams: BTreeMap::new(),
        cwds: BTreeMap::new(),
    };
    for op in &proc.ops {
        let result = app.execute(op).unwrap_or_else(|e| format!("{e:?}"));
        // Unbuffered: of a process that hangs one wants to know where.
        if writeln!(&log, "{op:?} = {result}").is_err() {
            return 2;
        }
    }
    0
}

fn begin(proc: &Proc, dir: &Path) -> nix::Result<()> {
    umask(Mode::from_bits_truncate(0o022));
    if proc.uid != 0 {
        let (uid, gid) = (Uid::from_raw(proc.uid), Gid::from_raw(proc.uid));
        unistd::setgroups(&[])?;
        unistd::setresgid(gid, gid, gid)?;
        unistd::setresuid(uid, uid, uid)?;
    }
    unistd::chdir(dir)
}

struct Stream {
    fd: OwnedFd,
    seen: Vec<(String, u8, u64)>,
}

/// A thread whose current directory is somewhere else.
struct Holder {
    ask: Sender<()>,
    told: Receiver<nix::Result<FileStat>>,
}

struct App {
    shown: Shown,
    files: BTreeMap<u8, OwnedFd>,
    streams: BTreeMap<u8, Stream>,
    cwds: BTreeMap<u8, Holder>,
}

type Told = nix::Result<String>;

fn done(result: nix::Result<()>) -> Told {
    result.map(|()| "0".into())
}

fn data(bytes: &[u8]) -> String {
    format!("{}:{:x}", bytes.len(), sum(bytes))
}

fn c(path: &str) -> nix::Result<CString> {
    CString::new(path).map_err(|_| Errno::EINVAL)
}

fn mode(bits: u32) -> Mode {
    Mode::from_bits_truncate(bits)
}

impl App {
    fn file(&self, slot: u8) -> nix::Result<&OwnedFd> {
        self.files.get(&slot).ok_or(Errno::EBADF)
    }

    fn execute(&mut self, op: &Op) -> Told {
        match op {
            Op::Mkdir(path, bits) => done(unistd::mkdir(path.as_str(), mode(*bits))),
            Op::Mknod(path, bits, dev) => {
                let kind = SFlag::from_bits_truncate(*bits & libc::S_IFMT);
                done(mknod(path.as_str(), kind, mode(*bits), *dev))
            }
            Op::Symlink(target, path) => {
                done(unistd::symlinkat(target.as_str(), AT_FDCWD, path.as_str()))
            }
            Op::Link(old, new) => done(unistd::linkat(
                AT_FDCWD,
                old.as_str(),
                AT_FDCWD,
                new.as_str(),
                AtFlags::empty(),
            )),
            Op::Unlink(path) => done(unistd::unlink(path.as_str())),
            Op::Rmdir(path) => done(unistd::unlinkat(
                AT_FDCWD,
                path.as_str(),
                UnlinkatFlags::RemoveDir,
            )),
            Op::Rename(old, new, flags) => done(renameat2(
                AT_FDCWD,
                old.as_str(),
                AT_FDCWD,
                new.as_str(),
                RenameFlags::from_bits_retain(*flags),
            )),
            Op::Chmod(path, bits) => done(fchmodat(
                AT_FDCWD,
                path.as_str(),
                mode(*bits),
                FchmodatFlags::FollowSymlink,
            )),
            Op::Chown(path, uid, gid) => done(unistd::fchownat(
                AT_FDCWD,
                path.as_str(),
                Some(Uid::from_raw(*uid)),
                Some(Gid::from_raw(*gid)),
                AtFlags::AT_SYMLINK_NOFOLLOW,
            )),
            Op::Truncate(path, len) => done(unistd::truncate(path.as_str(), *len as i64)),
            Op::Ftruncate(slot, len) => done(unistd::ftruncate(self.file(*slot)?, *len as i64)),
            Op::Utimes(path, at) => times(
                path,
                TimeSpec::new(*at, 123_456_789),
                TimeSpec::new(*at + 7, 987_654_321),
            ),
            Op::UtimesNow(path) => times(path, TimeSpec::UTIME_NOW, TimeSpec::UTIME_NOW),
            Op::Stat(path) => Ok(self.shown.stat(&lstat(path.as_str())?)),
            Op::StatSync(path) => self.stat_sync(path),
            Op::Readlink(path) => Ok(format!("{:?}", nix::fcntl::readlink(path.as_str())?)),
            Op::Statfs => {
                let st = nix::sys::statvfs::statvfs(".")?;
                Ok(format!("{} {}", st.block_size(), st.name_max()))
            }
            Op::SetXattr(..) | Op::GetXattr(..) | Op::ListXattr(..) | Op::RemoveXattr(..) => {
                attribute(op)
            }
            Op::OpenDir(..) | Op::ReadSome(..) | Op::ReadRest(..) | Op::CloseDir(..) => {
                self.stream(op)
            }
            Op::List(path) => {
                let fd = open(path.as_str(), OFlag::O_RDONLY | OFlag::O_DIRECTORY, mode(0))?;
                let mut all = Vec::new();
                rest(&fd, &mut all)?;
                Ok(self.listed(all))
            }
            Op::Run(script) => run_script(script),
            Op::HoldCwd(..) | Op::AskCwd(..) | Op::LetCwd(..) => self.held(op),
            _ => self.on_file(op),
        }
    }

    /// What works on open files.
    fn on_file(&mut self, op: &Op) -> Told {
        match *op {
            Op::Open(slot, ref path, flags, bits) => {
                // Before the new one, or the old one's RELEASE would come at the end of this.
                self.files.remove(&slot);
                let flags = OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC;
                let fd = open(path.as_str(), flags, mode(bits))?;
                self.files.insert(slot, fd);
                Ok("0".into())
            }
            Op::Close(slot) => {
                let fd = self.files.remove(&slot).ok_or(Errno::EBADF)?;
                done(unistd::close(fd))
            }
            Op::Fstat(slot) => {
                let st = fstat(self.file(slot)?)?;
                Ok(self.shown.stat(&st))
            }
            Op::Write(slot, at, len, seed) => {
                let written =
                    nix::sys::uio::pwrite(self.file(slot)?, &pattern(len, seed), at as i64)?;
                Ok(written.to_string())
            }
            Op::Append(slot, len, seed) => {
                Ok(unistd::write(self.file(slot)?, &pattern(len, seed))?.to_string())
            }
            Op::Read(slot, at, len) => {
                let mut buf = vec![0; len];
                let n = nix::sys::uio::pread(self.file(slot)?, &mut buf, at as i64)?;
                Ok(data(&buf[..n]))
            }
            Op::Fsync(slot, true) => done(unistd::fdatasync(self.file(slot)?)),
            Op::Fsync(slot, false) => done(unistd::fsync(self.file(slot)?)),
            Op::Fallocate(slot, mode, at, len) => {
                let fd = self.file(slot)?.as_raw_fd();
                // SAFETY: plain integers; the descriptor is open.
                let ret = unsafe { libc::fallocate(fd, mode, at as i64, len as i64) };
                Errno::result(ret).map(|n| n.to_string())
            }
            Op::Copy(from, at, to, to_at, len) => {
                let (mut at, mut to_at) = (at as i64, to_at as i64);
                let (from, to) = (self.file(from)?, self.file(to)?);
                // SAFETY: both offsets are ours, both descriptors open.
                let n = Errno::result(unsafe {
                    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
                    libc::copy_file_range(from, &mut at, to, &mut to_at, len, 0)
                })?;
                Ok(format!("{n}, at {at} and {to_at}"))
            }
            Op::Seek(slot, at, whence) => {
                let fd = self.file(slot)?.as_raw_fd();
                // SAFETY: plain integers; the descriptor is open.
                Errno::result(unsafe { libc::lseek(fd, at, whence) }).map(|n| n.to_string())
            }
            Op::MapRead(slot, len) => self.mapped(slot, len, |memory| {
                let copy = memory.to_vec();
                Ok(data(&copy))
            }),
            Op::MapWrite(slot, at, len, seed) => self.mapped(slot, at + len, |memory| {
                let at = at.min(memory.len());
                let there = &mut memory[at..];
                there.copy_from_slice(&pattern(there.len(), seed));
                Ok(there.len().to_string())
            }),
            _ => Err(Errno::ENOSYS),
        }
    }

    /// At most as much as the file has: beyond that there is only SIGBUS.
    fn mapped(&self, slot: u8, len: usize, with: impl FnOnce(&mut [u8]) -> Told) -> Told {
        let fd = self.file(slot)?;
        let len = len.min(fstat(fd)?.st_size as usize);
        let Some(size) = std::num::NonZeroUsize::new(len) else {
            return Ok("nothing to map".into());
        };
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: no address is asked for, so no mapping of anybody is replaced.
        let base = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, fd, 0) }?;
        // SAFETY: mapped above with this length, and nobody else in this process knows of it.
        let result = with(unsafe { std::slice::from_raw_parts_mut(base.cast().as_ptr(), len) });
        // SAFETY: as above; the slice is gone.
        let synced = unsafe { msync(base, len, MsFlags::MS_SYNC) };
        // SAFETY: as above.
        unsafe { munmap(base, len) }?;
        synced?;
        result
    }

    fn stat_sync(&mut self, path: &str) -> Told {
        let path = c(path)?;
        // SAFETY: all zeros is a valid value of this plain struct.
        let mut stx: libc::statx = unsafe { std::mem::zeroed() };
        let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_STATX_FORCE_SYNC;
        // SAFETY: the path is NUL-terminated and the buffer writable.
        let ret = unsafe {
            libc::statx(
                libc::AT_FDCWD,
                path.as_ptr(),
                flags,
                libc::STATX_BASIC_STATS,
                &mut stx,
            )
        };
        Errno::result(ret)?;
        // SAFETY: as above.
        let mut st: libc::stat = unsafe { std::mem::zeroed() };
        st.st_ino = stx.stx_ino;
        st.st_mode = stx.stx_mode.into();
        st.st_nlink = stx.stx_nlink.into();
        (st.st_uid, st.st_gid) = (stx.stx_uid, stx.stx_gid);
        st.st_size = stx.stx_size as i64;
        st.st_blocks = stx.stx_blocks as i64;
        st.st_rdev = libc::makedev(stx.stx_rdev_major, stx.stx_rdev_minor);
        (st.st_atime, st.st_atime_nsec) = (stx.stx_atime.tv_sec, stx.stx_atime.tv_nsec.into());
        (st.st_mtime, st.st_mtime_nsec) = (stx.stx_mtime.tv_sec, stx.stx_mtime.tv_nsec.into());
        Ok(self.shown.stat(&st))
    }

    fn stream(&mut self, op: &Op) -> Told {
        match op {
            Op::OpenDir(slot, path) => {
                let fd = open(path.as_str(), OFlag::O_RDONLY | OFlag::O_DIRECTORY, mode(0))?;
                let seen = Vec::new();
                self.streams.insert(*slot, Stream { fd, seen });
                Ok("0".into())
            }
            Op::ReadSome(slot) => {
                let stream = self.streams.get_mut(slot).ok_or(Errno::EBADF)?;
                stream.seen.extend(entries(&stream.fd, 512)?);
                Ok("some".into())
            }
            Op::ReadRest(slot) => {
                let stream = self.streams.get_mut(slot).ok_or(Errno::EBADF)?;
                rest(&stream.fd, &mut stream.seen)?;
                let mut seen = std::mem::take(&mut stream.seen);
                seen.retain(|(name, ..)| !name.starts_with('t'));
                Ok(self.listed(seen))
            }
            Op::CloseDir(slot) => {
                let stream = self.streams.remove(slot).ok_or(Errno::EBADF)?;
                done(unistd::close(stream.fd))
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    fn listed(&mut self, mut all: Vec<(String, u8, u64)>) -> String {
        all.sort();
        let each: Vec<String> = all
            .iter()
            // What is above the mount's root is told by nobody.
            .map(|(name, kind, ino)| match name.as_str() {
                ".." => "..".into(),
                _ => format!("{name}:{kind}:#{}", self.shown.ino(*ino)),
            })
            .collect();
        format!("{} entries: {}", each.len(), each.join(" "))
    }

    fn held(&mut self, op: &Op) -> Told {
        match op {
            Op::HoldCwd(slot, path) => {
                let (ask, asked) = channel();
                let (tell, told) = channel();
                let path = path.clone();
                let work = move || hold(&path, &asked, &tell);
                std::thread::Builder::new()
                    .stack_size(128 << 10)
                    .spawn(work)
                    .map_err(|_| Errno::EAGAIN)?;
                self.cwds.insert(*slot, Holder { ask, told });
                self.asked(*slot)
            }
            Op::AskCwd(slot) => {
                let holder = self.cwds.get(slot).ok_or(Errno::EBADF)?;
                holder.ask.send(()).map_err(|_| Errno::ESRCH)?;
                self.asked(*slot)
            }
            Op::LetCwd(slot) => {
                let holder = self.cwds.remove(slot).ok_or(Errno::EBADF)?;
                drop(holder.ask);
                // Its end: the directory is let go only then.
                while holder.told.recv().is_ok() {}
                Ok("0".into())
            }
            _ => Err(Errno::ENOSYS),
        }
    }

    fn asked(&mut self, slot: u8) -> Told {
        let holder = self.cwds.get(&slot).ok_or(Errno::EBADF)?;
        let st = holder.told.recv().map_err(|_| Errno::ESRCH)??;
        Ok(self.shown.stat(&st))
    }
}

/// The thread of a [`Holder`].
fn hold(path: &str, asked: &Receiver<()>, tell: &Sender<nix::Result<FileStat>>) {
    let there = nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS)
        .and_then(|()| unistd::chdir(path))
        .and_then(|()| lstat("."));
    let _ = tell.send(there);
    while asked.recv().is_ok() {
        if tell.send(lstat(".")).is_err() {
            break;
        }
    }
    let _ = unistd::chdir("/");
}

fn run_script(script: &str) -> Told {
    let mut command = std::process::Command::new("sh");
    command
        .args(["-ec", script])
        .env("HOME", "/nonexistent")
        .env("LC_ALL", "C");
    for (name, value) in super::programs::VARIABLES {
        command.env(name, value);
    }
    let out = command.stdin(std::process::Stdio::null()).output();
    let out = out.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    let said = |bytes: &[u8]| {
        String::from_utf8_lossy(bytes)
            .trim_end()
            .replace('\n', "; ")
    };
    Ok(format!(
        "{}: {} {}",
        out.status,
        said(&out.stdout),
        said(&out.stderr)
    ))
}

fn rest(fd: &OwnedFd, all: &mut Vec<(String, u8, u64)>) -> nix::Result<()> {
    loop {
        let some = entries(fd, 4096)?;
        if some.is_empty() {
            return Ok(());
        }
        all.extend(some);
    }
}

fn times(path: &str, access: TimeSpec, change: TimeSpec) -> Told {
    let flags = UtimensatFlags::NoFollowSymlink;
    done(utimensat(AT_FDCWD, path, &access, &change, flags))
}

fn attribute(op: &Op) -> Told {
    match op {
        Op::SetXattr(path, name, len, seed, flags) => {
            let (path, name, value) = (c(path)?, c(name)?, pattern(*len, *seed));
            // SAFETY: both strings are NUL-terminated, and the value is readable for its length.
            let ret = unsafe {
                libc::lsetxattr(
                    path.as_ptr(),
                    name.as_ptr(),
                    value.as_ptr().cast(),
                    value.len(),
                    *flags,
                )
            };
            done(Errno::result(ret).map(drop))
        }
        Op::GetXattr(path, name) => Ok(data(&xattr(&c(path)?, &c(name)?)?)),
        Op::ListXattr(path) => Ok(format!("{:?}", xattr_names(&c(path)?)?)),
        Op::RemoveXattr(path, name) => {
            let (path, name) = (c(path)?, c(name)?);
            // SAFETY: both strings are NUL-terminated.
            done(
                Errno::result(unsafe { libc::lremovexattr(path.as_ptr(), name.as_ptr()) })
                    .map(drop),
            )
        }
        _ => Err(Errno::ENOSYS),
    }
}

/// Where a process writes its lines.
pub fn log(path: &Path) -> std::io::Result<File> {
    let file = File::create(path)?;
    // Above what the operations use, so that their descriptors have the same numbers in every run.
    // SAFETY: plain integers; the new descriptor is owned by nobody else.
    let high = Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 200) })?;
    // SAFETY: as above.
    Ok(unsafe { File::from_raw_fd(high) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(ops: Vec<Op>) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let out = tempfile::NamedTempFile::new().unwrap();
        let proc = Proc {
            id: 0,
            uid: 0,
            many: false,
            ops,
        };
        let (at, to) = (dir.path().to_owned(), out.path().to_owned());
        // In a process of its own, as always: it changes its directory and mask.
        let mut child =
            crate::raw::app::Proc::spawn("app", &[], || run(&proc, &at, log(&to).unwrap(), false))
                .unwrap();
        assert_eq!(
            child.wait_code(std::time::Duration::from_secs(30)).unwrap(),
            0
        );
        let text = std::fs::read_to_string(out.path()).unwrap();
        text.lines()
            .map(|line| line.split_once(" = ").unwrap().1.to_owned())
            .collect()
    }

    #[test]
    fn results_are_those_of_the_system_calls() {
        let told = lines(vec![
            Op::Mkdir("d".into(), 0o700),
            Op::Mkdir("d".into(), 0o700),
            Op::Open(0, "f".into(), libc::O_CREAT | libc::O_RDWR, 0o666),
            Op::Write(0, 3, 10, 1),
            Op::Read(0, 3, 100),
            Op::Close(0),
            Op::Read(0, 0, 1),
            Op::Unlink("none".into()),
            Op::Utimes("f".into(), 1_000_000_000),
            Op::Stat("f".into()),
            Op::List(".".into()),
        ]);
        assert_eq!(told[..4], ["0", "EEXIST", "0", "10"]);
        assert_eq!(told[4], data(&pattern(10, 1)));
        assert_eq!(told[5..9], ["0", "EBADF", "ENOENT", "0"]);
        let st = &told[9];
        assert!(st.contains("mode 100644") && st.contains("size 13"), "{st}");
        assert!(
            st.ends_with("atime 1000000000.123456789 mtime 1000000007.987654321"),
            "{st}"
        );
        assert!(told[10].starts_with("4 entries: .:4:#"), "{}", told[10]);
    }

    #[test]
    fn a_holder_sees_its_directory_when_it_is_gone() {
        let told = lines(vec![
            Op::Mkdir("d".into(), 0o755),
            Op::HoldCwd(0, "d".into()),
            Op::Rmdir("d".into()),
            Op::AskCwd(0),
            Op::LetCwd(0),
            Op::AskCwd(0),
        ]);
        assert!(
            told[1].contains("links 2") || told[1].contains("links 1"),
            "{}",
            told[1]
        );
        assert_eq!(told[2], "0");
        assert!(told[3].contains("links 0"), "{}", told[3]);
        assert_eq!(told[4..], ["0", "EBADF"]);
    }
}
