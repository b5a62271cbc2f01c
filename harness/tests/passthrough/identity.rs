// SPDX-License-Identifier: GPL-2.0
//! Who owns what is made, which file is which, and what is nobody's business.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{chown, FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{kill, Signal};

use crate::served::{run, wait_for, Kind, Scratch, Served, BINARY, KINDS};
use crate::snapshot;

const HIDDEN: &str = ".fuse-restart-graveyard";

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Runs `f` in a thread with these ids, no other groups, and this umask.
fn as_user<T: Send>(uid: u32, gid: u32, umask: u32, f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                // SAFETY: the raw calls change this thread only, which ends afterwards.
                unsafe {
                    assert_eq!(libc::unshare(libc::CLONE_FS), 0);
                    libc::umask(umask);
                    assert_eq!(libc::syscall(libc::SYS_setgroups, 0, 0), 0);
                    assert_eq!(libc::syscall(libc::SYS_setresgid, gid, gid, gid), 0);
                    assert_eq!(libc::syscall(libc::SYS_setresuid, uid, uid, uid), 0);
                }
                f()
            })
            .join()
            .unwrap()
    })
}

fn make_everything(base: &Path) {
    fs::write(base.join("file"), b"").unwrap();
    fs::create_dir(base.join("dir")).unwrap();
    std::os::unix::fs::symlink("x", base.join("link")).unwrap();
    nix::unistd::mkfifo(
        &base.join("fifo"),
        nix::sys::stat::Mode::from_bits_retain(0o666),
    )
    .unwrap();
}

#[test]
fn what_a_user_makes_is_the_users() {
    for kind in KINDS {
        let Some(served) = Served::start(kind, &["--timeout", "0"]) else {
            continue;
        };
        let (via, direct) = (served.mnt().join("via"), served.back().join("direct"));
        for base in [&via, &direct] {
            // Of a directory that is the user's, one that lets all in, and one that hands its group on.
            for (name, m) in [("own", 0o700), ("open", 0o777), ("setgid", 0o2777)] {
                let dir = base.join(name);
                fs::create_dir_all(&dir).unwrap();
                mode(&dir, m);
                let owner = if name == "own" { 1234 } else { 0 };
                chown(&dir, Some(owner), Some(99)).unwrap();
                as_user(1234, 5678, 0o027, || make_everything(&dir));
            }
        }
        assert_eq!(snapshot::of(&via), snapshot::of(&direct), "{kind:?}");
        let own = fs::metadata(via.join("own/file")).unwrap();
        assert_eq!(
            (own.uid(), own.gid(), own.mode() & 0o777),
            (1234, 5678, 0o640)
        );
    }
}

#[test]
fn a_default_acl_overrules_the_umask() {
    let Some(served) = Served::start(Kind::Ext4, &["--timeout", "0"]) else {
        return;
    };
    // user::rwx, user:1234:rwx, group::r-x, mask::rwx, other::---, as the xattr has it.
    let acl: Vec<u8> = [2u32.to_le_bytes().to_vec()]
        .into_iter()
        .chain(
            [
                (1u16, 7u16, u32::MAX),
                (2, 7, 1234),
                (4, 5, u32::MAX),
                (16, 7, u32::MAX),
                (32, 0, u32::MAX),
            ]
            .map(|(tag, perm, id)| {
                [
                    &tag.to_le_bytes()[..],
                    &perm.to_le_bytes(),
                    &id.to_le_bytes(),
                ]
                .concat()
            }),
        )
        .flatten()
        .collect();
    let (via, direct) = (served.mnt().join("via"), served.back().join("direct"));
    for base in [&via, &direct] {
        fs::create_dir(base).unwrap();
        let path = std::ffi::CString::new(base.to_str().unwrap()).unwrap();
        let name = c"system.posix_acl_default";
        // SAFETY: strings are NUL-terminated, the value is readable for its length.
        let set = unsafe {
            libc::setxattr(
                path.as_ptr(),
                name.as_ptr(),
                acl.as_ptr().cast(),
                acl.len(),
                0,
            )
        };
        assert_eq!(set, 0, "{}: {}", base.display(), io::Error::last_os_error());
        as_user(0, 0, 0o077, || make_everything(base));
    }
    let seen = snapshot::of(&via);
    assert_eq!(seen, snapshot::of(&direct));
    assert!(
        seen.contains("system.posix_acl_access"),
        "no ACL was inherited:\n{seen}"
    );
}

#[test]
fn permissions_are_checked() {
    let Some(served) = Served::start(Kind::Tmpfs, &["--timeout", "0"]) else {
        return;
    };
    let mnt = served.mnt();
    mode(&mnt, 0o755);
    fs::write(mnt.join("secret"), b"x").unwrap();
    mode(&mnt.join("secret"), 0o600);
    let denied =
        |r: io::Result<()>| assert_eq!(r.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    as_user(1234, 1234, 0, || {
        denied(fs::read(mnt.join("secret")).map(drop));
        denied(fs::write(mnt.join("new"), b""));
        denied(fs::remove_file(mnt.join("secret")));
        denied(fs::rename(mnt.join("secret"), mnt.join("other")));
        denied(fs::create_dir(mnt.join("dir")));
    });
    assert_eq!(fs::read(mnt.join("secret")).unwrap(), b"x");
}

#[test]
fn a_write_by_a_user_clears_the_set_id_bits() {
    for options in [&["--timeout", "0"][..], &["--writeback"]] {
        let Some(served) = Served::start(Kind::Tmpfs, options) else {
            return;
        };
        let path = served.mnt().join("file");
        fs::write(&path, b"x").unwrap();
        mode(&path, 0o6777);
        as_user(1234, 1234, 0, || {
            let mut file = OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all(b"y").unwrap();
        });
        assert_eq!(
            fs::metadata(&path).unwrap().mode() & 0o7777,
            0o777,
            "{options:?}"
        );
        assert_eq!(
            fs::metadata(served.back().join("file")).unwrap().mode() & 0o7777,
            0o777
        );
    }
}

#[test]
fn inode_numbers_are_those_of_the_backing_and_stay() {
    let Some(served) = Served::start(Kind::Ext4, &["--timeout", "0"]) else {
        return;
    };
    let (mnt, back) = (served.mnt(), served.back());
    for i in 0..50 {
        fs::write(mnt.join(format!("f{i}")), b"").unwrap();
    }
    let check = |when: &str| {
        for entry in fs::read_dir(&mnt).unwrap() {
            use std::os::unix::fs::DirEntryExt;
            let entry = entry.unwrap();
            let there = fs::symlink_metadata(back.join(entry.file_name()))
                .unwrap()
                .ino();
            assert_eq!(entry.metadata().unwrap().ino(), there, "{when}: stat");
            assert_eq!(entry.ino(), there, "{when}: readdir");
        }
    };
    check("at first");
    served.crash_and_wait();
    check("after a crash");
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
    check("after the kernel forgot them");
}

#[test]
fn a_successor_under_the_same_name_is_another_file() {
    for kind in KINDS {
        let Some(served) = Served::start(kind, &["--timeout", "0"]) else {
            continue;
        };
        fs::write(served.mnt().join("file"), b"old").unwrap();
        let old = File::open(served.mnt().join("file")).unwrap();
        // Behind the server's back; ext4 gives the same inode number again.
        fs::remove_file(served.back().join("file")).unwrap();
        fs::write(served.back().join("file"), b"new content").unwrap();
        assert_eq!(
            fs::read(served.mnt().join("file")).unwrap(),
            b"new content",
            "{kind:?}"
        );
        served.crash_and_wait();
        assert_eq!(
            fs::read(served.mnt().join("file")).unwrap(),
            b"new content",
            "{kind:?}"
        );
        let mut buf = [0; 16];
        let read = old.read_at(&mut buf, 0);
        assert!(
            read.is_err(),
            "{kind:?}: the old descriptor reads {:?}",
            &buf[..read.unwrap()]
        );
    }
}

#[test]
fn the_graveyard_is_hidden_and_emptied() {
    for kind in KINDS {
        let Some(served) = Served::start(kind, &["--timeout", "0"]) else {
            continue;
        };
        let (mnt, yard) = (served.mnt(), served.back().join(HIDDEN));
        let graves = || fs::read_dir(&yard).unwrap().count();
        let links = || fs::metadata(&mnt).unwrap().nlink();
        assert_eq!(
            links(),
            2 + u64::from(kind == Kind::Ext4),
            "lost+found at most"
        );

        fs::write(mnt.join("file"), b"content").unwrap();
        fs::create_dir(mnt.join("dir")).unwrap();
        let (file, dir) = (
            File::open(mnt.join("file")).unwrap(),
            File::open(mnt.join("dir")).unwrap(),
        );
        fs::remove_file(mnt.join("file")).unwrap();
        fs::remove_dir(mnt.join("dir")).unwrap();
        assert_eq!(graves(), 2, "{kind:?}: in use");
        assert_eq!(links(), 2 + u64::from(kind == Kind::Ext4));

        let names: Vec<_> = fs::read_dir(&mnt)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert!(!names.iter().any(|n| n == HIDDEN), "{names:?}");
        let errno = |r: io::Result<()>| r.unwrap_err().raw_os_error().unwrap();
        let hidden = mnt.join(HIDDEN);
        assert_eq!(errno(fs::metadata(&hidden).map(drop)), libc::ENOENT);
        assert_eq!(errno(fs::read_dir(&hidden).map(drop)), libc::ENOENT);
        assert_eq!(errno(fs::remove_dir(&hidden)), libc::ENOENT);
        assert_eq!(errno(fs::write(&hidden, b"")), libc::EPERM);
        assert_eq!(errno(fs::create_dir(&hidden)), libc::EPERM);
        assert_eq!(errno(std::os::unix::fs::symlink("x", &hidden)), libc::EPERM);
        fs::write(mnt.join("other"), b"").unwrap();
        assert_eq!(errno(fs::rename(mnt.join("other"), &hidden)), libc::EPERM);
        assert_eq!(
            errno(fs::hard_link(mnt.join("other"), &hidden)),
            libc::EPERM
        );
        // Only in the root: elsewhere it is a name like any other.
        fs::create_dir(mnt.join("sub")).unwrap();
        fs::write(mnt.join("sub").join(HIDDEN), b"mine").unwrap();
        assert_eq!(fs::read(mnt.join("sub").join(HIDDEN)).unwrap(), b"mine");

        drop((file, dir));
        wait_for("the graves to be emptied", || (graves() == 0).then_some(()));
    }
}

#[test]
fn graves_of_an_earlier_mount_are_removed() {
    if Served::start(Kind::Tmpfs, &[]).is_none() {
        return;
    }
    let scratch = Scratch::new(Kind::Tmpfs);
    let yard = scratch.path().join(HIDDEN);
    fs::create_dir_all(yard.join("n0000000000000009")).unwrap();
    fs::write(yard.join("n0000000000000007"), b"left").unwrap();
    fs::write(yard.join("foreign"), b"not ours").unwrap();
    let served = Served::on(scratch, &[]);
    let left: Vec<_> = fs::read_dir(&yard)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["foreign"]);
    drop(served);
}

/// While a mount has no server its lock is gone, too, and somebody serves the same directory at another place.
#[test]
fn graves_of_a_mount_without_a_server_are_left_alone() {
    let Some(served) = Served::start(Kind::Tmpfs, &[]) else {
        return;
    };
    fs::write(served.mnt().join("file"), b"content").unwrap();
    if served.stderr().contains("no FUSE_NOTIFY_RESTARTED") {
        eprintln!("SKIPPED: this kernel does not tell whether a connection lives");
        return;
    }
    // Started before anything is open here: a child has that until it execs, and closing it would wait for a server.
    let dir = tempfile::tempdir().unwrap();
    let (go, other) = (dir.path().join("go"), dir.path().join("mnt"));
    fs::create_dir(&other).unwrap();
    let second = format!(
        "until test -e {}; do sleep 0.05; done
         exec timeout 60 {BINARY} keep --max-restarts 0 --mountpoint {} -- {BINARY} serve passthrough {}",
        go.display(),
        other.display(),
        served.back().display()
    );
    let second = Command::new("sh")
        .args(["-c", &second])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut open = File::open(served.mnt().join("file")).unwrap();
    fs::remove_file(served.mnt().join("file")).unwrap();
    kill(served.keeper_pid(), Signal::SIGUSR1).unwrap();
    kill(served.server_pid(), Signal::SIGKILL).unwrap();
    wait_for("the mount to have no server", || {
        (!served.events("waiting").is_empty()).then_some(())
    });
    fs::write(&go, b"").unwrap();
    let second = second.wait_with_output().unwrap();
    kill(served.keeper_pid(), Signal::SIGUSR2).unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success(), "{said}");
    assert!(said.contains("belongs to another mount"), "{said}");
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    assert_eq!(text, "content");
    drop(open);
    // A mount that is gone leaves what anybody may clear away.
    let scratch = served.unmount();
    let next = Served::on(scratch, &[]);
    fs::write(next.mnt().join("file"), b"again").unwrap();
}

#[test]
fn a_mount_point_in_the_backing_is_not_entered() {
    let Some(served) = Served::start(Kind::Tmpfs, &["--timeout", "0"]) else {
        return;
    };
    let at = served.back().join("mounted");
    fs::create_dir(&at).unwrap();
    run(
        "mount",
        &[
            "-t".as_ref(),
            "tmpfs".as_ref(),
            "none".as_ref(),
            at.as_ref(),
        ],
    );
    fs::write(at.join("inside"), b"").unwrap();
    let seen = fs::metadata(served.mnt().join("mounted")).map(drop);
    let names: Vec<_> = fs::read_dir(served.mnt())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    run("umount", &[at.as_ref()]);
    assert_eq!(seen.unwrap_err().raw_os_error(), Some(libc::EXDEV));
    assert_eq!(names, ["mounted"]);
    assert!(
        fs::metadata(served.mnt().join("mounted")).unwrap().is_dir(),
        "and it is back"
    );
}

#[test]
fn more_files_than_descriptors() {
    let Some(served) = Served::start_limited(Kind::Tmpfs, &["--timeout", "0"], 64) else {
        return;
    };
    let mnt = served.mnt();
    for i in 0..2000 {
        fs::create_dir(mnt.join(format!("d{i}"))).unwrap();
        fs::write(mnt.join(format!("d{i}/f")), format!("content {i}")).unwrap();
    }
    let mut open: Vec<File> = (0..300)
        .map(|i| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(mnt.join(format!("d{i}/f")))
                .unwrap()
        })
        .collect();
    for (i, file) in open.iter().enumerate() {
        file.write_at(b"CON", 0)
            .unwrap_or_else(|e| panic!("file {i}: {e}"));
    }
    served.crash_and_wait();
    for (i, file) in open.iter_mut().enumerate() {
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("CONtent {i}"));
    }
    for i in 0..2000 {
        assert_eq!(fs::metadata(mnt.join(format!("d{i}"))).unwrap().nlink(), 2);
    }
}
