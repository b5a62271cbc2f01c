// SPDX-License-Identifier: GPL-2.0
//! A keeper that is kept by another one: it may be killed, too.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::keeper::{alive, is_mounted, wait_for, Keeper, BINARY};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

/// `keep -- keep -- SERVER`; the inner keeper mounts, or says it has, on `inner_mount` of the directory.
struct Nested {
    outer: Keeper,
    /// What the inner keepers wrote, one after another.
    log: PathBuf,
}

impl Nested {
    fn start(options: &[&str], inner_mount: &str, server: &[&str]) -> Nested {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        fs::create_dir(path("back")).unwrap();
        let (mnt, log, back) = (path(inner_mount), path("within"), path("back"));
        let mut inner = vec![BINARY, "keep", "--mountpoint", &mnt, "--json", &log, "--"];
        inner.extend(server);
        inner.push(&back);
        let outer = Keeper::start_in(dir, options, &inner, |_| {});
        Nested {
            outer,
            log: log.into(),
        }
    }

    fn within(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect()
    }

    fn pid_within(&self, n: usize) -> i32 {
        let started = |e: &Value| e["event"] == "started";
        let nth = || self.within().into_iter().filter(started).nth(n - 1);
        wait_for("the inner keeper's server", nth)["pid"]
            .as_i64()
            .unwrap() as i32
    }

    fn names_within(&self) -> Vec<String> {
        let name = |e: &Value| e["event"].as_str().unwrap().to_owned();
        self.within().iter().map(name).collect()
    }

    fn inner(&self, n: usize) -> i32 {
        self.outer.event("started", n)["pid"].as_i64().unwrap() as i32
    }
}

impl Drop for Nested {
    /// A server that is not one of ours, and does not end with the mount, would outlive a test that failed.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let _ = self.outer.child.kill();
        for events in [self.outer.events(), self.within()] {
            let last = events.iter().rfind(|e| e["event"] == "started");
            if let Some(pid) = last.and_then(|e| e["pid"].as_i64()) {
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
        }
    }
}

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// The cgroup of a process, if this machine lets us have any.
fn cgroup_of(pid: i32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let own = text.lines().find_map(|l| l.strip_prefix("0::/"))?;
    own.contains("fuse-restart")
        .then(|| Path::new("/sys/fs/cgroup").join(own))
}

#[test]
fn a_keeper_may_be_killed_or_asked_to_end_and_the_mount_stays() {
    crate::skip_if_impossible!();
    let mut nested = Nested::start(
        &["--stable-after", "0"],
        "mnt",
        &[BINARY, "serve", "passthrough"],
    );
    let mnt = nested.outer.mountpoint();
    // Mounted by then.
    let group = cgroup_of(nested.inner(1));
    let path = mnt.join("file");
    let mut file = fs::File::create(&path).unwrap();
    let ends = [Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL];
    for (n, end) in (1..).zip(ends) {
        let (inner, server) = (nested.inner(n), nested.pid_within(n));
        signal(inner, end);
        // By the descriptor that was opened before, with a server that nobody in this loop has seen yet.
        file.write_all(b"x").unwrap();
        assert_ne!(nested.inner(n + 1), inner);
        assert_ne!(nested.pid_within(n + 1), server);
        assert!(!alive(server) && !alive(inner), "{end}");
        assert_eq!(fs::read(&path).unwrap(), vec![b'x'; n], "{end}");
    }
    drop(file);
    // The status is that of the keeper that nobody killed.
    let told = [
        3,
        i64::from(nested.inner(4)),
        nested.outer.child.id().into(),
    ];
    wait_for("the outer keeper's status", || {
        let status = Command::new(BINARY)
            .args(["status", "--json"])
            .arg(&mnt)
            .output();
        let status: Value = serde_json::from_slice(&status.unwrap().stdout).ok()?;
        let fields = ["restarts", "server_pid", "keeper_pid"].map(|f| status[f].as_i64());
        (fields == told.map(Some)).then_some(())
    });
    let names = nested.names_within();
    assert_eq!(names.iter().filter(|n| *n == "adopted").count(), 4);
    assert!(!names.contains(&"mounted".into()), "{names:?}");
    assert_eq!(names.iter().filter(|n| *n == "handed_back").count(), 1);
    assert_eq!(nested.outer.count("fresh_mount"), 0);
    let last = [nested.inner(4), nested.pid_within(4)];
    nested.outer.signal(Signal::SIGTERM);
    assert_eq!(nested.outer.wait(), 0, "{}", nested.outer.stderr());
    assert!(!is_mounted(&mnt));
    assert!(!last.into_iter().any(alive));
    if let Some(group) = group {
        assert!(
            !group.exists(),
            "{} of the killed keeper is left",
            group.display()
        );
    }
}

#[test]
fn a_keeper_refuses_a_mount_that_is_not_the_one_it_was_handed() {
    crate::skip_if_impossible!();
    let mut nested = Nested::start(&["--max-restarts", "0"], "back", &["sleep", "1000"]);
    assert_ne!(nested.outer.wait(), 0);
    let said = nested.outer.stderr();
    assert!(said.contains("but nothing is mounted on"), "{said}");
    assert_eq!(nested.within(), Vec::<Value>::new());
    assert!(!is_mounted(&nested.outer.mountpoint()));
}

#[test]
fn a_server_at_work_under_an_idle_keeper_does_not_hang() {
    crate::skip_if_impossible!();
    if !Path::new("/proc/self/io").exists() {
        eprintln!("SKIPPED: this kernel counts no calls (CONFIG_TASK_IO_ACCOUNTING)");
        return;
    }
    // INIT waits for its answer all the time; the inner keeper itself makes no call.
    let works = "while sleep 0.05; do echo >/dev/null; done";
    let options = ["--hang-timeout", "2", "--stable-after", "0"];
    let mut nested = Nested::start(&options, "mnt", &["sh", "-c", works]);
    let (inner, server) = (nested.inner(1), nested.pid_within(1));
    std::thread::sleep(Duration::from_secs(5));
    let said = nested.outer.stderr();
    assert_eq!(nested.outer.count("hung"), 0, "{said}");
    // Now nobody does anything, and that is one.
    signal(server, Signal::SIGSTOP);
    let hung = nested.outer.event("hung", 1);
    assert_eq!(hung["pid"], inner, "{hung}");
    assert_ne!(nested.inner(2), inner);
    assert!(!alive(server) && !alive(inner));
    nested.outer.signal(Signal::SIGTERM);
    assert_eq!(nested.outer.wait(), 0, "{}", nested.outer.stderr());
}
