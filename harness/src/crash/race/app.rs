// SPDX-License-Identifier: GPL-2.0
//! A racing process: does its calls, each between two stamps, and writes them down.

use std::ffi::CString;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{open, renameat2, OFlag, RenameFlags, AT_FDCWD};
use nix::sys::stat::{fstat, lstat, mknod, FileStat, Mode, SFlag};
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{self, UnlinkatFlags};

use super::op::{Got, How, Kind, Name, Op, Record, DIRS, REGISTERS};
use super::shared::Shared;
use crate::crash::app::CANNOT_BEGIN;
use crate::crash::shown;

const ATTRIBUTE: &std::ffi::CStr = c"user.race";
/// More than any file of a history has.
const WHOLE: usize = 4096;
/// Room for all entries of a directory.
const ENTRIES: usize = 8192;

/// How often the server may die while a process only begins.
const ENTER: usize = 1000;

/// Makes what is there from the beginning, in an empty directory.
pub fn prepare(root: &Path) -> std::io::Result<()> {
    for dir in DIRS {
        std::fs::create_dir(root.join(dir))?;
    }
    for register in REGISTERS {
        std::fs::write(root.join(register), [0])?;
    }
    Ok(())
}

/// Where a process gets its operations from, and what it waits for in between.
pub struct Work<'a> {
    pub process: u8,
    pub ops: &'a [Op],
    /// After so many operations it waits for all others, so that at some moment no call is under way.
    pub meet: Option<(usize, u64)>,
}

/// Does the work in `root`, a line for each operation into `log`. Runs in a process of its own.
pub fn run(work: &Work<'_>, root: &Path, log: &Path, shared: &Shared) -> i32 {
    crate::raw::app::faults_kill();
    let ended = race(work, root, log, shared);
    if ended != 0 {
        shared.missing();
    }
    ended
}

/// Into the directory of the race, which is no call of the history. Cloned descriptors on a kernel that only sends again:
/// a request that the server died over is over.
fn enter(root: &Path) -> nix::Result<()> {
    for _ in 0..ENTER {
        match unistd::chdir(root) {
            Err(Errno::ECONNABORTED) => {}
            other => return other,
        }
    }
    Err(Errno::ECONNABORTED)
}

fn race(work: &Work<'_>, root: &Path, log: &Path, shared: &Shared) -> i32 {
    let (Ok(log), Ok(())) = (File::create(log), enter(root)) else {
        return CANNOT_BEGIN;
    };
    for (n, op) in work.ops.iter().enumerate() {
        let called = shared.stamp(work.process);
        let got = execute(op);
        let returned = shared.stamp(work.process);
        let record = Record {
            process: work.process,
            op: *op,
            called,
            returned,
            got: got.unwrap_or_else(|e| Got::Failed(e as i32)),
        };
        let Ok(line) = serde_json::to_string(&record) else {
            return 3;
        };
        // Unbuffered: of a process that hangs one wants to know where.
        if writeln!(&log, "{line}").is_err() {
            return 2;
        }
        if let Some((each, all)) = work.meet {
            if (n + 1).is_multiple_of(each) {
                shared.meet(all, ((n + 1) / each) as u64);
            }
        }
    }
    0
}

/// Operations that look at everything: for a process that comes when the others have ended.
pub fn looks() -> Vec<Op> {
    let mut ops: Vec<Op> = (0..DIRS.len() as u8).map(Op::List).collect();
    for name in Name::all() {
        ops.extend([
            Op::Stat(name),
            Op::Readlink(name),
            Op::Read(name),
            Op::GetXattr(name),
        ]);
    }
    ops.extend((0..REGISTERS.len() as u8).map(Op::Get));
    ops
}

fn c(path: &str) -> nix::Result<CString> {
    CString::new(path).map_err(|_| Errno::EINVAL)
}

fn opened(path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    open(path, flags, Mode::from_bits_truncate(0o644))
}

fn done(result: nix::Result<()>) -> nix::Result<Got> {
    result.map(|()| Got::Done)
}

fn execute(op: &Op) -> nix::Result<Got> {
    let bits = Mode::from_bits_truncate(0o755);
    match *op {
        Op::Create(name) => {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY;
            let file = opened(&name.path(), flags)?;
            Ok(node(&fstat(&file)?))
        }
        Op::Mknod(name) => done(mknod(name.path().as_str(), SFlag::S_IFREG, bits, 0)),
        Op::Mkdir(name) => done(unistd::mkdir(name.path().as_str(), bits)),
        Op::Symlink(name, target) => {
            let target = format!("to-{target}");
            done(unistd::symlinkat(
                target.as_str(),
                AT_FDCWD,
                name.path().as_str(),
            ))
        }
        Op::Rmdir(name) => remove(name, UnlinkatFlags::RemoveDir),
        Op::Unlink(name) => remove(name, UnlinkatFlags::NoRemoveDir),
        Op::Link(from, to) => done(unistd::linkat(
            AT_FDCWD,
            from.path().as_str(),
            AT_FDCWD,
            to.path().as_str(),
            nix::fcntl::AtFlags::empty(),
        )),
        Op::Rename(from, to, how) => {
            let flags = match how {
                How::Plain => RenameFlags::empty(),
                How::NoReplace => RenameFlags::RENAME_NOREPLACE,
                How::Exchange => RenameFlags::RENAME_EXCHANGE,
            };
            let (from, to) = (from.path(), to.path());
            done(renameat2(
                AT_FDCWD,
                from.as_str(),
                AT_FDCWD,
                to.as_str(),
                flags,
            ))
        }
        Op::SetNew(name, value) => set(name, value, libc::XATTR_CREATE),
        Op::SetOld(name, value) => set(name, value, libc::XATTR_REPLACE),
        Op::RemoveXattr(name) => {
            let path = c(&name.path())?;
            // SAFETY: both strings are NUL-terminated.
            let ret = unsafe { libc::lremovexattr(path.as_ptr(), ATTRIBUTE.as_ptr()) };
            done(Errno::result(ret).map(drop))
        }
        Op::GetXattr(name) => Ok(Got::Bytes(shown::xattr(&c(&name.path())?, ATTRIBUTE)?)),
        Op::Stat(name) => Ok(node(&lstat(name.path().as_str())?)),
        Op::Readlink(name) => {
            let target = nix::fcntl::readlink(name.path().as_str())?;
            let number = target.to_str().and_then(|text| text.strip_prefix("to-"));
            let number = number.and_then(|number| number.parse().ok());
            Ok(number.map_or_else(|| Got::Odd(format!("{target:?}")), Got::Target))
        }
        Op::Append(name, value) => {
            let file = opened(&name.path(), OFlag::O_WRONLY | OFlag::O_APPEND)?;
            written(unistd::write(&file, &[value])?)
        }
        Op::Read(name) => {
            let file = opened(&name.path(), OFlag::O_RDONLY)?;
            read(&file)
        }
        Op::List(dir) => list(dir),
        Op::Put(register, value) => {
            let file = opened(REGISTERS[usize::from(register)], OFlag::O_WRONLY)?;
            written(pwrite(&file, &[value], 0)?)
        }
        Op::Get(register) => read(&opened(REGISTERS[usize::from(register)], OFlag::O_RDONLY)?),
    }
}

fn remove(name: Name, flags: UnlinkatFlags) -> nix::Result<Got> {
    done(unistd::unlinkat(AT_FDCWD, name.path().as_str(), flags))
}

fn set(name: Name, value: u8, flags: i32) -> nix::Result<Got> {
    let path = c(&name.path())?;
    let value = [value];
    // SAFETY: the strings are NUL-terminated, the value is readable for its length.
    let ret = unsafe {
        libc::lsetxattr(
            path.as_ptr(),
            ATTRIBUTE.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    };
    done(Errno::result(ret).map(drop))
}

fn written(count: usize) -> nix::Result<Got> {
    Ok(match count {
        1 => Got::Done,
        count => Got::Odd(format!("{count} bytes were written")),
    })
}

fn read(file: &OwnedFd) -> nix::Result<Got> {
    let mut buf = vec![0; WHOLE];
    let count = pread(file, &mut buf, 0)?;
    buf.truncate(count);
    Ok(Got::Bytes(buf))
}

fn node(st: &FileStat) -> Got {
    match kind(st.st_mode & libc::S_IFMT) {
        Some(kind) => Got::Node(kind, st.st_ino),
        None => Got::Odd(format!("mode {:o}", st.st_mode)),
    }
}

fn kind(format: u32) -> Option<Kind> {
    match format {
        libc::S_IFREG => Some(Kind::File),
        libc::S_IFDIR => Some(Kind::Dir),
        libc::S_IFLNK => Some(Kind::Symlink),
        _ => None,
    }
}

fn list(dir: u8) -> nix::Result<Got> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    let stream = opened(DIRS[usize::from(dir)], flags)?;
    let mut found = Vec::new();
    for (entry, format, _) in shown::entries(&stream, ENTRIES)? {
        if entry == "." || entry == ".." {
            continue;
        }
        // The types of getdents64(2) are those of stat(2), shifted.
        match (Name::find(dir, &entry), kind(u32::from(format) << 12)) {
            (Some(name), Some(kind)) => found.push((name, kind)),
            _ => return Ok(Got::Odd(format!("entry {entry:?} of type {format}"))),
        }
    }
    found.sort_unstable();
    Ok(Got::Entries(found))
}
