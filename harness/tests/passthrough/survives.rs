// SPDX-License-Identifier: GPL-2.0
//! What else lives on: very many open files, what has no name and is not even open, directory streams, counts.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, Sender};
use std::time::Duration;

use nix::sys::resource::{getrlimit, setrlimit, Resource};

use crate::crash::{conclusively, kill_during, round, said, Random};
use crate::served::{Kind, Served, KINDS};

/// Bytes of memory that the state of the running server takes.
fn memory_of_state(served: &Served) -> u64 {
    let fds = PathBuf::from(format!("/proc/{}/fd", served.server_pid()));
    let state = fs::read_dir(&fds).unwrap().flatten().find(|fd| {
        fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("memfd:fusestate"))
    });
    fs::metadata(state.expect("it has its state").path())
        .unwrap()
        .blocks()
        * 512
}

#[test]
fn a_hundred_thousand_open_files() {
    const FILES: usize = 500;
    const THREADS: usize = 8;
    const EACH: usize = 12_500;
    const NOFILE: u32 = 512;
    // Raising the hard limit may not be allowed; every thread has a table of its own.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if hard < EACH as u64 + 512 || setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() {
        eprintln!("SKIPPED: {hard} descriptors are too few");
        return;
    }
    let options = ["--threads", "2"];
    let Some(served) = Served::start_limited(Kind::Tmpfs, &options, NOFILE) else {
        return;
    };
    let path = |n: usize| served.mnt().join(format!("file{}", n % FILES));
    for n in 0..FILES {
        fs::write(path(n), format!("content of {n}")).unwrap();
    }
    let before = memory_of_state(&served);
    let descriptors = || {
        let fds = format!("/proc/{}/fd", served.server_pid());
        fs::read_dir(fds).unwrap().count()
    };
    std::thread::scope(|scope| {
        // Whoever panics drops his ends, and nobody waits for him.
        let (ready, all_ready) = channel();
        let threads: Vec<Sender<()>> = (0..THREADS)
            .map(|thread| {
                let (go, told) = channel();
                let (ready, path) = (ready.clone(), &path);
                scope.spawn(move || {
                    // SAFETY: this thread gets a table of its own without what others have open: it would keep that
                    // open, and their mounts busy.
                    let alone = unsafe {
                        libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE as i32)
                    };
                    assert_eq!(alone, 0);
                    let open: Vec<File> = (0..EACH)
                        .map(|n| {
                            let path = path(n * THREADS + thread);
                            let file = OpenOptions::new().read(true).write(true).open(path);
                            file.unwrap_or_else(|e| panic!("{thread}, open number {n}: {e}"))
                        })
                        .collect();
                    ready.send(()).unwrap();
                    told.recv().unwrap(); // The server is another one.
                    for n in (0..EACH).step_by(41) {
                        let mut text = [0; 32];
                        let read = open[n].read_at(&mut text, 0);
                        let read = read.unwrap_or_else(|e| panic!("{thread}, file {n}: {e}"));
                        let want = format!("content of {}", (n * THREADS + thread) % FILES);
                        assert_eq!(text[..read], *want.as_bytes());
                        let written = open[n].write_at(b"c", 0);
                        written.unwrap_or_else(|e| panic!("{thread}, file {n}: {e}"));
                    }
                    ready.send(()).unwrap();
                    told.recv().unwrap(); // All were used.
                    open[EACH - 1].write_at(b"C", 0).unwrap();
                });
                go
            })
            .collect();
        drop(ready);
        let wait = |what: &str| {
            for _ in 0..THREADS {
                let next = all_ready.recv_timeout(Duration::from_secs(120));
                next.unwrap_or_else(|e| panic!("{what}: {e}"));
            }
        };
        let go = || threads.iter().for_each(|t| t.send(()).unwrap());
        wait("all are open");
        let open = THREADS * EACH;
        let each = (memory_of_state(&served) - before) as f64 / open as f64;
        eprintln!("{open} files are open, {each:.1} bytes of state for each");
        // Whole pages are counted.
        assert!(each < 64.5, "{each} bytes");
        served.crash_and_wait();
        assert!(
            descriptors() < 64,
            "{} were opened for nothing",
            descriptors()
        );
        go();
        wait("all were used");
        assert!(descriptors() < NOFILE as usize);
        go();
    });
    let last = fs::read(path(THREADS * EACH - 1)).unwrap();
    assert!(last.starts_with(b"Content"));
    // What was closed is used again.
    served.wait_until_idle();
    let closed = memory_of_state(&served);
    for n in 0..FILES {
        drop(File::open(path(n)).unwrap());
    }
    assert_eq!(memory_of_state(&served), closed);
}

/// Runs `f` in a thread whose current directory is `dir`.
fn inside<T: Send>(dir: &Path, f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: separates this thread's current directory from the others'.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_FS) }, 0);
            std::env::set_current_dir(dir).unwrap();
            f()
        });
        thread.join().unwrap()
    })
}

#[test]
fn what_only_a_current_directory_or_an_o_path_descriptor_holds() {
    for kind in KINDS {
        let Some(served) = Served::start(kind, &[]) else {
            continue;
        };
        let mnt = served.mnt();
        fs::create_dir_all(mnt.join("dir/sub")).unwrap();
        fs::create_dir(mnt.join("overwritten")).unwrap();
        for name in ["mover", "white", "white-mover"] {
            fs::create_dir(mnt.join(name)).unwrap();
        }
        fs::write(mnt.join("white-file"), b"overwritten").unwrap();
        fs::write(mnt.join("white-winner"), b"winner").unwrap();
        fs::write(mnt.join("file"), b"still here").unwrap();
        let by_path = |name: &str| {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_PATH);
            options.open(mnt.join(name)).unwrap()
        };
        let (file, dir) = (by_path("file"), by_path("overwritten"));
        let (white, white_file) = (by_path("white"), by_path("white-file"));
        let whiteout = |from: &str, to: &str| {
            let cwd = nix::fcntl::AT_FDCWD;
            // In nix the flag exists with another C library only.
            let flags = nix::fcntl::RenameFlags::from_bits_retain(libc::RENAME_WHITEOUT);
            nix::fcntl::renameat2(cwd, &mnt.join(from), cwd, &mnt.join(to), flags).unwrap();
            let meta = fs::symlink_metadata(mnt.join(from)).unwrap();
            assert_eq!(
                (meta.mode() & libc::S_IFMT, meta.rdev()),
                (libc::S_IFCHR, 0)
            );
        };
        inside(&mnt.join("dir/sub"), || {
            fs::remove_dir(mnt.join("dir/sub")).unwrap();
            fs::remove_dir(mnt.join("dir")).unwrap();
            fs::rename(mnt.join("mover"), mnt.join("overwritten")).unwrap();
            fs::remove_file(mnt.join("file")).unwrap();
            whiteout("white-mover", "white");
            whiteout("white-winner", "white-file");
            let held = [&file, &dir, &white, &white_file].map(proc_path);
            let all = || {
                [".", ".."]
                    .into_iter()
                    .chain(held.iter().map(String::as_str))
            };
            let inodes: Vec<u64> = all()
                .map(|path| fs::metadata(path).unwrap().ino())
                .collect();
            for n in 1..=2 {
                served.crash_and_wait();
                let after: Vec<u64> = all()
                    .map(|path| {
                        let meta = fs::metadata(path);
                        let meta = meta.unwrap_or_else(|e| panic!("{kind:?} {path} {n}: {e}"));
                        assert_eq!(meta.nlink(), 0, "{kind:?} {path} after {n} crashes");
                        meta.ino()
                    })
                    .collect();
                assert_eq!(after, inodes, "{kind:?} after {n} crashes");
                let mut text = String::new();
                let mut opened = File::open(proc_path(&file)).unwrap();
                opened.read_to_string(&mut text).unwrap();
                assert_eq!(text, "still here", "{kind:?} after {n} crashes");
                assert_eq!(fs::read_dir(".").unwrap().count(), 0);
                let made = fs::write("new", b"").unwrap_err();
                assert_eq!(made.raw_os_error(), Some(libc::ENOENT), "{kind:?}");
            }
        });
        for name in ["overwritten", "white", "white-file"] {
            assert!(fs::metadata(mnt.join(name)).unwrap().nlink() > 0);
        }
    }
}

fn proc_path(file: &File) -> String {
    // The process's, not the thread's, which are the same.
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[test]
fn a_directory_that_changes_under_a_stream_and_a_crash() {
    const ENTRIES: usize = 1500;
    for kind in KINDS {
        let Some(served) = Served::start(kind, &[]) else {
            continue;
        };
        let dir = served.mnt().join("dir");
        fs::create_dir(&dir).unwrap();
        let name = |n: usize| OsString::from(format!("{n:050}"));
        for n in 0..ENTRIES {
            fs::write(dir.join(name(n)), b"").unwrap();
        }
        let mut untouched: HashSet<OsString> = (0..ENTRIES).map(name).collect();
        let mut seen: HashMap<OsString, u32> = HashMap::new();
        let mut crashes = 0;
        for (at, entry) in fs::read_dir(&dir).unwrap().enumerate() {
            assert!(at < 2 * ENTRIES, "{kind:?}: it never ends");
            *seen.entry(entry.unwrap().file_name()).or_default() += 1;
            if at % 250 != 125 {
                continue;
            }
            crashes += 1;
            // Some go that were seen and some that were not, and new ones come, before and after the crash.
            for (part, crash) in [(0, true), (1, false)] {
                for n in (0..40).map(|i| (crashes * 389 + i * 29 + part) % ENTRIES) {
                    if untouched.remove(&name(n)) {
                        fs::remove_file(dir.join(name(n))).unwrap();
                    }
                }
                for n in 0..10 {
                    fs::write(dir.join(format!("new-{crashes}-{part}-{n}")), b"").unwrap();
                }
                if crash {
                    served.crash_and_wait();
                }
            }
        }
        assert!(crashes >= 5, "{kind:?}: {crashes}");
        assert!(untouched.len() > ENTRIES / 3, "{}", untouched.len());
        for name in &untouched {
            assert_eq!(seen.get(name), Some(&1), "{kind:?}: {name:?}");
        }
        let twice = seen.iter().find(|(_, times)| **times > 1);
        assert_eq!(twice, None, "{kind:?}");
    }
}

#[test]
fn a_position_in_a_directory_is_good_after_a_crash() {
    for kind in KINDS {
        let Some(served) = Served::start(kind, &[]) else {
            continue;
        };
        let dir = served.mnt().join("dir");
        fs::create_dir(&dir).unwrap();
        for n in 0..500 {
            fs::write(dir.join(format!("{n:040}")), b"").unwrap();
        }
        let path = std::ffi::CString::new(dir.to_str().unwrap()).unwrap();
        // SAFETY: the stream is used by this thread alone, and closed at the end; what readdir(3) returns is copied
        // before the next call.
        unsafe {
            let stream = libc::opendir(path.as_ptr());
            assert!(!stream.is_null());
            let next = || {
                let entry = libc::readdir(stream);
                (!entry.is_null()).then(|| {
                    let name = (*entry).d_name.as_ptr();
                    std::ffi::CStr::from_ptr(name).to_owned()
                })
            };
            let mut order = Vec::new();
            loop {
                let at = libc::telldir(stream);
                let Some(name) = next() else { break };
                order.push((at, name));
            }
            assert_eq!(order.len(), 502, "{kind:?}");
            served.crash_and_wait();
            for (at, name) in order.iter().step_by(61).rev() {
                libc::seekdir(stream, *at);
                assert_eq!(next().as_ref(), Some(name), "{kind:?} at {at}");
            }
            libc::rewinddir(stream);
            assert_eq!(next().as_ref(), Some(&order[0].1), "{kind:?}");
            libc::closedir(stream);
        }
    }
}

/// With what was left over by several dead instances the counts are the kernel's still.
fn counts_agree(kind: Kind) -> bool {
    const KILLS: u64 = 8;
    let Some(served) = Served::start(kind, &["--threads", "4"]) else {
        return true;
    };
    let mut random = Random::new("counts_agree");
    let conclusive = kill_during(&served, KILLS, &mut random, |running| {
        std::thread::scope(|scope| {
            for worker in 0..3 {
                let dir = served.mnt().join(format!("worker{worker}"));
                scope.spawn(move || {
                    running.ok("mkdir", fs::create_dir(&dir));
                    let mut n = 0;
                    while running.go_on() {
                        round(&dir, n, running);
                        n += 1;
                        for entry in running.ok("readdir", fs::read_dir(&dir)) {
                            running.ok("stat", entry.and_then(|entry| entry.metadata()));
                        }
                    }
                });
            }
        });
    });
    if !conclusive {
        return false;
    }
    // One RESTARTED takes the kernel's counts over; the next ones compare.
    for n in 1..=3 {
        served.wait_until_idle();
        served.crash_and_wait();
        if served.stderr().contains("no FUSE_NOTIFY_RESTARTED") {
            eprintln!("SKIPPED: this kernel does not say its counts");
            return true;
        }
        let differed = said(
            &served,
            " were looked up another number",
            KILLS as usize + n,
        );
        assert_eq!(differed, 0, "{kind:?} {n}: {}", served.stderr());
        for entry in fs::read_dir(served.mnt().join("worker0")).unwrap() {
            entry.unwrap().metadata().unwrap();
        }
    }
    true
}

#[test]
fn counts_agree_after_crashes() {
    for kind in KINDS {
        conclusively(|| counts_agree(kind));
    }
}
