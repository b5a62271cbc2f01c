// SPDX-License-Identifier: GPL-2.0
//! Operations on open files.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use crate::calls::{c, ret, rw, say};
use crate::ops::Op;

pub const DATA: &[Op] = &[
    ("create exclusively", |b| {
        say(OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o604)
            .open(b.join("new"))
            .map(drop))
    }),
    ("create exclusively over something", |b| {
        say(OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(b.join("file"))
            .map(drop))
    }),
    ("create a read-only file and write it", |b| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(b.join("ro"))
            .unwrap();
        say(file.write_all(b"written"))
    }),
    ("create with O_TRUNC", |b| {
        say(fs::write(b.join("file"), b"new"))
    }),
    ("open of nothing", |b| {
        say(File::open(b.join("nothing")).map(drop))
    }),
    ("open through a link", |b| {
        say(fs::read_to_string(b.join("link")))
    }),
    ("open O_NOFOLLOW", |b| {
        let flags = libc::O_NOFOLLOW;
        say(OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(b.join("link"))
            .map(drop))
    }),
    ("open O_DIRECTORY of a file", |b| {
        let flags = libc::O_DIRECTORY;
        say(OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(b.join("file"))
            .map(drop))
    }),
    ("read", |b| say(fs::read(b.join("file")))),
    ("read behind the end", |b| {
        let mut buf = [0; 10];
        say(rw(&b.join("file")).read_at(&mut buf, 1000))
    }),
    ("read across the end", |b| {
        let mut buf = [0; 10];
        say(rw(&b.join("file")).read_at(&mut buf, 8).map(|n| (n, buf)))
    }),
    ("append", |b| {
        let mut file = OpenOptions::new()
            .append(true)
            .open(b.join("file"))
            .unwrap();
        file.write_all(b" and").unwrap();
        say(file.write_all(b" more"))
    }),
    ("append through two descriptors", |b| {
        let open = || {
            OpenOptions::new()
                .append(true)
                .open(b.join("file"))
                .unwrap()
        };
        let (mut one, mut two) = (open(), open());
        one.write_all(b"111").unwrap();
        two.write_all(b"222").unwrap();
        say(one.write_all(b"333"))
    }),
    ("write only", |b| {
        let file = OpenOptions::new()
            .write(true)
            .open(b.join("other"))
            .unwrap();
        say(file.write_at(b"in the middle", 50_001))
    }),
    ("write beyond the end", |b| {
        say(rw(&b.join("file")).write_at(b"far", 1 << 20))
    }),
    ("write a lot", |b| {
        let block: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7) as u8).collect();
        say(fs::write(b.join("big"), block))
    }),
    ("truncate", |b| say(rw(&b.join("other")).set_len(1234))),
    ("truncate by path", |b| {
        // SAFETY: the string is NUL-terminated.
        say(ret(unsafe {
            libc::truncate(c(&b.join("other")).as_ptr(), 99)
        }))
    }),
    ("truncate to more", |b| {
        say(rw(&b.join("file")).set_len(70_000))
    }),
    ("fallocate", |b| {
        // SAFETY: no memory is involved.
        say(ret(unsafe {
            libc::fallocate(rw(&b.join("file")).as_raw_fd(), 0, 10, 5000)
        }))
    }),
    ("fallocate PUNCH_HOLE", |b| {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is involved.
        say(ret(unsafe {
            libc::fallocate(rw(&b.join("other")).as_raw_fd(), mode, 4096, 8192)
        }))
    }),
    ("seek to holes and data", |b| {
        let file = File::create(b.join("sparse")).unwrap();
        file.write_at(b"x", 1 << 20).unwrap();
        file.set_len(4 << 20).unwrap();
        file.sync_all().unwrap();
        let fd = file.as_raw_fd();
        // SAFETY: no memory is involved.
        let seek = |at, whence| say(ret(unsafe { libc::lseek(fd, at, whence) }));
        [
            seek(0, libc::SEEK_DATA),
            seek(0, libc::SEEK_HOLE),
            seek(1 << 20, libc::SEEK_HOLE),
            seek(2 << 20, libc::SEEK_DATA),
            seek(0, libc::SEEK_END),
        ]
        .join(", ")
    }),
    ("copy_file_range", |b| {
        let (from, to) = (rw(&b.join("other")), File::create(b.join("copy")).unwrap());
        let (mut at, mut into) = (5000, 100);
        // SAFETY: both offsets are valid for the call.
        say(ret(unsafe {
            libc::copy_file_range(
                from.as_raw_fd(),
                &mut at,
                to.as_raw_fd(),
                &mut into,
                33_000,
                0,
            )
        } as i64))
    }),
    ("fsync and fdatasync", |b| {
        let mut file = rw(&b.join("file"));
        file.write_all(b"S").unwrap();
        say(file.sync_data().and(file.sync_all()))
    }),
    ("fsync of a directory", |b| {
        say(File::open(b.join("full")).unwrap().sync_all())
    }),
    ("mmap", |b| {
        let file = rw(&b.join("other"));
        let (prot, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a fresh mapping of an open file, used within its length and unmapped again.
        unsafe {
            let p = libc::mmap(
                std::ptr::null_mut(),
                8192,
                prot,
                shared,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(p, libc::MAP_FAILED);
            let bytes = std::slice::from_raw_parts_mut(p.cast::<u8>(), 8192);
            let seen = (bytes[0], bytes[8191]);
            bytes[4000..4005].copy_from_slice(b"mmap!");
            assert_eq!(libc::msync(p, 8192, libc::MS_SYNC), 0);
            libc::munmap(p, 8192);
            format!("{seen:?}")
        }
    }),
    ("use after unlink", |b| {
        let mut file = rw(&b.join("file"));
        fs::remove_file(b.join("file")).unwrap();
        file.seek(SeekFrom::End(0)).unwrap();
        file.write_all(b" goes on").unwrap();
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        format!("{text:?} links {}", file.metadata().unwrap().nlink())
    }),
    ("use after rename over it", |b| {
        let mut file = rw(&b.join("file"));
        fs::rename(b.join("other"), b.join("file")).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        format!("{text:?} links {}", file.metadata().unwrap().nlink())
    }),
    ("use of a removed directory", |b| {
        let dir = File::open(b.join("empty")).unwrap();
        fs::remove_dir(b.join("empty")).unwrap();
        format!("links {}", dir.metadata().unwrap().nlink())
    }),
    ("a name for a file that has none", |b| {
        let file = rw(&b.join("file"));
        fs::remove_file(b.join("file")).unwrap();
        let again = b.join("again");
        // SAFETY: strings are NUL-terminated.
        say(ret(unsafe {
            libc::linkat(
                file.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_FDCWD,
                c(&again).as_ptr(),
                libc::AT_EMPTY_PATH,
            )
        }))
    }),
];
