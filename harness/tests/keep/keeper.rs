// SPDX-License-Identifier: GPL-2.0
//! A keeper under test: started, watched through its event log, and taken down again whatever the test did.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{umount2, MntFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

pub const BINARY: &str = env!("CARGO_BIN_EXE_fuse-restart");

/// What these tests need, or a reason why they cannot run.
pub fn missing() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root");
    }
    if fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .is_err()
    {
        return Some("needs /dev/fuse");
    }
    None
}

/// Returns from the test, loudly, where it cannot run.
#[macro_export]
macro_rules! skip_if_impossible {
    () => {
        if let Some(why) = $crate::keeper::missing() {
            eprintln!("SKIPPED {}: {why}", module_path!());
            return;
        }
    };
}

/// Waits for a condition; the time limit only ends a test that has failed.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "waited 60 s in vain for: {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().any(|l| l.split(' ').nth(4) == path.to_str())
}

/// A zombie counts: the keeper has to reap what it cleared. (Nothing but signal 0 here: reading `/proc/PID/stat` can end
/// up waiting for a dead server.)
pub fn alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None).is_ok()
}

pub struct Keeper {
    pub child: Child,
    pub dir: tempfile::TempDir,
}

impl Keeper {
    pub fn start(options: &[&str], server: &[&str]) -> Self {
        Self::start_with(options, server, |_| {})
    }

    pub fn start_with(
        options: &[&str],
        server: &[&str],
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), options, server, adjust)
    }

    /// Mounts on the directory `mnt` of `dir`, which is made.
    pub fn start_in(
        dir: tempfile::TempDir,
        options: &[&str],
        server: &[&str],
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        fs::create_dir(dir.path().join("mnt")).unwrap();
        let mountpoint = dir.path().join("mnt");
        Self::start_at(dir, &mountpoint, options, server, adjust)
    }

    /// Mounts where another one has its own.
    pub fn start_on(mountpoint: &Path, server: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::start_at(dir, mountpoint, &[], server, |_| {})
    }

    fn start_at(
        dir: tempfile::TempDir,
        mountpoint: &Path,
        options: &[&str],
        server: &[&str],
        adjust: impl FnOnce(&mut Command),
    ) -> Self {
        let stderr = fs::File::create(dir.path().join("stderr")).unwrap();
        let mut command = Command::new(BINARY);
        command.arg("keep").arg("--mountpoint").arg(mountpoint);
        command
            .arg("--json")
            .arg(dir.path().join("events"))
            .args(options)
            .arg("--")
            .args(server);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        adjust(&mut command);
        Self {
            child: command.spawn().unwrap(),
            dir,
        }
    }

    pub fn mountpoint(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    pub fn stderr(&self) -> String {
        let mut text = String::new();
        fs::File::open(self.dir.path().join("stderr"))
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        text
    }

    /// All events so far (whole lines only).
    pub fn events(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.dir.path().join("events")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect()
    }

    /// The `n`th (from 1) event of this name, once it is there.
    pub fn event(&self, name: &str, n: usize) -> Value {
        wait_for(
            &format!("event {n} of {name}; stderr:\n{}", self.stderr()),
            || {
                self.events()
                    .into_iter()
                    .filter(|e| e["event"] == name)
                    .nth(n - 1)
            },
        )
    }

    pub fn count(&self, name: &str) -> usize {
        self.events().iter().filter(|e| e["event"] == name).count()
    }

    /// The names of all events, in order.
    pub fn names(&self) -> Vec<String> {
        self.events()
            .iter()
            .map(|e| e["event"].as_str().unwrap().to_owned())
            .collect()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub fn wait(&mut self) -> i32 {
        let status = wait_for("the keeper's end", || self.child.try_wait().unwrap());
        status
            .code()
            .unwrap_or_else(|| panic!("the keeper was killed: {status:?}"))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let servers: Vec<i32> = self
            .events()
            .iter()
            .filter(|e| e["event"] == "started")
            .filter_map(|e| e["pid"].as_i64())
            .map(|p| p as i32)
            .collect();
        let _ = self.child.kill();
        let _ = self.child.wait();
        let last = servers
            .last()
            .copied()
            .filter(|_| is_mounted(&self.mountpoint()));
        if let Some(pid) = last {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if is_mounted(&self.mountpoint()) {
            let _ = umount2(
                &self.mountpoint(),
                MntFlags::MNT_FORCE | MntFlags::MNT_DETACH,
            );
        }
    }
}
