// SPDX-License-Identifier: GPL-2.0
//! The changes that [`super::crash_tests`] kills the server in, one of each kind.

use std::os::fd::AsFd;
use std::time::UNIX_EPOCH;

use fuser::TimeOrNow;
use rust_fuse_notify::std::state::Slot;

use super::attr::Change;
use super::crash_tests::{s, ME};
use super::make::Thing;
use super::nodes::ROOT;
use super::server::Server;
use super::sys::{self, Res};

pub struct Case {
    pub name: &'static str,
    /// The kernel knows these, as it does of everything that it asks to change.
    pub known: &'static [&'static str],
    pub act: fn(&Server, u64) -> Res<()>,
    /// Whether it is whole or not there when the server died in it and it is not sent again. What is made of several
    /// system calls that can be repeated is not.
    pub whole: bool,
}

/// The request was answered.
pub fn finish<T>((_, slot): (T, Option<Slot<'_>>)) {
    if let Some(slot) = slot {
        slot.done();
    }
}

pub fn rename(server: &Server, unique: u64, from: &str, to: &str, flags: u32) -> Res<()> {
    server
        .rename(unique, ME, (ROOT, s(from)), (ROOT, s(to)), flags)
        .map(finish)
}

/// Runs `f` with the file open, as an earlier request opened it.
fn with_file(
    server: &Server,
    unique: u64,
    name: &str,
    f: impl FnOnce(u64, u64) -> Res<()>,
) -> Res<()> {
    let nodeid = node(server, name);
    let fh = server.open(unique + 200, nodeid, libc::O_RDWR)?;
    f(nodeid, fh)
}

fn node(server: &Server, name: &str) -> u64 {
    let seen = server.look(ROOT, &std::ffi::CString::new(name).unwrap());
    server.known(&seen.unwrap().expect("it is there"))
}

pub const CASES: &[Case] = &[
    Case {
        name: "mkdir",
        known: &[],
        whole: true,
        act: |server, unique| {
            let thing = Thing::Dir { mode: 0o750 };
            server
                .make(unique, ME, (ROOT, s("new")), 0o22, &thing)
                .map(finish)
        },
    },
    Case {
        name: "mknod",
        known: &[],
        whole: true,
        act: |server, unique| {
            let thing = Thing::Node {
                mode: libc::S_IFIFO | 0o640,
                rdev: 0,
            };
            server
                .make(unique, ME, (ROOT, s("new")), 0, &thing)
                .map(finish)
        },
    },
    Case {
        name: "symlink",
        known: &[],
        whole: true,
        act: |server, unique| {
            let thing = Thing::Symlink {
                target: c"somewhere",
            };
            server
                .make(unique, ME, (ROOT, s("new")), 0, &thing)
                .map(finish)
        },
    },
    Case {
        name: "create",
        known: &[],
        whole: true,
        act: |server, unique| {
            let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
            server
                .create(unique, ME, (ROOT, s("new")), (0o640, 0), flags)
                .map(finish)
        },
    },
    Case {
        name: "link",
        known: &["one"],
        whole: true,
        act: |server, unique| {
            server
                .link(unique, node(server, "one"), (ROOT, s("new")))
                .map(finish)
        },
    },
    Case {
        name: "unlink of the last name",
        known: &["one"],
        whole: true,
        act: |server, unique| server.remove(unique, (ROOT, s("one")), false).map(finish),
    },
    Case {
        name: "unlink of one of two names",
        known: &["two"],
        whole: true,
        act: |server, unique| server.remove(unique, (ROOT, s("two")), false).map(finish),
    },
    Case {
        name: "unlink of what the kernel does not hold",
        known: &[],
        whole: true,
        act: |server, unique| server.remove(unique, (ROOT, s("one")), false).map(finish),
    },
    Case {
        name: "rmdir",
        known: &["empty"],
        whole: true,
        act: |server, unique| server.remove(unique, (ROOT, s("empty")), true).map(finish),
    },
    Case {
        name: "rename",
        known: &["one"],
        whole: true,
        act: |server, unique| rename(server, unique, "one", "new", 0),
    },
    Case {
        name: "rename of a directory",
        known: &["full"],
        whole: true,
        act: |server, unique| rename(server, unique, "full", "new", libc::RENAME_NOREPLACE),
    },
    Case {
        name: "rename over the last name",
        known: &["one", "two"],
        whole: true,
        act: |server, unique| rename(server, unique, "two", "one", 0),
    },
    Case {
        name: "rename over one of two names",
        known: &["one", "two"],
        whole: true,
        act: |server, unique| rename(server, unique, "one", "two", 0),
    },
    Case {
        name: "rename between two names of a file",
        known: &["two", "two-too"],
        whole: true,
        act: |server, unique| rename(server, unique, "two", "two-too", 0),
    },
    Case {
        name: "rename over an empty directory",
        known: &["full", "empty"],
        whole: true,
        act: |server, unique| rename(server, unique, "full", "empty", 0),
    },
    Case {
        name: "exchange",
        known: &["one", "full"],
        whole: true,
        act: |server, unique| rename(server, unique, "one", "full", libc::RENAME_EXCHANGE),
    },
    Case {
        name: "setxattr with CREATE",
        known: &["one"],
        whole: true,
        act: |server, unique| {
            let flags = libc::XATTR_CREATE;
            let name = s("trusted.new");
            let set = server.set_xattr(unique, node(server, "one"), name, b"1", flags);
            set.map(|slot| finish(((), slot)))
        },
    },
    Case {
        name: "removexattr",
        known: &["one"],
        whole: true,
        act: |server, unique| {
            let removed = server.remove_xattr(unique, node(server, "one"), s("trusted.old"));
            removed.map(|slot| finish(((), slot)))
        },
    },
    Case {
        name: "create of what is there, truncating",
        known: &["one"],
        whole: true,
        act: |server, unique| {
            let flags = libc::O_CREAT | libc::O_TRUNC | libc::O_WRONLY;
            server
                .create(unique, ME, (ROOT, s("one")), (0o640, 0), flags)
                .map(finish)
        },
    },
    Case {
        name: "rename to a new name, leaving a whiteout",
        known: &["one"],
        whole: true,
        act: |server, unique| rename(server, unique, "one", "new", libc::RENAME_WHITEOUT),
    },
    Case {
        name: "rename over the last name, leaving a whiteout",
        known: &["one", "two"],
        whole: true,
        act: |server, unique| rename(server, unique, "two", "one", libc::RENAME_WHITEOUT),
    },
    Case {
        name: "rename over an empty directory, leaving a whiteout",
        known: &["full", "empty"],
        whole: true,
        act: |server, unique| rename(server, unique, "full", "empty", libc::RENAME_WHITEOUT),
    },
    Case {
        name: "rename over an empty directory that the kernel does not hold",
        known: &["full"],
        whole: true,
        act: |server, unique| rename(server, unique, "full", "empty", 0),
    },
    Case {
        name: "exchange of directories",
        known: &["empty", "full"],
        whole: true,
        act: |server, unique| rename(server, unique, "empty", "full", libc::RENAME_EXCHANGE),
    },
    Case {
        name: "setxattr with REPLACE",
        known: &["one"],
        whole: true,
        act: |server, unique| {
            let flags = libc::XATTR_REPLACE;
            let name = s("trusted.old");
            let set = server.set_xattr(unique, node(server, "one"), name, b"2", flags);
            set.map(|slot| finish(((), slot)))
        },
    },
    Case {
        name: "setxattr",
        known: &["one"],
        whole: true,
        act: |server, unique| {
            let name = s("trusted.old");
            let set = server.set_xattr(unique, node(server, "one"), name, b"2", 0);
            set.map(|slot| finish(((), slot)))
        },
    },
    Case {
        name: "setattr of everything",
        known: &["one"],
        whole: false,
        act: |server, _| {
            let change = Change {
                mode: Some(0o4711),
                uid: Some(12),
                gid: Some(34),
                size: Some(5),
                atime: Some(TimeOrNow::SpecificTime(UNIX_EPOCH)),
                mtime: Some(TimeOrNow::SpecificTime(UNIX_EPOCH)),
                fh: None,
            };
            server.set_attr(node(server, "one"), &change).map(drop)
        },
    },
    Case {
        name: "fallocate",
        known: &["one"],
        whole: true,
        act: |server, unique| {
            with_file(server, unique, "one", |nodeid, fh| {
                server.allocate(nodeid, fh, libc::FALLOC_FL_ZERO_RANGE, 3, 40)
            })
        },
    },
    Case {
        name: "write",
        known: &["one"],
        whole: true,
        act: |server, unique| {
            with_file(server, unique, "one", |nodeid, fh| {
                let file = server.file(nodeid, fh)?;
                sys::write_full_at(file.as_fd(), b"written at the end", 10).map(drop)
            })
        },
    },
    Case {
        name: "copy_file_range",
        known: &["one", "two"],
        whole: true,
        act: |server, unique| {
            let from = node(server, "two");
            let from = (from, server.open(unique + 100, from, libc::O_RDONLY)?, 3);
            with_file(server, unique, "one", |nodeid, fh| {
                let copied = server.copy(unique, from, (nodeid, fh, 5), 1000)?;
                assert_eq!(copied.0, "content of two".len() as u32 - 3);
                finish(copied);
                Ok(())
            })
        },
    },
];
