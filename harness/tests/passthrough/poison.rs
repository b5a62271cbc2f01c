// SPDX-License-Identifier: GPL-2.0
//! Requests that kill the server each time, and requests that it never answers (cargo feature `crash-points`).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::served::{wait_for, Kind, Scratch, Served, BINARY};

fn served(dir: &Path, keeper: &[&str]) -> Option<Served> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return None;
    }
    let variables = [("FUSE_RESTART_POISON", dir.to_str().unwrap())];
    Some(Served::kept(
        Scratch::new(Kind::Tmpfs),
        keeper,
        &variables,
        &["--timeout", "0"],
    ))
}

fn is_eio(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EIO)
}

/// Runs `poison` beside four applications, each of which makes, reads and removes files of its own; all that they do
/// must succeed. They go on until each has done something after `poison` was through.
fn beside_four_others<T: Send>(served: &Served, poison: impl FnOnce() -> T + Send) -> T {
    let over = AtomicBool::new(false);
    let done: [_; 4] = std::array::from_fn(|_| AtomicU64::new(0));
    std::thread::scope(|scope| {
        let (over, done) = (&over, &done);
        let apps: Vec<_> = (0..4)
            .map(|app| {
                let dir = served.mnt().join(format!("app{app}"));
                scope.spawn(move || {
                    fs::create_dir(&dir).unwrap();
                    let mut rounds_after = 0;
                    while rounds_after < 3 {
                        rounds_after += u32::from(over.load(Ordering::Relaxed));
                        let n = done[app].fetch_add(1, Ordering::Relaxed);
                        let path = dir.join(format!("file{}", n % 10));
                        fs::write(&path, format!("{app} {n}")).unwrap();
                        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{app} {n}"));
                        fs::remove_file(&path).unwrap();
                    }
                })
            })
            .collect();
        wait_for("the applications to be at work", || {
            let all = done.iter().all(|n| n.load(Ordering::Relaxed) > 5);
            (all || apps.iter().any(|a| a.is_finished())).then_some(())
        });
        let result = poison();
        over.store(true, Ordering::Relaxed);
        for app in apps {
            app.join().expect("an application noticed something");
        }
        result
    })
}

#[test]
fn a_request_that_kills_the_server_gets_eio_and_nothing_else_does() {
    let dir = tempfile::tempdir().unwrap();
    let Some(served) = served(dir.path(), &["--max-tries", "2"]) else {
        return;
    };
    let name = served.mnt().join("poison-crash");
    let error = beside_four_others(&served, || fs::metadata(name).unwrap_err());
    assert!(is_eio(&error), "{error}");
    let said = served.stderr();
    let line = said
        .lines()
        .find(|line| line.contains("it gets EIO now"))
        .expect("the log names it");
    assert!(line.contains("LOOKUP (opcode 1,"), "{line}");
    assert!(line.contains("of nodeid 1, asked by pid "), "{line}");
    let asked_by: i32 = line
        .split("asked by pid ")
        .nth(1)
        .and_then(|rest| rest.split(':').next()?.parse().ok())
        .unwrap();
    assert_eq!(asked_by, nix::unistd::gettid().as_raw(), "{line}");
    // At least one death that told nothing (others ran too), and exactly two trials.
    let starts = served.starts();
    assert!((4..=12).contains(&starts), "{starts} starts:\n{said}");
    served.unmount();
}

#[test]
fn the_server_in_memory_is_guarded_like_that_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let mut variable = std::ffi::OsString::from("FUSE_RESTART_POISON=");
    variable.push(dir.path());
    let mut words = vec![std::ffi::OsStr::new("env"), &variable];
    words.extend([BINARY, "serve", "mem", "--size", "16"].map(std::ffi::OsStr::new));
    let Some(served) = Served::other(&words) else {
        return;
    };
    let name = served.mnt().join("poison-crash");
    let error = beside_four_others(&served, || fs::metadata(name).unwrap_err());
    assert!(is_eio(&error), "{error}");
    let said = served.stderr();
    assert_eq!(refused(&said).len(), 1, "{said}");
    served.unmount();
}

#[test]
fn a_request_that_takes_its_time_to_kill_the_server_gets_eio_too() {
    let dir = tempfile::tempdir().unwrap();
    let Some(served) = served(dir.path(), &["--max-tries", "2"]) else {
        return;
    };
    let name = served.mnt().join("poison-late");
    let error = beside_four_others(&served, || fs::metadata(name).unwrap_err());
    assert!(is_eio(&error), "{error}");
    // At first the others are let in after a second, and the death tells nothing.
    let starts = served.starts();
    assert!((4..=8).contains(&starts), "{starts} starts");
    served.unmount();
}

#[test]
fn two_requests_that_kill_the_server_cost_eio_each() {
    let dir = tempfile::tempdir().unwrap();
    let Some(served) = served(dir.path(), &["--max-tries", "2"]) else {
        return;
    };
    let names = ["poison-crash-1", "poison-crash-2"].map(|n| served.mnt().join(n));
    beside_four_others(&served, || {
        std::thread::scope(|scope| {
            let asked = names
                .each_ref()
                .map(|n| scope.spawn(move || fs::metadata(n)));
            for asked in asked {
                let error = asked.join().unwrap().unwrap_err();
                assert!(is_eio(&error), "{error}");
            }
        });
    });
    let said = served.stderr();
    assert_eq!(refused(&said).len(), 2, "{said}");
    served.unmount();
}

/// The requests that the log says get EIO. It may say so again: the other request can kill the server between the line and
/// the answer.
fn refused(log: &str) -> BTreeSet<&str> {
    let lines = log.lines().filter(|l| l.contains("it gets EIO now"));
    lines
        .filter_map(|l| l.split_once(", request ")?.1.split_once(')'))
        .map(|(id, _)| id)
        .collect()
}

#[test]
fn a_server_that_hangs_is_found_and_the_request_gets_eio_in_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let options = ["--max-tries", "2", "--hang-timeout", "2"];
    let Some(served) = served(dir.path(), &options) else {
        return;
    };
    fs::write(served.mnt().join("kept"), "as it was").unwrap();
    // As many as the server has threads, so that nobody answers any more.
    std::thread::scope(|scope| {
        let asked: Vec<_> = (0..4)
            .map(|n| {
                let name = served.mnt().join(format!("poison-hang-{n}"));
                scope.spawn(move || fs::metadata(name))
            })
            .collect();
        for asked in asked {
            let error = asked.join().unwrap().unwrap_err();
            assert!(is_eio(&error), "{error}");
        }
    });
    let kept = fs::read_to_string(served.mnt().join("kept")).unwrap();
    assert_eq!(kept, "as it was");
    let said = served.stderr();
    assert!(
        said.contains("hangs: none answered of 4 in its hands"),
        "{said}"
    );
    assert!(said.contains("waits in"), "{said}");
    served.unmount();
}

#[test]
fn a_hang_in_a_recovery_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let Some(served) = served(dir.path(), &["--hang-timeout", "2"]) else {
        return;
    };
    fs::write(served.mnt().join("kept"), "as it was").unwrap();
    fs::write(dir.path().join("hang-replay"), "").unwrap();
    served.crash();
    let kept = fs::read_to_string(served.mnt().join("kept")).unwrap();
    assert_eq!(kept, "as it was");
    if served.stderr().contains("knows no recovery") {
        return eprintln!("SKIPPED: this kernel knows no recovery, so none hangs");
    }
    let said = served.stderr();
    assert!(
        said.contains("hangs: its recovery comes no further"),
        "{said}"
    );
    assert_eq!(served.starts(), 3);
    served.unmount();
}

#[test]
fn an_idle_server_does_not_hang() {
    let dir = tempfile::tempdir().unwrap();
    let Some(served) = served(dir.path(), &["--hang-timeout", "0.2"]) else {
        return;
    };
    // Many times the limit, idle and at work.
    for _ in 0..4 {
        std::thread::sleep(std::time::Duration::from_millis(600));
        fs::write(served.mnt().join("file"), "text").unwrap();
    }
    assert_eq!(served.starts(), 1, "{}", served.stderr());
    served.unmount();
}
