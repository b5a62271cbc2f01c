// SPDX-License-Identifier: GPL-2.0
//! Operations on names.

use std::fs;
use std::os::unix::fs as unix;

use crate::calls::{mknod, rename2, say};
use crate::ops::Op;

pub const NAMES: &[Op] = &[
    ("lookup of nothing", |b| {
        say(fs::metadata(b.join("nothing")).map(drop))
    }),
    ("lookup of a long name", |b| {
        say(fs::metadata(b.join("x".repeat(256))).map(drop))
    }),
    ("mkdir", |b| say(fs::create_dir(b.join("dir")))),
    ("mkdir over something", |b| {
        say(fs::create_dir(b.join("file")))
    }),
    ("mkdir -p and a file", |b| {
        fs::create_dir_all(b.join("a/b/c")).unwrap();
        say(fs::write(b.join("a/b/c/d"), b"d"))
    }),
    ("rmdir", |b| say(fs::remove_dir(b.join("empty")))),
    ("rmdir of a full directory", |b| {
        say(fs::remove_dir(b.join("full")))
    }),
    ("rmdir of a file", |b| say(fs::remove_dir(b.join("file")))),
    ("unlink", |b| say(fs::remove_file(b.join("file")))),
    ("unlink of a directory", |b| {
        say(fs::remove_file(b.join("empty")))
    }),
    ("unlink of nothing", |b| {
        say(fs::remove_file(b.join("nothing")))
    }),
    ("unlink of one of two names", |b| {
        say(fs::remove_file(b.join("other")))
    }),
    ("unlink of a symbolic link", |b| {
        say(fs::remove_file(b.join("link")))
    }),
    ("remove a tree", |b| say(fs::remove_dir_all(b.join("full")))),
    ("make again what was removed", |b| {
        fs::remove_file(b.join("file")).unwrap();
        fs::remove_dir(b.join("empty")).unwrap();
        fs::create_dir(b.join("file")).unwrap();
        say(fs::write(b.join("empty"), b"now a file"))
    }),
    ("symlink", |b| {
        say(unix::symlink("../somewhere/else", b.join("sym")))
    }),
    ("symlink over something", |b| {
        say(unix::symlink("x", b.join("file")))
    }),
    ("readlink", |b| say(fs::read_link(b.join("link")))),
    ("readlink of a file", |b| say(fs::read_link(b.join("file")))),
    ("link", |b| {
        say(fs::hard_link(b.join("file"), b.join("full/file")))
    }),
    ("link over something", |b| {
        say(fs::hard_link(b.join("file"), b.join("other")))
    }),
    ("link of a directory", |b| {
        say(fs::hard_link(b.join("empty"), b.join("e2")))
    }),
    ("link of a symbolic link", |b| {
        say(fs::hard_link(b.join("link"), b.join("link2")))
    }),
    ("mknod of a fifo", |b| {
        say(mknod(&b.join("fifo"), libc::S_IFIFO | 0o640, 0))
    }),
    ("mknod of a socket", |b| {
        say(mknod(&b.join("sock"), libc::S_IFSOCK | 0o600, 0))
    }),
    ("mknod of a file", |b| {
        say(mknod(&b.join("node"), libc::S_IFREG | 0o604, 0))
    }),
    ("mknod of a device", |b| {
        say(mknod(
            &b.join("dev"),
            libc::S_IFCHR | 0o600,
            libc::makedev(1, 300),
        ))
    }),
    ("rename", |b| {
        say(fs::rename(b.join("file"), b.join("full/moved")))
    }),
    ("rename over a file", |b| {
        say(fs::rename(b.join("file"), b.join("other")))
    }),
    ("rename over the last name", |b| {
        say(fs::rename(b.join("other"), b.join("file")))
    }),
    ("rename of one file over itself", |b| {
        say(fs::rename(b.join("other"), b.join("other2")))
    }),
    ("rename of a directory", |b| {
        say(fs::rename(b.join("full"), b.join("empty/sub")))
    }),
    ("rename over an empty directory", |b| {
        say(fs::rename(b.join("full"), b.join("empty")))
    }),
    ("rename over a full directory", |b| {
        say(fs::rename(b.join("empty"), b.join("full")))
    }),
    ("rename into itself", |b| {
        say(fs::rename(b.join("full"), b.join("full/sub")))
    }),
    ("rename of a file over a directory", |b| {
        say(fs::rename(b.join("file"), b.join("empty")))
    }),
    ("rename of a directory over a file", |b| {
        say(fs::rename(b.join("empty"), b.join("file")))
    }),
    ("rename of nothing", |b| {
        say(fs::rename(b.join("nothing"), b.join("x")))
    }),
    ("rename NOREPLACE", |b| {
        say(rename2(
            &b.join("file"),
            &b.join("new"),
            libc::RENAME_NOREPLACE,
        ))
    }),
    ("rename NOREPLACE over something", |b| {
        say(rename2(
            &b.join("file"),
            &b.join("other"),
            libc::RENAME_NOREPLACE,
        ))
    }),
    ("rename EXCHANGE", |b| {
        say(rename2(
            &b.join("file"),
            &b.join("full"),
            libc::RENAME_EXCHANGE,
        ))
    }),
    ("rename EXCHANGE with nothing", |b| {
        say(rename2(
            &b.join("file"),
            &b.join("nothing"),
            libc::RENAME_EXCHANGE,
        ))
    }),
    ("rename WHITEOUT", |b| {
        say(rename2(
            &b.join("file"),
            &b.join("new"),
            libc::RENAME_WHITEOUT,
        ))
    }),
    ("rename WHITEOUT over something", |b| {
        say(rename2(
            &b.join("file"),
            &b.join("other"),
            libc::RENAME_WHITEOUT,
        ))
    }),
];
