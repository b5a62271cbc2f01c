// SPDX-License-Identifier: GPL-2.0
//! The pieces of which workloads are made. Each looks at what it did, so that a wrong outcome shows in its results.
//!
//! Every process starts with files `f0` to `f3` (5000 bytes each more than the last), `h0` and `h1` (one file), `a0`
//! (attribute `user.k0`), a symbolic link `l0`, directories `d0` (with `x0`), `e0`, `e1`, `e2` (empty).

use super::generate::Draw;
use super::op::Op;

const FILES: [&str; 4] = ["f0", "f1", "f2", "f3"];
const RDWR_NEW: i32 = libc::O_CREAT | libc::O_RDWR;

pub fn create(d: &mut Draw) {
    let fresh = d.fresh("c");
    let name = d.place(fresh);
    // What is made a second time shows with O_EXCL only.
    let extra = d.one_of(&[
        0,
        libc::O_EXCL,
        libc::O_TRUNC,
        libc::O_APPEND,
        libc::O_EXCL | libc::O_SYNC,
        libc::O_EXCL | libc::O_APPEND,
    ]);
    let mode = d.one_of(&[0o644, 0o600, 0o4711, 0o444]);
    let seed = d.bytes();
    d.op(Op::Open(0, name.clone(), RDWR_NEW | extra, mode));
    d.op(Op::Append(0, 700, seed));
    d.op(Op::Fstat(0));
    if d.chance(2) {
        d.op(Op::Close(0));
    }
    d.op(Op::Open(1, name.clone(), RDWR_NEW | libc::O_EXCL, mode));
    d.op(Op::Stat(name));
}

pub fn mkdir(d: &mut Draw) {
    let fresh = d.fresh("m");
    let name = d.place(fresh);
    let mode = d.one_of(&[0o755, 0o700, 0o1777, 0o2770]);
    d.op(Op::Mkdir(name.clone(), mode));
    d.op(Op::Mkdir(name.clone(), mode));
    d.op(Op::Mkdir(format!("{name}/below"), mode));
    d.op(Op::Stat(name));
}

pub fn mknod(d: &mut Draw) {
    let fresh = d.fresh("n");
    let name = d.place(fresh);
    let (kind, dev) = d.one_of(&[
        (libc::S_IFIFO, 0),
        (libc::S_IFREG, 0),
        (libc::S_IFSOCK, 0),
        (libc::S_IFCHR, libc::makedev(1, 3)),
        (libc::S_IFIFO, 0),
    ]);
    d.op(Op::Mknod(name.clone(), kind | 0o640, dev));
    d.op(Op::Mknod(name.clone(), libc::S_IFIFO | 0o640, 0));
    d.op(Op::Stat(name));
}

pub fn symlink(d: &mut Draw) {
    let fresh = d.fresh("s");
    let name = d.place(fresh);
    let target = d.one_of(&["f0".to_owned(), "nowhere".into(), "y".repeat(300)]);
    d.op(Op::Symlink(target.clone(), name.clone()));
    d.op(Op::Symlink(target, name.clone()));
    d.op(Op::Readlink(name.clone()));
    d.op(Op::Stat(name));
}

pub fn link(d: &mut Draw) {
    let fresh = d.fresh("k");
    let name = d.place(fresh);
    let file = d.one_of(&["f0", "h0", "l0", "a0", "f2"]).to_owned();
    d.op(Op::Link(file.clone(), name.clone()));
    d.op(Op::Link(file.clone(), name.clone()));
    d.op(Op::Stat(file));
    d.op(Op::Stat(name));
}

pub fn unlink(d: &mut Draw) {
    let fresh = d.fresh("u");
    let name = d.place(fresh);
    match d.rng.below(5) {
        0 => d.op(Op::Link("f0".into(), name.clone())),
        1 => d.op(Op::Symlink("f0".into(), name.clone())),
        2 => d.op(Op::Mknod(name.clone(), libc::S_IFIFO | 0o600, 0)),
        _ => {
            let seed = d.bytes();
            d.op(Op::Open(0, name.clone(), RDWR_NEW, 0o644));
            d.op(Op::Write(0, 0, 50, seed));
            d.op(Op::Close(0));
        }
    }
    d.op(Op::Unlink(name.clone()));
    d.op(Op::Unlink(name.clone()));
    d.op(Op::Stat(name));
    d.op(Op::Stat("f0".into()));
}

/// A file that is open, or only held, when it loses its last name.
pub fn unlink_held(d: &mut Draw) {
    let name = d.fresh("v");
    let seed = d.bytes();
    d.op(Op::Open(0, name.clone(), RDWR_NEW, 0o644));
    d.op(Op::Write(0, 0, 3000, seed));
    if d.chance(3) {
        d.op(Op::Open(0, name.clone(), libc::O_PATH, 0));
        d.op(Op::Unlink(name));
    } else {
        d.op(Op::Unlink(name));
        let seed = d.bytes();
        d.op(Op::Write(0, 2900, 500, seed));
        d.op(Op::Read(0, 0, 4000));
    }
    d.op(Op::Fstat(0));
    if d.chance(2) {
        d.op(Op::Close(0));
    }
}

pub fn rmdir(d: &mut Draw) {
    let name = d.one_of(&["e0", "e1"]).to_owned();
    d.op(Op::Rmdir("d0".into()));
    d.op(Op::Rmdir(name.clone()));
    d.op(Op::Rmdir(name.clone()));
    d.op(Op::Mkdir(name.clone(), 0o755));
    d.op(Op::Stat(name));
}

pub fn rmdir_held(d: &mut Draw) {
    let name = d.fresh("r");
    d.op(Op::Mkdir(name.clone(), 0o755));
    match d.rng.below(3) {
        0 => {
            d.op(Op::HoldCwd(0, name.clone()));
            d.op(Op::Rmdir(name));
            d.op(Op::AskCwd(0));
            if d.chance(2) {
                d.op(Op::LetCwd(0));
            }
        }
        1 => {
            d.op(Op::OpenDir(1, name.clone()));
            d.op(Op::Rmdir(name));
            d.op(Op::ReadRest(1));
            d.op(Op::CloseDir(1));
        }
        _ => {
            d.op(Op::Open(2, name.clone(), libc::O_PATH, 0));
            d.op(Op::Rmdir(name));
            d.op(Op::Fstat(2));
        }
    }
}

pub fn rename(d: &mut Draw) {
    let fresh = d.fresh("w");
    let to = d.place(fresh);
    let from = d.one_of(&["f0", "d0/x0", "l0", "e1", "f3"]).to_owned();
    d.op(Op::Rename(from.clone(), to.clone(), 0));
    d.op(Op::Rename(from.clone(), to.clone(), 0));
    d.op(Op::Stat(to.clone()));
    d.op(Op::Stat(from.clone()));
    // Back again, so that others find it.
    d.op(Op::Rename(to, from, 0));
}

pub fn rename_over_file(d: &mut Draw) {
    let (from, to) = (d.fresh("o"), d.fresh("p"));
    let (one, two) = (d.bytes(), d.bytes());
    d.op(Op::Open(1, to.clone(), RDWR_NEW, 0o644));
    d.op(Op::Write(1, 0, 900, one));
    let known = d.rng.below(4);
    match known {
        0 => d.op(Op::Close(1)),
        1 => d.op(Op::Link(to.clone(), format!("{to}.second"))),
        2 => d.op(Op::Open(1, to.clone(), libc::O_PATH, 0)),
        _ => {}
    }
    d.op(Op::Open(2, from.clone(), RDWR_NEW, 0o600));
    d.op(Op::Write(2, 0, 1100, two));
    d.op(Op::Rename(from.clone(), to.clone(), 0));
    d.op(Op::Fstat(1));
    d.op(Op::Read(1, 0, 2000));
    d.op(Op::Fstat(2));
    d.op(Op::Stat(to.clone()));
    d.op(Op::Rename(from, to, 0));
    // Two names of one file: nothing happens.
    d.op(Op::Rename("h0".into(), "h1".into(), 0));
}

pub fn rename_over_dir(d: &mut Draw) {
    let (from, to) = (d.fresh("q"), d.fresh("z"));
    d.op(Op::Mkdir(from.clone(), 0o750));
    d.op(Op::Mkdir(format!("{from}/in"), 0o755));
    d.op(Op::Mkdir(to.clone(), 0o711));
    let held = d.rng.below(3);
    match held {
        0 => d.op(Op::HoldCwd(1, to.clone())),
        1 => d.op(Op::Open(
            3,
            to.clone(),
            libc::O_RDONLY | libc::O_DIRECTORY,
            0,
        )),
        _ => {}
    }
    d.op(Op::Rename(to.clone(), "d0".into(), 0)); // not empty
    d.op(Op::Rename(from.clone(), to.clone(), 0));
    d.op(Op::AskCwd(1));
    d.op(Op::Fstat(3));
    d.op(Op::Stat(to));
    d.op(Op::Stat(from));
}

pub fn rename_noreplace(d: &mut Draw) {
    let fresh = d.fresh("g");
    let to = d.place(fresh);
    let from = d.one_of(&["f1", "a0", "e0"]).to_owned();
    let flag = libc::RENAME_NOREPLACE;
    d.op(Op::Rename(from.clone(), "h0".into(), flag));
    d.op(Op::Rename(from.clone(), to.clone(), flag));
    d.op(Op::Stat(to.clone()));
    d.op(Op::Rename(to, from.clone(), flag));
    d.op(Op::Stat(from));
}

pub fn rename_exchange(d: &mut Draw) {
    let (one, two) = d.one_of(&[
        ("f0", "f1"),
        ("f2", "d0"),
        ("e0", "d0"),
        ("l0", "f3"),
        ("h0", "h1"),
        ("d0/x0", "f1"),
    ]);
    let flag = libc::RENAME_EXCHANGE;
    d.op(Op::Open(4, one.into(), libc::O_PATH, 0));
    d.op(Op::Rename(one.into(), two.into(), flag));
    d.op(Op::Stat(one.into()));
    d.op(Op::Stat(two.into()));
    d.op(Op::Fstat(4));
    d.op(Op::Rename("f0".into(), "nothing".into(), flag));
    if d.chance(2) {
        d.op(Op::Rename(two.into(), one.into(), flag));
    }
}

pub fn rename_whiteout(d: &mut Draw) {
    let (from, to) = (d.fresh("b"), d.fresh("i"));
    let flag = libc::RENAME_WHITEOUT;
    match d.rng.below(4) {
        0 => {
            d.op(Op::Mkdir(from.clone(), 0o755));
            d.op(Op::Mkdir(to.clone(), 0o700));
            if d.chance(2) {
                d.op(Op::HoldCwd(2, to.clone()));
            }
        }
        1 => {
            d.op(Op::Open(5, from.clone(), RDWR_NEW, 0o644));
            d.op(Op::Open(6, to.clone(), RDWR_NEW, 0o644));
        }
        2 => {
            d.op(Op::Open(5, from.clone(), RDWR_NEW, 0o644));
            d.op(Op::Open(6, to.clone(), RDWR_NEW, 0o600));
            d.op(Op::Close(6));
        }
        _ => d.op(Op::Mkdir(from.clone(), 0o755)),
    }
    d.op(Op::Rename(from.clone(), to.clone(), flag));
    d.op(Op::Stat(from));
    d.op(Op::Stat(to));
    d.op(Op::Fstat(5));
    d.op(Op::Fstat(6));
    d.op(Op::AskCwd(2));
}

pub fn attributes(d: &mut Draw) {
    let name = d.one_of(&["f0", "d0", "h0", "a0", "e2"]).to_owned();
    match d.rng.below(4) {
        0 => {
            let mode = d.one_of(&[0o600, 0o4755, 0o711]);
            d.op(Op::Chmod(name.clone(), mode));
        }
        1 => {
            d.op(Op::Chmod(name.clone(), 0o6755));
            d.op(Op::Chown(name.clone(), 1000, 1001));
        }
        2 => d.op(Op::UtimesNow(name.clone())),
        _ => {}
    }
    let at = super::shown::SET.start + d.rng.below(90_000_000) as i64;
    d.op(Op::Utimes(name.clone(), at));
    d.op(Op::Stat(name));
}

pub fn truncate(d: &mut Draw) {
    let name = d.one_of(&FILES).to_owned();
    let len = d.one_of(&[0, 1, 4096, 9000, 30_000]);
    match d.rng.below(3) {
        0 => d.op(Op::Truncate(name.clone(), len)),
        1 => {
            d.op(Op::Open(0, name.clone(), libc::O_RDWR, 0));
            d.op(Op::Ftruncate(0, len));
            d.op(Op::Read(0, 0, 40_000));
        }
        _ => {
            let seed = d.bytes();
            d.op(Op::Open(0, name.clone(), libc::O_RDWR | libc::O_TRUNC, 0));
            d.op(Op::Write(0, 0, 600, seed));
        }
    }
    d.op(Op::Stat(name));
}

pub fn set_xattr(d: &mut Draw) {
    let name = d.one_of(&["f0", "d0", "a0"]).to_owned();
    let key = d.one_of(&["user.k1", "user.k2"]);
    let (one, two) = (d.bytes(), d.bytes());
    let len = d.one_of(&[0, 5, 1000]);
    let flags = d.one_of(&[libc::XATTR_CREATE, libc::XATTR_CREATE, 0]);
    d.op(Op::SetXattr(name.clone(), key, len, one, flags));
    d.op(Op::SetXattr(name.clone(), key, 7, two, libc::XATTR_CREATE));
    d.op(Op::GetXattr(name.clone(), key));
    d.op(Op::SetXattr(name.clone(), key, 9, two, libc::XATTR_REPLACE));
    d.op(Op::SetXattr(
        name.clone(),
        "user.none",
        9,
        two,
        libc::XATTR_REPLACE,
    ));
    d.op(Op::ListXattr(name));
}

pub fn remove_xattr(d: &mut Draw) {
    let name = d.one_of(&["a0", "e2"]).to_owned();
    let seed = d.bytes();
    d.op(Op::SetXattr(name.clone(), "user.k0", 12, seed, 0));
    d.op(Op::RemoveXattr(name.clone(), "user.k0"));
    d.op(Op::RemoveXattr(name.clone(), "user.k0"));
    d.op(Op::ListXattr(name));
}

pub fn get_xattr(d: &mut Draw) {
    d.op(Op::GetXattr("a0".into(), "user.k0"));
    d.op(Op::GetXattr("a0".into(), "user.none"));
    d.op(Op::ListXattr("a0".into()));
    d.op(Op::ListXattr("f0".into()));
}

pub fn write(d: &mut Draw) {
    let name = d.one_of(&FILES).to_owned();
    let extra = d.one_of(&[0, 0, libc::O_SYNC, libc::O_DSYNC]);
    d.op(Op::Open(0, name.clone(), libc::O_RDWR | extra, 0));
    for _ in 0..2 {
        let (at, len, seed) = (d.rng.below(20_000) as u64, 1 + d.rng.below(9000), d.bytes());
        d.op(Op::Write(0, at, len, seed));
    }
    d.op(Op::Read(0, 0, 40_000));
    d.op(Op::Close(0));
    d.op(Op::Stat(name));
}

pub fn append(d: &mut Draw) {
    let name = d.one_of(&FILES).to_owned();
    d.op(Op::Open(1, name.clone(), libc::O_RDWR | libc::O_APPEND, 0));
    for _ in 0..3 {
        let (len, seed) = (1 + d.rng.below(3000), d.bytes());
        d.op(Op::Append(1, len, seed));
    }
    d.op(Op::Fstat(1));
    d.op(Op::Read(1, 0, 60_000));
}

pub fn fallocate(d: &mut Draw) {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
    let name = d.one_of(&FILES).to_owned();
    let mode = d.one_of(&[
        0,
        0,
        KEEP,
        PUNCH,
        PUNCH,
        libc::FALLOC_FL_ZERO_RANGE,
        libc::FALLOC_FL_COLLAPSE_RANGE,
    ]);
    let (at, len) = (
        d.rng.below(8) as u64 * 1024,
        4096 + d.rng.below(20_000) as u64,
    );
    d.op(Op::Open(2, name.clone(), libc::O_RDWR, 0));
    d.op(Op::Fallocate(2, mode, at, len));
    d.op(Op::Read(2, 0, 60_000));
    d.op(Op::Fallocate(2, 0, 0, 100));
    d.op(Op::Stat(name));
}

pub fn copy(d: &mut Draw) {
    let (from, to) = d.one_of(&[("f0", "f1"), ("f3", "f2"), ("f2", "f0")]);
    let (at, to_at, len) = (d.rng.below(3000), d.rng.below(9000), 1 + d.rng.below(9000));
    let seed = d.bytes();
    d.op(Op::Open(0, from.into(), libc::O_RDWR, 0));
    d.op(Op::Open(1, to.into(), libc::O_RDWR, 0));
    d.op(Op::Copy(0, at as u64, 1, to_at as u64, len));
    // A copy that is made once more now would copy this.
    d.op(Op::Write(0, at as u64, len, seed));
    d.op(Op::Read(1, 0, 40_000));
    d.op(Op::Copy(1, 0, 1, 20_000, 800));
    d.op(Op::Fstat(1));
}

pub fn open(d: &mut Draw) {
    let name = d.one_of(&FILES).to_owned();
    let flags = d.one_of(&[libc::O_RDONLY, libc::O_RDWR, libc::O_RDWR | libc::O_CREAT]);
    let seed = d.bytes();
    d.op(Op::Open(0, name.clone(), flags, 0o644));
    d.op(Op::Read(0, 100, 300));
    d.op(Op::Open(1, name, libc::O_WRONLY, 0));
    d.op(Op::Write(1, 100, 300, seed));
    d.op(Op::Close(1));
    d.op(Op::Read(0, 0, 9000));
    d.op(Op::Close(0));
    d.op(Op::Close(0));
}

pub fn read(d: &mut Draw) {
    let name = d.one_of(&FILES).to_owned();
    d.op(Op::Open(0, name.clone(), libc::O_RDONLY, 0));
    d.op(Op::Read(0, 0, 100_000));
    d.op(Op::Read(0, 4000, 500));
    d.op(Op::Open(1, name, libc::O_RDWR, 0));
    d.op(Op::MapRead(1, 20_000));
}

/// A shared mapping: pages that are written come as WRITEs of nobody's.
pub fn map(d: &mut Draw) {
    let name = d.one_of(&["f2", "f3"]).to_owned();
    let (at, seed) = (d.rng.below(6000), d.bytes());
    d.op(Op::Open(3, name, libc::O_RDWR, 0));
    d.op(Op::MapWrite(3, at, 2000, seed));
    d.op(Op::MapRead(3, 12_000));
    d.op(Op::Read(3, 0, 30_000));
}

pub fn fsync(d: &mut Draw) {
    let name = d.one_of(&FILES).to_owned();
    let seed = d.bytes();
    d.op(Op::Open(0, name, libc::O_RDWR, 0));
    d.op(Op::Write(0, 10, 5000, seed));
    let data = d.chance(2);
    d.op(Op::Fsync(0, data));
    d.op(Op::Fsync(0, false));
}

pub fn fsync_dir(d: &mut Draw) {
    let name = d.fresh("y");
    d.op(Op::Open(
        1,
        "d0".into(),
        libc::O_RDONLY | libc::O_DIRECTORY,
        0,
    ));
    d.op(Op::Mkdir(format!("d0/{name}"), 0o755));
    d.op(Op::Fsync(1, false));
}

/// A directory that changes while it is read: `s*` are there all the time and come once.
pub fn stream(d: &mut Draw) {
    let name = d.fresh("many/t");
    let slot = d.one_of(&[0, 1]);
    d.op(Op::OpenDir(slot, "many".into()));
    d.op(Op::ReadSome(slot));
    d.op(Op::Mkdir(name.clone(), 0o755));
    d.op(Op::ReadSome(slot));
    match d.rng.below(3) {
        0 => d.op(Op::Rmdir(name)),
        1 => d.op(Op::Rename(name.clone(), format!("{name}.new"), 0)),
        _ => {}
    }
    d.op(Op::ReadRest(slot));
    d.op(Op::CloseDir(slot));
}

pub fn lookup(d: &mut Draw) {
    let name = d.fresh("none");
    d.op(Op::Stat(name.clone()));
    d.op(Op::Stat("d0/x0".into()));
    d.op(Op::Stat("f1".into()));
    d.op(Op::Stat("f1/below".into()));
    d.op(Op::Mkdir(name.clone(), 0o755));
    d.op(Op::Stat(format!("{name}/..")));
}

pub fn getattr(d: &mut Draw) {
    let name = d.one_of(&["f0", "d0", "l0", "h1"]).to_owned();
    d.op(Op::StatSync(name));
    d.op(Op::StatSync(".".into()));
}

pub fn readlink(d: &mut Draw) {
    d.op(Op::Readlink("l0".into()));
    d.op(Op::Readlink("f0".into()));
}

/// Of a file of its own: what FALLOCATE has made is a hole on tmpfs, and data when it was made twice.
pub fn seek(d: &mut Draw) {
    let fresh = d.fresh("sk");
    let name = d.place(fresh);
    let seed = d.bytes();
    d.op(Op::Open(0, name.clone(), RDWR_NEW, 0o644));
    d.op(Op::Write(0, 10_000, 5000, seed));
    d.op(Op::Ftruncate(0, 60_000));
    d.op(Op::Close(0));
    d.op(Op::Open(0, name, libc::O_RDWR, 0));
    for whence in [libc::SEEK_HOLE, libc::SEEK_DATA, libc::SEEK_END] {
        let at = d.rng.below(30_000) as i64;
        d.op(Op::Seek(0, at, whence));
    }
}

pub fn statfs(d: &mut Draw) {
    d.op(Op::Statfs);
    d.op(Op::Stat(".".into()));
}
