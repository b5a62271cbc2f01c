// SPDX-License-Identifier: GPL-2.0
//! `fuse-restart serve mem`: what it holds is nowhere but in the memfd, and nothing of it is lost.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::crash::{conclusively, kill_during, round, said, Random};
use crate::served::{alone, Served, BINARY};
use crate::snapshot;

fn start(options: &[&str]) -> Option<Served> {
    let words = [BINARY, "serve", "mem"].iter().chain(options);
    Served::other(&words.map(OsStr::new).collect::<Vec<_>>())
}

fn changes_take_effect_once() -> bool {
    const KILLS: u64 = 40;
    let Some(served) = start(&["--threads", "4", "--size", "64"]) else {
        return true;
    };
    let mut random = Random::new("mem, changes_take_effect_once");
    let rounds = AtomicU64::new(0);
    let conclusive = kill_during(&served, KILLS, &mut random, |running| {
        std::thread::scope(|scope| {
            for worker in 0..3 {
                let dir = served.mnt().join(format!("worker{worker}"));
                let rounds = &rounds;
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
                    rounds.fetch_add(n, Ordering::Relaxed);
                    // What must be left: every fourth round kept its directory with one file.
                    let entries = running.ok("readdir", fs::read_dir(&dir));
                    let mut names: Vec<_> = entries
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
    eprintln!("{} rounds", rounds.into_inner());
    let before = snapshot::of(&served.mnt());
    // One RESTARTED takes the kernel's counts over; the next ones compare.
    for n in 1..=3 {
        served.wait_until_idle();
        served.crash_and_wait();
        assert_eq!(snapshot::of(&served.mnt()), before);
        if !served.stderr().contains("no FUSE_NOTIFY_RESTARTED") {
            let differed = said(
                &served,
                " were looked up another number",
                KILLS as usize + n,
            );
            assert_eq!(differed, 0, "{n}: {}", served.stderr());
        }
    }
    true
}

#[test]
fn mem_changes_take_effect_once() {
    conclusively(changes_take_effect_once);
}

fn data_survives() -> bool {
    let Some(served) = start(&[]) else {
        return true;
    };
    let mut random = Random::new("mem, data_survives");
    let path = served.mnt().join("data");
    let end = AtomicU64::new(0);
    let byte = |at: u64| (at * 31 + at / 977) as u8;
    let conclusive = kill_during(&served, 30, &mut random, |running| {
        let file = OpenOptions::new().append(true).create_new(true).open(&path);
        let mut file = running.ok("create", file);
        let mut at = 0;
        while running.go_on() && at < 32 << 20 {
            let data: Vec<u8> = (at..at + 1 + at * 7 % 9000).map(byte).collect();
            running.ok("write", file.write_all(&data));
            at += data.len() as u64;
        }
        end.store(at, Ordering::Relaxed);
        while running.go_on() {
            running.ok("fsync", file.sync_all());
        }
    });
    if !conclusive {
        return false;
    }
    // Past the page cache: what the server has.
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)
        .unwrap();
    let end = end.into_inner();
    assert_eq!(direct.metadata().unwrap().len(), end);
    let mut data = vec![0; end as usize];
    direct.read_exact_at(&mut data, 0).unwrap();
    let wrong = (0..end).find(|at| data[*at as usize] != byte(*at));
    assert_eq!(wrong, None, "of {end} bytes");
    true
}

#[test]
fn mem_data_survives() {
    conclusively(data_survives);
}

#[test]
fn mem_keeps_what_is_open_and_has_no_name() {
    let Some(served) = start(&[]) else { return };
    let mnt = served.mnt();
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create_new(true);
    let file = options.open(mnt.join("file")).unwrap();
    file.write_all_at(b"still here", 0).unwrap();
    fs::create_dir(mnt.join("dir")).unwrap();
    let dir = File::open(mnt.join("dir")).unwrap();
    fs::remove_file(mnt.join("file")).unwrap();
    fs::remove_dir(mnt.join("dir")).unwrap();
    for n in 0..3_u8 {
        served.crash();
        file.write_all_at(&[b'0' + n], 10 + u64::from(n)).unwrap();
        let mut text = vec![0; 11 + usize::from(n)];
        file.read_exact_at(&mut text, 0).unwrap();
        assert_eq!(text, [b"still here", &b"012"[..=usize::from(n)]].concat());
        let links = [&file, &dir].map(|file| file.metadata().unwrap().nlink());
        assert_eq!(links, [0, 0]);
    }
}

#[test]
fn mem_is_bounded() {
    let Some(served) = start(&["--size", "4"]) else {
        return;
    };
    let path = served.mnt().join("file");
    let mut written = Vec::new();
    for n in 0..2 {
        let mut file = File::create(&path).unwrap();
        let mut bytes = 0_u64;
        let error = loop {
            match file.write(&[n; 64 << 10]) {
                Ok(count) => bytes += count as u64,
                Err(e) => break e,
            }
        };
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(file.metadata().unwrap().len(), bytes);
        drop(file);
        served.crash_and_wait();
        assert_eq!(fs::read(&path).unwrap(), vec![n; bytes as usize]);
        fs::remove_file(&path).unwrap();
        served.wait_until_idle();
        written.push(bytes);
    }
    assert!(
        written[0] == written[1] && (2 << 20..4 << 20).contains(&written[0]),
        "{written:?}"
    );
}

/// Root makes a device node that anybody may open; everything else is done by nobody, in a user namespace of its own.
const UNPRIVILEGED: &str = r#"
set -e
mknod "$1/fuse" c 10 229
chmod 666 "$1/fuse"
mount --bind "$1/fuse" /dev/fuse
exec setpriv --reuid 65534 --regid 65534 --clear-groups unshare -U -r -m sh -c '
    set -e
    "$2" keep --max-restarts 100 --stable-after 1 --json "$1/events" --mountpoint "$1/mnt" -- \
        "$2" serve mem --size 16 &
    keeper=$!
    # Who fails must not leave it behind, with the output that the test waits for the end of.
    trap "kill $keeper" EXIT
    n=0
    # Other tests have their mounts in this namespace, too.
    until grep -q " $1/mnt .* - fuse.fuse-restart" /proc/self/mountinfo; do
        kill -0 $keeper
        sleep 0.05
    done
    while [ $n -lt 8 ]; do
        mkdir "$1/mnt/dir$n"
        echo $n > "$1/mnt/file$n"
        ln "$1/mnt/file$n" "$1/mnt/dir$n/link"
        kill -9 $(grep started "$1/events" | tail -n 1 | sed "s/.*\"pid\":\([0-9]*\).*/\1/")
        n=$((n + 1))
    done
    cat "$1"/mnt/dir*/link > "$1/result"
    stat -c %h "$1"/mnt/file* >> "$1/result"
    trap - EXIT
    kill $keeper
    wait $keeper
' sh "$1" "$2"
"#;

#[test]
fn mem_serves_without_privileges() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root, to give its rights away");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    fs::create_dir(dir.path().join("mnt")).unwrap();
    fs::set_permissions(dir.path().join("mnt"), PermissionsExt::from_mode(0o777)).unwrap();
    let own = dir.path().join("fuse-restart");
    fs::copy(BINARY, &own).unwrap();
    let mounts = alone();
    if !can_unshare(dir.path()) {
        return;
    }
    let out = Command::new("unshare")
        .args([
            "-m",
            "--propagation",
            "private",
            "sh",
            "-c",
            UNPRIVILEGED,
            "sh",
        ])
        .args([dir.path(), &own])
        .output();
    drop(mounts);
    let out = out.unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{}: {said}", out.status);
    let result = fs::read_to_string(dir.path().join("result")).unwrap();
    let want: String = (0..8).map(|n| format!("{n}\n")).collect();
    assert_eq!(result, want + &"2\n".repeat(8), "{said}");
}

/// Whether nobody may have a user namespace here, and tools for it are there.
fn can_unshare(dir: &Path) -> bool {
    let ids = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
    let tried = Command::new("setpriv")
        .args(ids)
        .args(["unshare", "-U", "-r", "-m", "true"])
        .current_dir(dir)
        .output();
    let can = tried.is_ok_and(|out| out.status.success());
    if !can {
        eprintln!("SKIPPED: no user namespaces here, or no setpriv(1)");
    }
    can
}
