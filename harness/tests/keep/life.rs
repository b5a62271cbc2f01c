// SPDX-License-Identifier: GPL-2.0
//! The keeper's life with servers that do not even speak FUSE: order of events, signals, remains, fresh mounts.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};

use crate::keeper::{alive, is_mounted, wait_for, Keeper, BINARY};
use nix::mount::{umount2, MntFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

fn pid_of(event: &serde_json::Value) -> i32 {
    event["pid"].as_i64().unwrap() as i32
}

fn sigkill(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

#[test]
fn a_term_unmounts_and_stops_the_server() {
    crate::skip_if_impossible!();
    let mut keeper = Keeper::start(&[], &["sleep", "1000"]);
    let server = pid_of(&keeper.event("started", 1));
    assert!(is_mounted(&keeper.mountpoint()));
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
    assert!(!is_mounted(&keeper.mountpoint()));
    assert!(!alive(server));
    assert_eq!(keeper.event("unmounted", 1)["how"], "clean");
}

#[test]
fn a_server_that_dies_before_init_gets_a_fresh_mount() {
    crate::skip_if_impossible!();
    let mut keeper = Keeper::start(&[], &["sleep", "1000"]);
    let first = pid_of(&keeper.event("started", 1));
    // Waits for an answer that will never come, and must be told so.
    let mut waiter = Command::new("stat")
        .arg(keeper.mountpoint().join("x"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let asleep = || {
        fs::read_to_string(format!("/proc/{}/wchan", waiter.id())).is_ok_and(|w| w.contains("fuse"))
    };
    wait_for("somebody to wait in the mount", || asleep().then_some(()));
    sigkill(first);
    keeper.event("fresh_mount", 1);
    assert!(!waiter.wait().unwrap().success());
    keeper.event("started", 2);
    assert!(is_mounted(&keeper.mountpoint()));
    assert_eq!(
        keeper.names()[..7],
        [
            "mounted",
            "started",
            "died",
            "cleared",
            "fresh_mount",
            "waiting",
            "started"
        ]
    );
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
}

#[test]
fn nothing_of_the_dead_instance_is_alive_when_the_next_one_starts() {
    crate::skip_if_impossible!();
    // One child in the server's group, one that left it, one whose parent is dead already; each says its pid.
    let script = r#"
        sleep 1000 & echo $! >> "$0"
        setsid sleep 1000 & echo $! >> "$0"
        sh -c 'setsid sleep 1000 & echo $!' >> "$0"
        echo done >> "$0"
        exec sleep 1000"#;
    let pids = tempfile::NamedTempFile::new().unwrap();
    let mut keeper = Keeper::start(&[], &["sh", "-c", script, pids.path().to_str().unwrap()]);
    let said = || fs::read_to_string(pids.path()).unwrap();
    wait_for("the server's children", || {
        said().contains("done").then_some(())
    });
    let children: Vec<i32> = said().lines().take(3).map(|l| l.parse().unwrap()).collect();
    assert!(children.iter().all(|p| alive(*p)), "{children:?}");
    let server = pid_of(&keeper.event("started", 1));
    if keeper.stderr().contains("by cgroup") {
        let cgroup = fs::read_to_string(format!("/proc/{server}/cgroup")).unwrap();
        let ours = format!("/fuse-restart-{}-1", keeper.child.id());
        assert!(
            cgroup
                .lines()
                .any(|l| l.starts_with("0::") && l.ends_with(&ours)),
            "{cgroup}"
        );
    }
    sigkill(server);
    keeper.event("cleared", 1);
    let left: Vec<_> = children.iter().filter(|p| alive(**p)).collect();
    assert!(left.is_empty(), "cleared, but {left:?} live");
    keeper.event("started", 2);
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
}

#[test]
fn a_hangup_is_a_planned_restart() {
    crate::skip_if_impossible!();
    // No restart may fail at all here: a planned one is no failure.
    let mut keeper = Keeper::start(&["--max-restarts", "0"], &["sleep", "1000"]);
    for n in 1..=3 {
        let before = pid_of(&keeper.event("started", n));
        keeper.signal(Signal::SIGHUP);
        assert_ne!(pid_of(&keeper.event("started", n + 1)), before);
        assert!(!alive(before));
    }
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
}

#[test]
fn who_is_to_follow_is_tried_first() {
    crate::skip_if_impossible!();
    let dir = tempfile::tempdir().unwrap();
    let verdict = dir.path().join("verdict");
    // Says which server it is about, waits for a verdict, and has no descriptor beyond the usual three.
    let test = format!(
        "echo $FUSE_RESTART_SERVER > {0}.pid; ls /proc/self/fd > {0}.fds; \
         until test -e {0}; do sleep 0.05; done; exit $(cat {0})",
        verdict.display()
    );
    let mut keeper = Keeper::start(
        &["--max-restarts", "0", "--upgrade-test", &test],
        &["sleep", "1000"],
    );
    let server = pid_of(&keeper.event("started", 1));
    for (code, passes) in [("7", false), ("0", true)] {
        let _ = fs::remove_file(&verdict);
        let _ = fs::remove_file(verdict.with_extension("pid"));
        keeper.signal(Signal::SIGHUP);
        let about = wait_for("the test to begin", || {
            let text = fs::read_to_string(verdict.with_extension("pid")).ok()?;
            text.trim().parse::<i32>().ok()
        });
        assert!(about == server && alive(server));
        // A second one changes nothing.
        keeper.signal(Signal::SIGHUP);
        fs::write(verdict.with_extension("new"), code).unwrap();
        fs::rename(verdict.with_extension("new"), &verdict).unwrap();
        let tried = keeper.event("tried", if passes { 2 } else { 1 });
        assert_eq!(tried["passed"], passes, "{tried}");
        if passes {
            assert_ne!(pid_of(&keeper.event("started", 2)), server);
            assert!(!alive(server));
        } else {
            assert!(alive(server));
            assert!(keeper.stderr().contains("goes on"), "{}", keeper.stderr());
        }
    }
    // `ls` has its directory open.
    let fds = fs::read_to_string(verdict.with_extension("fds")).unwrap();
    assert_eq!(fds.lines().count(), 4, "{fds}");
    // The one that is being tried when the keeper ends does not stay.
    fs::remove_file(&verdict).unwrap();
    fs::remove_file(verdict.with_extension("pid")).unwrap();
    keeper.signal(Signal::SIGHUP);
    wait_for("the last test to begin", || {
        fs::read_to_string(verdict.with_extension("pid")).ok()
    });
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
}

#[test]
fn restarts_can_be_held_back() {
    crate::skip_if_impossible!();
    let mut keeper = Keeper::start(&[], &["sleep", "1000"]);
    let server = pid_of(&keeper.event("started", 1));
    keeper.signal(Signal::SIGUSR1);
    wait_for("the keeper to say so", || {
        keeper.stderr().contains("held back").then_some(())
    });
    sigkill(server);
    assert!(keeper.event("waiting", 1)["delay_ns"].is_null());
    assert_eq!(keeper.count("started"), 1);
    keeper.signal(Signal::SIGUSR2);
    keeper.event("started", 2);
    // And a stop while held back must not hang.
    keeper.signal(Signal::SIGUSR1);
    wait_for("the keeper to say so", || {
        (keeper.stderr().matches("held back").count() == 2).then_some(())
    });
    sigkill(pid_of(&keeper.event("started", 2)));
    keeper.event("waiting", 2);
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
}

#[test]
fn unmounted_from_outside_is_a_clean_end() {
    crate::skip_if_impossible!();
    // `cat` reads the device as a server does, and ends on ENODEV.
    let mut keeper = Keeper::start(&[], &["sh", "-c", "cat <&3 >/dev/null; exit 0"]);
    keeper.event("started", 1);
    umount2(&keeper.mountpoint(), MntFlags::empty()).unwrap();
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
    assert_eq!(keeper.event("unmounted", 1)["how"], "from outside");
}

/// Detached by somebody, kept by an open file, and then something else is mounted there, which is not the keeper's.
#[test]
fn what_is_mounted_in_its_place_stays() {
    crate::skip_if_impossible!();
    for asked in [true, false] {
        let mut keeper = Keeper::start(&[], &["sleep", "1000"]);
        let server = pid_of(&keeper.event("started", 1));
        let mountpoint = keeper.mountpoint();
        let held = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&mountpoint)
            .unwrap();
        umount2(&mountpoint, MntFlags::MNT_DETACH).unwrap();
        let mut other = Keeper::start_on(&mountpoint, &["sleep", "1000"]);
        let others = pid_of(&other.event("started", 1));
        if asked {
            keeper.signal(Signal::SIGTERM);
            assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
        } else {
            // It was never used, so a fresh mount is to take its place, which is not free.
            sigkill(server);
            assert_eq!(keeper.wait(), 1, "{}", keeper.stderr());
        }
        assert_eq!(keeper.event("unmounted", 1)["how"], "from outside");
        assert!(!alive(server));
        assert!(is_mounted(&mountpoint) && alive(others));
        let status = Command::new(BINARY).arg("status").arg(&mountpoint).output();
        let status = String::from_utf8(status.unwrap().stdout).unwrap();
        assert!(status.contains(&others.to_string()), "{status}");
        other.signal(Signal::SIGTERM);
        assert_eq!(other.wait(), 0, "{}", other.stderr());
        assert!(!is_mounted(&mountpoint) && !alive(others));
        drop(held);
    }
}

/// The number of a connection is free again when its mount has gone, and the next one gets it. (A server would notice the end.)
#[test]
fn what_is_mounted_in_its_place_stays_though_it_has_its_number() {
    crate::skip_if_impossible!();
    for asked in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("server");
        std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
        let options = ["--max-restarts", "1"];
        let mut keeper = Keeper::start(&options, &[program.to_str().unwrap(), "1000"]);
        let server = pid_of(&keeper.event("started", 1));
        let mountpoint = keeper.mountpoint();
        keeper.signal(Signal::SIGUSR1);
        wait_for("the keeper to say so", || {
            keeper.stderr().contains("held back").then_some(())
        });
        sigkill(server);
        keeper.event("waiting", 1);
        umount2(&mountpoint, MntFlags::empty()).unwrap();
        let mut other = Keeper::start_on(&mountpoint, &["sleep", "1000"]);
        let others = pid_of(&other.event("started", 1));
        if asked {
            keeper.signal(Signal::SIGTERM);
        } else {
            // It cannot be started again, and the keeper gives up.
            fs::remove_file(&program).unwrap();
            keeper.signal(Signal::SIGUSR2);
        }
        let ended = keeper.wait();
        assert_eq!(ended, i32::from(!asked), "{}", keeper.stderr());
        // What aborts the other's connection ends it.
        assert!(
            is_mounted(&mountpoint) && alive(others),
            "{}",
            keeper.stderr()
        );
        assert_eq!(
            other.names().last().unwrap(),
            "started",
            "{:?}",
            other.names()
        );
        other.signal(Signal::SIGTERM);
        assert_eq!(other.wait(), 0, "{}", other.stderr());
        assert_eq!(other.event("unmounted", 1)["how"], "clean");
    }
}

#[test]
fn what_is_mounted_over_it_stays() {
    crate::skip_if_impossible!();
    let mut keeper = Keeper::start(&[], &["sleep", "1000"]);
    let server = pid_of(&keeper.event("started", 1));
    let mountpoint = keeper.mountpoint();
    // mount(2) and umount2(2) look at the mount, and do not ask its server.
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(
        Some("over"),
        &mountpoint,
        Some("tmpfs"),
        flags,
        None::<&str>,
    )
    .unwrap();
    keeper.signal(Signal::SIGTERM);
    keeper.event("busy", 1);
    assert!(alive(server), "{}", keeper.stderr());
    umount2(&mountpoint, MntFlags::empty()).unwrap();
    assert!(is_mounted(&mountpoint), "its own is still there");
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
    assert!(!is_mounted(&mountpoint) && !alive(server));
}

#[test]
fn a_busy_mount_names_its_holders_and_goes_on() {
    crate::skip_if_impossible!();
    let mut keeper = Keeper::start(&[], &["sleep", "1000"]);
    let server = pid_of(&keeper.event("started", 1));
    // O_PATH asks the server nothing.
    let held = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(keeper.mountpoint())
        .unwrap();
    keeper.signal(Signal::SIGTERM);
    let busy = keeper.event("busy", 1);
    let us = std::process::id();
    assert!(
        busy["pids"].as_array().unwrap().contains(&us.into()),
        "{busy}"
    );
    wait_for("the message", || {
        keeper.stderr().contains(&format!("{us} (")).then_some(())
    });
    assert!(
        is_mounted(&keeper.mountpoint()) && alive(server),
        "it must go on serving"
    );
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
    assert_eq!(keeper.event("unmounted", 1)["how"], "lazily");
    assert!(!is_mounted(&keeper.mountpoint()) && !alive(server));
    drop(held);
}

#[test]
fn a_server_that_ignores_the_polite_way_is_killed() {
    crate::skip_if_impossible!();
    let mut keeper = Keeper::start(
        &[],
        &["sh", "-c", "trap '' TERM; while :; do sleep 1; done"],
    );
    let server = pid_of(&keeper.event("started", 1));
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
    assert!(!alive(server) && !is_mounted(&keeper.mountpoint()));
}

#[test]
fn closed_pipes_do_not_stop_it() {
    crate::skip_if_impossible!();
    let mut keeper = Keeper::start_with(&[], &["sleep", "1000"], |command| {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
    });
    drop(keeper.child.stdout.take());
    drop(keeper.child.stderr.take());
    for n in 1..=3 {
        sigkill(pid_of(&keeper.event("started", n)));
    }
    keeper.event("started", 4);
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0);
}

#[test]
fn status_tells_what_the_keeper_does() {
    crate::skip_if_impossible!();
    let mut keeper = Keeper::start(&[], &["sleep", "1000"]);
    let status = |mountpoint: &std::path::Path| {
        Command::new(BINARY)
            .args(["status", "--json"])
            .arg(mountpoint)
            .output()
            .unwrap()
    };
    sigkill(pid_of(&keeper.event("started", 1)));
    let server = pid_of(&keeper.event("started", 2));
    let seen = wait_for("the status of the second instance", || {
        let output = status(&keeper.mountpoint());
        let value: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        (value["server_pid"] == server).then_some(value)
    });
    assert_eq!(seen["restarts"], 1);
    assert_eq!(seen["last_exit"], "was killed by SIGKILL");
    assert_eq!(seen["keeper_pid"], keeper.child.id());
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
    let output = status(&keeper.mountpoint());
    assert_ne!(output.status.code(), Some(0));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("nothing is mounted on"),
        "{output:?}"
    );
}

#[test]
fn descriptors_and_processes_do_not_pile_up() {
    crate::skip_if_impossible!();
    let mut keeper = Keeper::start(&["--stable-after", "0"], &["sleep", "1000"]);
    let descriptors = |k: &Keeper| {
        fs::read_dir(format!("/proc/{}/fd", k.child.id()))
            .unwrap()
            .count()
    };
    sigkill(pid_of(&keeper.event("started", 1)));
    keeper.event("started", 2);
    let settled = |k: &Keeper, n: usize| {
        wait_for("the descriptors of the start to be settled", || {
            (descriptors(k) <= n).then_some(())
        })
    };
    let before = descriptors(&keeper);
    for n in 2..=20 {
        sigkill(pid_of(&keeper.event("started", n)));
    }
    keeper.event("started", 21);
    settled(&keeper, before);
    let servers: Vec<i32> = (1..=20)
        .map(|n| pid_of(&keeper.event("started", n)))
        .collect();
    let left: Vec<_> = servers.iter().filter(|p| alive(**p)).collect();
    assert!(left.is_empty(), "not reaped: {left:?}");
    keeper.signal(Signal::SIGTERM);
    assert_eq!(keeper.wait(), 0, "{}", keeper.stderr());
}
