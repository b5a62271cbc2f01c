// SPDX-License-Identifier: GPL-2.0
//! Operations on attributes and extended attributes, and what is left.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{self as unix, PermissionsExt};

use crate::calls::{removexattr, ret, rw, say, setxattr, times, utimens};
use crate::ops::Op;
use crate::snapshot;

pub const ATTRIBUTES: &[Op] = &[
    ("chmod", |b| {
        say(fs::set_permissions(
            b.join("file"),
            fs::Permissions::from_mode(0o6751),
        ))
    }),
    ("chmod of a directory", |b| {
        say(fs::set_permissions(
            b.join("full"),
            fs::Permissions::from_mode(0o3770),
        ))
    }),
    ("chown", |b| {
        say(unix::chown(b.join("file"), Some(12), Some(34)))
    }),
    ("chown of a link", |b| {
        say(unix::lchown(b.join("link"), Some(12), None))
    }),
    ("chown clears set-id bits", |b| {
        fs::set_permissions(b.join("file"), fs::Permissions::from_mode(0o6755)).unwrap();
        say(unix::chown(b.join("file"), Some(12), Some(34)))
    }),
    ("a write keeps root's set-id bits", |b| {
        fs::set_permissions(b.join("file"), fs::Permissions::from_mode(0o6755)).unwrap();
        say(rw(&b.join("file")).write_all(b"x"))
    }),
    ("set times", |b| {
        let set = say(utimens(
            &b.join("file"),
            (1_000_000_007, 123_456_789),
            (5, 6),
        ));
        set + &times(&b.join("file"))
    }),
    ("set times before 1970", |b| {
        let set = say(utimens(&b.join("file"), (-5, 999_999_999), (-1000, 0)));
        set + &times(&b.join("file"))
    }),
    ("set one time only", |b| {
        utimens(&b.join("file"), (11, 0), (22, 0)).unwrap();
        let set = say(utimens(&b.join("file"), (0, libc::UTIME_OMIT), (33, 0)));
        set + &times(&b.join("file"))
    }),
    ("set times of a link", |b| {
        let set = say(utimens(&b.join("link"), (77, 0), (88, 0)));
        set + &times(&b.join("link"))
    }),
    ("xattr", |b| {
        say(setxattr(&b.join("file"), "trusted.a", b"value", 0))
    }),
    ("xattr of a directory", |b| {
        say(setxattr(&b.join("full"), "trusted.a", b"", 0))
    }),
    ("xattr CREATE", |b| {
        say(setxattr(
            &b.join("file"),
            "trusted.a",
            b"1",
            libc::XATTR_CREATE,
        ))
    }),
    ("xattr CREATE over one", |b| {
        setxattr(&b.join("file"), "trusted.a", b"1", 0).unwrap();
        say(setxattr(
            &b.join("file"),
            "trusted.a",
            b"2",
            libc::XATTR_CREATE,
        ))
    }),
    ("xattr REPLACE", |b| {
        setxattr(&b.join("file"), "trusted.a", b"1", 0).unwrap();
        say(setxattr(
            &b.join("file"),
            "trusted.a",
            b"2",
            libc::XATTR_REPLACE,
        ))
    }),
    ("xattr REPLACE of none", |b| {
        say(setxattr(
            &b.join("file"),
            "trusted.a",
            b"2",
            libc::XATTR_REPLACE,
        ))
    }),
    ("xattr of an unknown class", |b| {
        say(setxattr(&b.join("file"), "nonsense", b"", 0))
    }),
    ("xattr removed", |b| {
        setxattr(&b.join("file"), "trusted.a", b"1", 0).unwrap();
        setxattr(&b.join("file"), "trusted.b", b"2", 0).unwrap();
        say(removexattr(&b.join("file"), "trusted.a"))
    }),
    ("xattr removed that is not there", |b| {
        say(removexattr(&b.join("file"), "trusted.a"))
    }),
    ("ACL removed that is not there", |b| {
        let default = "system.posix_acl_default";
        format!(
            "{} {} {}",
            say(removexattr(&b.join("file"), "system.posix_acl_access")),
            say(removexattr(&b.join("full"), "system.posix_acl_access")),
            say(removexattr(&b.join("full"), default)),
        )
    }),
    ("xattr of a symbolic link", |b| {
        say(setxattr(&b.join("link"), "trusted.l", b"link", 0))
    }),
    ("xattr list", |b| {
        for name in ["trusted.a", "trusted.bb", "trusted.ccc"] {
            setxattr(&b.join("file"), name, name.as_bytes(), 0).unwrap();
        }
        format!("{:?}", snapshot::xattrs(&b.join("file")))
    }),
    ("statfs", |b| {
        let st = nix::sys::statvfs::statvfs(b).unwrap();
        format!("{} {} {}", st.blocks(), st.block_size(), st.name_max())
    }),
    ("a directory with many names", |b| {
        for i in 0..500 {
            fs::write(b.join(format!("full/{i:0100}")), b"").unwrap();
        }
        let mut names: Vec<_> = fs::read_dir(b.join("full"))
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        names.dedup();
        names.len().to_string()
    }),
    ("locks", |b| {
        let (one, two) = (rw(&b.join("file")), rw(&b.join("file")));
        // SAFETY: no memory is involved.
        let lock = |f: &File| {
            say(ret(unsafe {
                libc::flock(f.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB)
            }))
        };
        lock(&one) + &lock(&two)
    }),
];
