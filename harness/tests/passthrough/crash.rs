// SPDX-License-Identifier: GPL-2.0
//! The server is killed at random moments; the applications do not notice.
//!
//! On a kernel without FUSE_NOTIFY_RESTARTED the requests are resent, no more: what is checked
//! here must hold on both.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{symlink, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::served::{wait_for, Kind, Served, KINDS};
use crate::snapshot;

/// xorshift64*: enough to choose moments, and repeatable.
pub struct Random(u64);

impl Random {
    /// From FUSE_RESTART_SEED if it is set; says which one it is.
    pub fn new(test: &str) -> Random {
        let seed = match std::env::var("FUSE_RESTART_SEED") {
            Ok(text) => text.parse().expect("FUSE_RESTART_SEED is a number"),
            Err(_) => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap()
                .as_nanos() as u64,
        };
        eprintln!("{test}: FUSE_RESTART_SEED={seed}");
        Random(seed | 1)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

/// Kills the server `times` times, each at a random moment after the workload has made progress.
///
/// `false`: the kernel lost a request, as one without the series may, see [`Running::ok`].
pub fn kill_during(
    served: &Served,
    times: u64,
    random: &mut Random,
    workload: impl Fn(&Running) + Sync,
) -> bool {
    let running = Running {
        old_kernel: served.stderr().contains("no FUSE_NOTIFY_RESTARTED"),
        ..Running::default()
    };
    let finished = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            // Ends the killing when the workload fails.
            let _end = SetOnDrop(&running.ended);
            workload(&running);
        });
        for _ in 0..times {
            let before = running.steps.load(Ordering::Relaxed);
            wait_for("progress of the workload", || {
                let ended = running.ended.load(Ordering::Relaxed);
                let steps = running.steps.load(Ordering::Relaxed);
                (ended || steps > before + 3).then_some(())
            });
            if running.ended.load(Ordering::Relaxed) {
                break;
            }
            std::thread::sleep(Duration::from_micros(random.below(8000)));
            served.crash();
        }
        running.stop.store(true, Ordering::Relaxed);
        worker.join()
    });
    let steps = running.steps.load(Ordering::Relaxed);
    let kills = served.starts() as u64 - 1;
    eprintln!("{kills} kills during {steps} operations");
    if running.lost.load(Ordering::Relaxed) {
        eprintln!("this kernel lost a request: EIO for one that its reader was killed over");
        return false;
    }
    finished.expect("the workload failed");
    assert_eq!(kills, times, "the workload ended early");
    true
}

/// A kernel without the series gets some more chances to lose nothing.
pub fn conclusively(test: impl Fn() -> bool) {
    if !(0..8).any(|_| test()) {
        eprintln!("SKIPPED: this kernel lost a request in every one of 8 attempts");
    }
}

#[derive(Default)]
pub struct Running {
    steps: AtomicU64,
    stop: AtomicBool,
    ended: AtomicBool,
    lost: AtomicBool,
    old_kernel: bool,
}

impl Running {
    /// Panics if an operation failed, and says so if it is the kernel's fault.
    ///
    /// A kernel without FUSE_NOTIFY_RESTARTED ends a request with EIO when the server is killed
    /// while it copies it, a thing that the series mends. Nothing else is excused.
    pub fn ok<T>(&self, what: &str, result: std::io::Result<T>) -> T {
        let result = result.inspect_err(|e| {
            if self.old_kernel && e.raw_os_error() == Some(libc::EIO) {
                self.lost.store(true, Ordering::Relaxed);
            }
        });
        let value = result.unwrap_or_else(|e| panic!("{what}: {e}"));
        self.steps.fetch_add(1, Ordering::Relaxed);
        value
    }

    pub fn go_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One round of changes of names; every one of them must succeed, exactly once.
pub fn round(dir: &Path, n: u64, running: &Running) {
    let ok = |what: &str, result: std::io::Result<()>| {
        running.ok(&format!("{what} in round {n}"), result);
    };
    let p = |name: &str| dir.join(format!("{name}{n}"));
    let exchange = |a: PathBuf, b: PathBuf| {
        let cwd = nix::fcntl::AT_FDCWD;
        let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
        nix::fcntl::renameat2(cwd, &a, cwd, &b, flags).map_err(Into::into)
    };
    ok("mkdir", fs::create_dir(p("dir")));
    ok(
        "create",
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(p("file"))
            .map(drop),
    );
    ok("write", fs::write(p("file"), n.to_le_bytes()));
    ok("symlink", symlink("target", p("sym")));
    ok("link", fs::hard_link(p("file"), p("dir").join("hard")));
    ok("setxattr", set_xattr(&p("file"), true));
    ok("removexattr", set_xattr(&p("file"), false));
    ok("rename", fs::rename(p("sym"), p("dir").join("sym")));
    ok("write", fs::write(p("victim"), b"victim"));
    ok("rename over", fs::rename(p("file"), p("victim")));
    ok("exchange", exchange(p("victim"), p("dir").join("sym")));
    ok("mkdir", fs::create_dir(p("over")));
    ok("rename over a directory", fs::rename(p("dir"), p("over")));
    ok(
        "mkfifo",
        nix::unistd::mkfifo(&p("fifo"), nix::sys::stat::Mode::S_IRWXU).map_err(Into::into),
    );
    ok("unlink", fs::remove_file(p("fifo")));
    ok("unlink", fs::remove_file(p("victim"))); // the symbolic link, since the exchange
    ok("unlink one of two", fs::remove_file(p("over").join("hard")));
    let kept = running.ok("read", fs::read(p("over").join("sym")));
    assert_eq!(kept, n.to_le_bytes(), "round {n}");
    if !n.is_multiple_of(4) {
        ok("unlink", fs::remove_file(p("over").join("sym")));
        ok("rmdir", fs::remove_dir(p("over")));
    }
}

fn set_xattr(path: &Path, create: bool) -> std::io::Result<()> {
    let path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    let (name, value) = (c"trusted.once", b"1");
    // SAFETY: strings are NUL-terminated, the value is readable for its length.
    let ret = unsafe {
        if create {
            let flags = libc::XATTR_CREATE;
            libc::setxattr(
                path.as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                1,
                flags,
            )
        } else {
            libc::removexattr(path.as_ptr(), name.as_ptr())
        }
    };
    nix::errno::Errno::result(ret).map(drop).map_err(Into::into)
}

fn changes_take_effect_once(kind: Kind, options: &[&str], workers: u64, kills: u64) -> bool {
    let Some(served) = Served::start(kind, options) else {
        return true;
    };
    let mut random = Random::new("changes_take_effect_once");
    let rounds = AtomicU64::new(0);
    let conclusive = kill_during(&served, kills, &mut random, |running| {
        std::thread::scope(|scope| {
            for worker in 0..workers {
                let dir = served.mnt().join(format!("worker{worker}"));
                let rounds = &rounds;
                scope.spawn(move || {
                    let _end = SetOnDrop(&running.stop);
                    running.ok("mkdir", fs::create_dir(&dir));
                    let mut n = 0;
                    while running.go_on() {
                        round(&dir, n, running);
                        n += 1;
                    }
                    rounds.fetch_add(n, Ordering::Relaxed);
                    // What must be left: every fourth round kept its directory with one file.
                    let mut names: Vec<_> = running
                        .ok("readdir", fs::read_dir(&dir))
                        .map(|e| e.unwrap().file_name().into_string().unwrap())
                        .collect();
                    names.sort();
                    let mut want: Vec<_> = (0..n).step_by(4).map(|n| format!("over{n}")).collect();
                    want.sort();
                    assert_eq!(names, want, "worker {worker} after {n} rounds");
                });
            }
        });
    });
    if !conclusive {
        return false;
    }
    assert_eq!(
        snapshot::of(&served.mnt()),
        visible(&served.back()),
        "{kind:?}"
    );
    eprintln!("{kind:?} {options:?}: {} rounds", rounds.into_inner());
    let scratch = served.unmount();
    assert!(!scratch.path().join(".fuse-restart-graveyard").exists());
    true
}

/// The backing's tree as the mount shows it.
fn visible(back: &Path) -> String {
    let shown: Vec<String> = snapshot::of(back)
        .lines()
        .filter(|l| !l.starts_with("\".fuse-restart-graveyard"))
        .map(str::to_owned)
        .collect();
    let root = fs::metadata(back).unwrap().nlink();
    shown.join("\n").replacen(
        &format!("links {root} "),
        &format!("links {} ", root - 1),
        1,
    )
}

#[test]
fn changes_take_effect_once_on_tmpfs() {
    conclusively(|| changes_take_effect_once(Kind::Tmpfs, &[], 1, 40));
}

#[test]
fn changes_take_effect_once_on_ext4_with_several_workers() {
    conclusively(|| changes_take_effect_once(Kind::Ext4, &["--threads", "4"], 4, 40));
}

#[test]
fn changes_take_effect_once_without_any_caching_of_names() {
    conclusively(|| {
        changes_take_effect_once(Kind::Tmpfs, &["--timeout", "0", "--threads", "2"], 2, 30)
    });
}

#[test]
fn what_is_open_stays_usable() {
    for kind in KINDS {
        let Some(served) = Served::start(kind, &[]) else {
            continue;
        };
        let mnt = served.mnt();
        let create = |name: &str| {
            let mut options = OpenOptions::new();
            let mut file = options
                .read(true)
                .write(true)
                .create_new(true)
                .open(mnt.join(name))
                .unwrap();
            file.write_all(name.as_bytes()).unwrap();
            file
        };
        // A file with a name, one without, one that was overwritten, one that lost one of two names.
        let mut named = create("named");
        let mut unlinked = create("unlinked");
        fs::remove_file(mnt.join("unlinked")).unwrap();
        let mut overwritten = create("overwritten");
        create("winner");
        fs::rename(mnt.join("winner"), mnt.join("overwritten")).unwrap();
        let linked = create("linked");
        fs::hard_link(mnt.join("linked"), mnt.join("linked2")).unwrap();
        fs::remove_file(mnt.join("linked")).unwrap();
        let mut append = OpenOptions::new()
            .append(true)
            .open(mnt.join("named"))
            .unwrap();
        fs::create_dir(mnt.join("removed")).unwrap();
        let removed = File::open(mnt.join("removed")).unwrap();
        fs::remove_dir(mnt.join("removed")).unwrap();
        for dir in ["victim", "mover"] {
            fs::create_dir(mnt.join(dir)).unwrap();
        }
        let victim = File::open(mnt.join("victim")).unwrap();
        fs::rename(mnt.join("mover"), mnt.join("victim")).unwrap();

        for n in 1..=3 {
            served.crash_and_wait();
            for (file, name) in [
                (&mut named, "named"),
                (&mut unlinked, "unlinked"),
                (&mut overwritten, "overwritten"),
            ] {
                file.seek(SeekFrom::End(0)).unwrap();
                write!(file, " {n}").unwrap_or_else(|e| panic!("{kind:?} {name} {n}: {e}"));
                let mut text = String::new();
                file.rewind().unwrap();
                file.read_to_string(&mut text).unwrap();
                let want: String = (1..=n).map(|i| format!(" {i}")).collect();
                let text = text.replace('+', "");
                assert_eq!(text, format!("{name}{want}"), "{kind:?} after {n} crashes");
            }
            append.write_all(b"+").unwrap();
            let links = [&named, &unlinked, &overwritten, &linked, &removed, &victim]
                .map(|f| f.metadata().unwrap().nlink());
            assert_eq!(links, [1, 0, 0, 1, 0, 0], "{kind:?} after {n} crashes");
        }
        assert_eq!(fs::read(mnt.join("overwritten")).unwrap(), b"winner");
        assert_eq!(fs::read(mnt.join("named")).unwrap(), b"named 1+ 2+ 3+");
        drop((unlinked, overwritten, removed, victim));
        let yard = served.back().join(".fuse-restart-graveyard");
        wait_for("the graves to be emptied", || {
            (fs::read_dir(&yard).unwrap().count() == 0).then_some(())
        });
    }
}

#[test]
fn a_directory_stream_goes_on() {
    for kind in KINDS {
        let Some(served) = Served::start(kind, &[]) else {
            continue;
        };
        let dir = served.mnt().join("dir");
        fs::create_dir(&dir).unwrap();
        for i in 0..2000 {
            fs::write(dir.join(format!("{i:060}")), b"").unwrap();
        }
        let mut names = Vec::new();
        let mut crashes = 0;
        for entry in fs::read_dir(&dir).unwrap() {
            names.push(entry.unwrap().file_name());
            assert!(names.len() <= 2000, "{kind:?}: it never ends");
            if names.len() % 500 == 250 {
                served.crash_and_wait();
                crashes += 1;
            }
        }
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!((all, names.len(), crashes), (2000, 2000, 4), "{kind:?}");
    }
}

/// Writes a file in blocks of odd sizes while the server is killed, and reads it back.
fn data_survives(options: &[&str]) -> bool {
    let Some(served) = Served::start(Kind::Ext4, options) else {
        return true;
    };
    let mut random = Random::new("data_survives");
    let path = served.mnt().join("data");
    let byte = |at: usize| (at * 31 + at / 977) as u8;
    let written = AtomicU64::new(0);
    let conclusive = kill_during(&served, 25, &mut random, |running| {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        let mut at = 0;
        while running.go_on() {
            // Stays below what the scratch file system holds.
            let size = 1 + (at * 7) % 9000;
            let block: Vec<u8> = (at..at + size).map(byte).collect();
            running.ok("write", file.write_all_at(&block, at as u64));
            let mut back = vec![0; size];
            running.ok("read", file.read_exact_at(&mut back, at as u64));
            assert_eq!(block, back, "at {at}");
            at += size;
            if running.steps.load(Ordering::Relaxed) % 64 == 0 {
                running.ok("fsync", file.sync_all());
            }
            if at > 32 << 20 {
                at = 0;
            }
            written.fetch_max(at as u64, Ordering::Relaxed);
        }
        running.ok("fsync", file.sync_all());
    });
    if !conclusive {
        return false;
    }
    let size = written.into_inner() as usize;
    for place in [served.mnt(), served.back()] {
        let content = fs::read(place.join("data")).unwrap();
        assert!(content.len() >= size);
        let wrong = content.iter().enumerate().find(|(at, b)| **b != byte(*at));
        assert_eq!(wrong, None, "{options:?} in {}", place.display());
    }
    true
}

/// The offset of an append is the kernel's: written again, it lands where it landed before.
fn appends_are_not_repeated(options: &[&str]) -> bool {
    let Some(served) = Served::start(Kind::Tmpfs, options) else {
        return true;
    };
    let mut random = Random::new("appends_are_not_repeated");
    let path = served.mnt().join("log");
    let lines = AtomicU64::new(0);
    let conclusive = kill_during(&served, 30, &mut random, |running| {
        let mut options = OpenOptions::new();
        let mut file = running.ok("create", options.append(true).create(true).open(&path));
        while running.go_on() {
            let n = lines.load(Ordering::Relaxed);
            running.ok("append", writeln!(file, "line {n}"));
            lines.store(n + 1, Ordering::Relaxed);
        }
        running.ok("fsync", file.sync_all());
    });
    if !conclusive {
        return false;
    }
    let want: String = (0..lines.into_inner())
        .map(|n| format!("line {n}\n"))
        .collect();
    let got = fs::read_to_string(served.back().join("log")).unwrap();
    let differ = got
        .lines()
        .zip(want.lines())
        .find(|(got, want)| got != want);
    assert_eq!(differ, None);
    assert_eq!(got.len(), want.len());
    true
}

#[test]
fn appends_are_not_repeated_written_through() {
    conclusively(|| appends_are_not_repeated(&[]));
}

#[test]
fn appends_are_not_repeated_written_back() {
    conclusively(|| appends_are_not_repeated(&["--writeback"]));
}

#[test]
fn data_survives_written_through() {
    conclusively(|| data_survives(&[]));
}

#[test]
fn data_survives_written_back() {
    conclusively(|| data_survives(&["--writeback"]));
}

#[test]
fn a_program_runs_from_the_mount_across_a_crash() {
    let Some(served) = Served::start(Kind::Tmpfs, &[]) else {
        return;
    };
    let program = served.mnt().join("cat");
    fs::copy("/bin/cat", &program).unwrap();
    let mut child = std::process::Command::new(&program)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    served.crash_and_wait();
    fs::remove_file(&program).unwrap();
    served.crash_and_wait();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"still here")
        .unwrap();
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success());
    assert_eq!(out.stdout, b"still here");
}

/// The last number that the server wrote before `what`, written after the `nth` line with it.
pub fn said(served: &Served, what: &str, nth: usize) -> u64 {
    let line = wait_for(what, || {
        let text = served.stderr();
        text.lines()
            .filter(|l| l.contains(what))
            .nth(nth - 1)
            .map(str::to_owned)
    });
    let before = line.split(what).next().unwrap();
    let number = before.rsplit(' ').find(|word| !word.is_empty()).unwrap();
    number
        .parse()
        .unwrap_or_else(|_| panic!("no number before {what:?} in {line}"))
}

#[test]
fn lookups_are_counted_as_the_kernel_counts_them() {
    for kind in KINDS {
        let Some(served) = Served::start(kind, &["--threads", "4"]) else {
            continue;
        };
        let dir = served.mnt().join("dir");
        fs::create_dir(&dir).unwrap();
        let running = Running::default();
        for n in 0..40 {
            round(&dir, n, &running);
        }
        // Held: others may drop the caches of this machine meanwhile.
        let hold = |n| {
            let path = dir.join(format!("many{n}"));
            fs::write(&path, b"").unwrap();
            let by_path = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_PATH)
                .open(path);
            by_path.unwrap()
        };
        let held: Vec<File> = (0..300).map(hold).collect();
        for _ in 0..3 {
            for entry in fs::read_dir(&dir).unwrap() {
                entry.unwrap().metadata().unwrap();
            }
        }
        served.wait_until_idle();
        served.crash_and_wait();
        // With the counts of the kernel, or with what the dead server had counted.
        let before = said(&served, " nodes in the table", 1);
        assert!(before > 300, "{kind:?}: {before} nodes");
        if served.stderr().contains("no FUSE_NOTIFY_RESTARTED") {
            eprintln!("SKIPPED: this kernel does not say its counts; only the end is compared");
        } else {
            let differed = said(&served, " were looked up another number", 1);
            assert_eq!(differed, 0, "{kind:?}: {}", served.stderr());
        }
        drop(held);
        // When the kernel has forgotten everything, so has the server: nothing is counted twice.
        // (It need not forget at the first time what was used a moment ago.)
        let forgotten = (2..12).any(|n| {
            fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
            served.wait_until_idle();
            served.crash_and_wait();
            said(&served, " nodes in the table", n) == 1
        });
        assert!(forgotten, "{kind:?}: {}", served.stderr());
    }
}
