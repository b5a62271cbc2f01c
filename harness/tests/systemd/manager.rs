// SPDX-License-Identifier: GPL-2.0
//! The machine's own systemd as process 1 of a pid namespace, with one unit: ours.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub const SYSTEMD: &str = "/lib/systemd/systemd";
pub const UNIT: &str = "fuse-restart@data.service";
const TEXT: &str = include_str!("../../systemd/fuse-restart@.service");
const UNITS: &str = "/run/systemd/system";
const GROUP: &str = "/sys/fs/cgroup/systemd-under-test";

/// Waits for a condition; the time limit only ends a test that has failed.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "waited 60 s in vain for {what}"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Why it cannot run here. It writes to /run and leaves processes behind, so only a guest of `scripts/vm` will do.
pub fn missing() -> Option<&'static str> {
    let guest =
        fs::read_to_string("/proc/cmdline").is_ok_and(|line| line.contains("fuse_restart_job"));
    if !guest {
        return Some("runs in a guest only (scripts/vm)");
    }
    (!Path::new(SYSTEMD).exists()).then_some("needs systemd")
}

pub struct Manager {
    unshare: Child,
    pid: u32,
    dir: PathBuf,
}

impl Manager {
    /// `dir` gets the tree of the unit: `bin/fuse-restart`, `srv/data`, `mnt/data`.
    pub fn boot(dir: &Path, binary: &Path) -> Manager {
        for sub in ["bin", "srv/data", "mnt/data"] {
            fs::create_dir_all(dir.join(sub)).unwrap();
        }
        fs::copy(binary, dir.join("bin/fuse-restart")).unwrap();
        fs::create_dir_all(UNITS).unwrap();
        fs::create_dir_all(GROUP).unwrap();
        let shown = dir.display().to_string();
        // The unit as it is shipped, elsewhere, and on a system with nothing else in it.
        let unit = TEXT
            .replace("/usr/bin/", &format!("{shown}/bin/"))
            .replace("/srv/", &format!("{shown}/srv/"))
            .replace("/mnt/", &format!("{shown}/mnt/"))
            .replace("[Unit]", "[Unit]\nDefaultDependencies=no");
        assert!(unit.contains(&format!("--mountpoint {shown}/mnt/%i {shown}/srv/%i")));
        fs::write(format!("{UNITS}/fuse-restart@.service"), unit).unwrap();
        let target = "[Unit]\nDefaultDependencies=no\n";
        fs::write(format!("{UNITS}/nothing.target"), target).unwrap();

        let init = format!(
            "umount /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && \
             exec {SYSTEMD} --system --unit=nothing.target --log-target=console --show-status=no"
        );
        let log = fs::File::create(dir.join("systemd.log")).unwrap();
        let mut command = Command::new("unshare");
        command
            .args(["-p", "-f", "-m", "-C", "-u", "--mount-proc", "sh", "-c"])
            .arg(init)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("container", "fuse-restart")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        // SAFETY: one write(2) to an open file would do; fs::write allocates, but no other thread runs in this test yet.
        unsafe {
            command.pre_exec(|| fs::write(format!("{GROUP}/cgroup.procs"), "0"));
        }
        let unshare = command.spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let pid = wait_for("systemd", || {
            let pid = fs::read_to_string(&children).ok()?.trim().parse().ok()?;
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            (name.trim() == "systemd").then_some(pid)
        });
        let manager = Manager {
            unshare,
            pid,
            dir: dir.to_owned(),
        };
        wait_for("systemd to answer", || {
            let out = manager.inside(&["systemctl", "is-active", "nothing.target"]);
            (out.stdout == b"active\n").then_some(())
        });
        manager
    }

    /// Runs a command where systemd lives.
    pub fn inside(&self, command: &[&str]) -> Output {
        Command::new("nsenter")
            .args(["-t", &self.pid.to_string(), "-m", "-p", "-C", "-u", "--"])
            .args(command)
            .output()
            .expect("nsenter")
    }

    pub fn systemctl(&self, words: &[&str]) {
        let out = self.inside(&[&["systemctl"], words].concat());
        assert!(
            out.status.success(),
            "systemctl {words:?}: {}\n{}",
            String::from_utf8_lossy(&out.stderr),
            self.log()
        );
    }

    pub fn property(&self, name: &str) -> String {
        let out = self.inside(&["systemctl", "show", "--value", "-p", name, UNIT]);
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("systemd.log")).unwrap_or_default()
    }

    /// A path of the unit's tree, as processes out here reach it.
    pub fn path(&self, sub: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.pid));
        root.join(self.dir.strip_prefix("/").unwrap()).join(sub)
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- systemd and the server said:\n{}", self.log());
        }
        // Process 1 of a pid namespace takes all others with it.
        let pid = nix::unistd::Pid::from_raw(self.pid as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        let _ = self.unshare.wait();
    }
}
