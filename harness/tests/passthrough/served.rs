// SPDX-License-Identifier: GPL-2.0
//! A passthrough mount under test, taken down again whatever the test did.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use nix::mount::{umount2, MntFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

pub const BINARY: &str = env!("CARGO_BIN_EXE_fuse-restart");

/// What the backing directory is on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Tmpfs,
    Ext4,
}

pub const KINDS: [Kind; 2] = [Kind::Tmpfs, Kind::Ext4];

/// Why a test cannot run here, if it cannot.
fn missing(kind: Kind) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    let device = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    if let Err(e) = device {
        return Some(format!("needs /dev/fuse: {e}"));
    }
    if kind == Kind::Ext4 {
        let mkfs = Command::new("mkfs.ext4").arg("-V").output();
        if !mkfs.is_ok_and(|out| out.status.success()) {
            return Some("needs mkfs.ext4".into());
        }
        if !Path::new("/dev/loop-control").exists() {
            return Some("needs loop devices".into());
        }
    }
    None
}

/// Waits for a condition; the time limit only ends a test that has failed.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        let waited = start.elapsed();
        assert!(
            waited < Duration::from_secs(60),
            "waited {waited:?} in vain for {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn run(program: &str, args: &[&std::ffi::OsStr]) {
    let out = Command::new(program).args(args).output().expect(program);
    assert!(
        out.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// A scratch file system.
pub struct Scratch {
    dir: tempfile::TempDir,
}

impl Scratch {
    pub fn new(kind: Kind) -> Scratch {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("back");
        fs::create_dir(&at).unwrap();
        match kind {
            Kind::Tmpfs => run(
                "mount",
                &["-t", "tmpfs", "none"]
                    .map(AsRef::as_ref)
                    .into_iter()
                    .chain([at.as_ref()])
                    .collect::<Vec<_>>(),
            ),
            Kind::Ext4 => {
                let image = dir.path().join("image");
                fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
                run("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), image.as_ref()]);
                run(
                    "mount",
                    &["-o".as_ref(), "loop".as_ref(), image.as_ref(), at.as_ref()],
                );
            }
        }
        Scratch { dir }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("back")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = umount2(&self.path(), MntFlags::MNT_DETACH);
    }
}

/// A backing directory, served at a mountpoint.
pub struct Served {
    keeper: Child,
    dir: tempfile::TempDir,
    scratch: Scratch,
    /// Nobody copies the mount meanwhile, see [`alone`].
    _beside: RwLockReadGuard<'static, ()>,
}

static MOUNTS: RwLock<()> = RwLock::new(());

/// Until it is dropped there is no mount of another test. A new mount namespace has a copy of each, which goes on when the
/// mount is unmounted; its server is asked to end then, and takes that for a restart.
pub fn alone() -> RwLockWriteGuard<'static, ()> {
    // Without standing in line: a test with two mounts would wait for us between them. And as long as there are others.
    loop {
        match MOUNTS.try_write() {
            Ok(alone) => return alone,
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

impl Served {
    /// `None`: it cannot run here, and that was said.
    pub fn start(kind: Kind, options: &[&str]) -> Option<Served> {
        if let Some(why) = missing(kind) {
            eprintln!("SKIPPED ({kind:?}): {why}");
            return None;
        }
        Some(Served::on(Scratch::new(kind), options))
    }

    /// The same with a server that may have `nofile` descriptors open at a time.
    pub fn start_limited(kind: Kind, options: &[&str], nofile: u32) -> Option<Served> {
        if let Some(why) = missing(kind) {
            eprintln!("SKIPPED ({kind:?}): {why}");
            return None;
        }
        let limit = format!(r#"ulimit -n {nofile} && exec "$@""#);
        Some(Served::with(
            Scratch::new(kind),
            &["sh", "-c", &limit, "sh"],
            options,
        ))
    }

    pub fn on(scratch: Scratch, options: &[&str]) -> Served {
        Served::with(scratch, &[], options)
    }

    /// The same with variables in the environment of every instance.
    #[cfg(feature = "crash-points")]
    pub fn with_variables(
        scratch: Scratch,
        variables: &[(&str, &str)],
        options: &[&str],
    ) -> Served {
        Served::kept(scratch, &[], variables, options)
    }

    /// The same with options for the keeper.
    #[cfg(feature = "crash-points")]
    pub fn kept(
        scratch: Scratch,
        keeper: &[&str],
        variables: &[(&str, &str)],
        options: &[&str],
    ) -> Served {
        let assignments: Vec<String> = variables.iter().map(|(n, v)| format!("{n}={v}")).collect();
        let wrapper: Vec<&str> = std::iter::once("env")
            .chain(assignments.iter().map(String::as_str))
            .collect();
        Served::start_kept(scratch, keeper, &wrapper, options)
    }

    /// A server that is no passthrough server; `None`: it cannot run here, and that was said.
    pub fn other(server: &[&OsStr]) -> Option<Served> {
        if let Some(why) = missing(Kind::Tmpfs) {
            eprintln!("SKIPPED: {why}");
            return None;
        }
        let unused = Scratch {
            dir: tempfile::tempdir().unwrap(),
        };
        Some(Served::keep(unused, &[], server.iter().copied()))
    }

    fn with(scratch: Scratch, wrapper: &[&str], options: &[&str]) -> Served {
        Served::start_kept(scratch, &[], wrapper, options)
    }

    fn start_kept(scratch: Scratch, keeper: &[&str], wrapper: &[&str], options: &[&str]) -> Served {
        let backing = scratch.path();
        let words = wrapper.iter().chain(&[BINARY, "serve", "passthrough"]);
        let words = words.chain(options).map(OsStr::new);
        Served::keep(scratch, keeper, words.chain([backing.as_os_str()]))
    }

    fn keep<'a>(
        scratch: Scratch,
        keeper: &[&str],
        server: impl Iterator<Item = &'a OsStr>,
    ) -> Served {
        let _beside = MOUNTS.read().expect("who is alone does not panic with it");
        let dir = tempfile::tempdir().unwrap();
        let mnt = dir.path().join("mnt");
        fs::create_dir(&mnt).unwrap();
        let stderr = fs::File::create(dir.path().join("stderr")).unwrap();
        let keeper = Command::new(BINARY)
            .args(["keep", "--allow-other", "--max-restarts", "1000"])
            // An instance that was killed by the test did not fail: no back-off.
            .args(["--stable-after", "1", "--mountpoint"])
            .arg(&mnt)
            .arg("--json")
            .arg(dir.path().join("events"))
            .args(keeper)
            .arg("--")
            .args(server)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut served = Served {
            keeper,
            dir,
            scratch,
            _beside,
        };
        wait_for("the mount", || {
            if let Some(status) = served.keeper.try_wait().unwrap() {
                panic!("the keeper ended ({status}):\n{}", served.stderr());
            }
            assert!(
                served.starts() < 10,
                "it dies at once:\n{}",
                served.stderr()
            );
            let mounted = fs::metadata(served.dir.path().join("mnt")).ok()?;
            let below = fs::metadata(served.dir.path()).ok()?;
            use std::os::unix::fs::MetadataExt;
            (mounted.dev() != below.dev()).then_some(())
        });
        served
    }

    /// The mountpoint.
    pub fn mnt(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// The same directory, past the server.
    pub fn back(&self) -> PathBuf {
        self.scratch.path()
    }

    pub fn stderr(&self) -> String {
        fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    pub fn events(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.dir.path().join("events")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let events = whole
            .lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap());
        events.filter(|e| e["event"] == name).collect()
    }

    pub fn starts(&self) -> usize {
        self.events("started").len()
    }

    pub fn server_pid(&self) -> Pid {
        // It can answer before the keeper has written down that it was started.
        wait_for("the keeper to say that it started a server", || {
            let pid = self.events("started").last()?["pid"].as_i64()?;
            Some(Pid::from_raw(pid as i32))
        })
    }

    pub fn keeper_pid(&self) -> Pid {
        Pid::from_raw(self.keeper.id() as i32)
    }

    /// Kills the server and waits until its successor was started.
    pub fn crash(&self) {
        // Counted once it is known that the keeper has written down that this one was started.
        let pid = self.server_pid();
        let starts = self.starts();
        kill(pid, Signal::SIGKILL).unwrap();
        wait_for("the next instance", || {
            (self.starts() > starts).then_some(())
        });
    }

    /// Kills the server and waits until its successor answers.
    pub fn crash_and_wait(&self) {
        self.crash();
        fs::metadata(self.mnt()).expect("the next instance answers");
    }

    /// Waits until every worker of the server sleeps, for the kernel has nothing to say: FORGETs,
    /// which nobody waits for, have been read as well.
    pub fn wait_until_idle(&self) {
        let tasks = format!("/proc/{}/task", self.server_pid());
        let asleep = || {
            fs::read_dir(&tasks).unwrap().flatten().all(|task| {
                let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
                !status.starts_with("Name:\tfuser-") || status.contains("\nState:\tS")
            })
        };
        let mut in_a_row = 0;
        wait_for("the server to be idle", || {
            in_a_row = if asleep() { in_a_row + 1 } else { 0 };
            (in_a_row == 10).then_some(())
        });
    }

    /// Between fork(2) and exec(2) a child of any test has what all the others have open.
    fn is_open_in_a_child(&self) -> bool {
        let (me, mnt) = (fs::read_link("/proc/self/exe").unwrap(), self.mnt());
        let children = fs::read_dir("/proc/self/task")
            .unwrap()
            .flatten()
            .flat_map(|task| {
                let pids = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                pids.split_whitespace()
                    .map(|pid| Path::new("/proc").join(pid))
                    .collect::<Vec<_>>()
            });
        children
            .filter(|child| fs::read_link(child.join("exe")).is_ok_and(|exe| exe == me))
            .flat_map(|child| {
                fs::read_dir(child.join("fd"))
                    .into_iter()
                    .flatten()
                    .flatten()
            })
            .any(|fd| fs::read_link(fd.path()).is_ok_and(|path| path.starts_with(&mnt)))
    }

    /// Stops the keeper in the regular way and gives the backing back.
    pub fn unmount(mut self) -> Scratch {
        wait_for("children of other tests to be on their own", || {
            (!self.is_open_in_a_child()).then_some(())
        });
        kill(self.keeper_pid(), Signal::SIGTERM).unwrap();
        let status = wait_for("the keeper to unmount and end", || {
            assert!(
                self.events("busy").is_empty(),
                "the mount is busy:\n{}",
                self.stderr()
            );
            self.keeper.try_wait().unwrap()
        });
        assert!(status.success(), "{status}:\n{}", self.stderr());
        // Drop only has the scratch file system left to take down.
        let empty = Scratch {
            dir: tempfile::tempdir().unwrap(),
        };
        std::mem::replace(&mut self.scratch, empty)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.keeper.id() as i32), Signal::SIGKILL);
        let _ = self.keeper.wait();
        if let Some(started) = self.events("started").last() {
            // Its own child, by the pid it reported; it may be gone already.
            let _ = kill(
                Pid::from_raw(started["pid"].as_i64().unwrap() as i32),
                Signal::SIGKILL,
            );
        }
        let _ = umount2(&self.mnt(), MntFlags::MNT_DETACH);
        if std::thread::panicking() {
            eprintln!("--- keeper and server said:\n{}", self.stderr());
        }
    }
}
