// SPDX-License-Identifier: GPL-2.0
//! A mount under the real keeper, over files of which the kernel caches every inode, and its crashes.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::sample::{Sample, Stamps};
use super::trace::Trace;
use crate::fusectl;
use crate::keep::events::{now_ns, Event, Record};
use crate::raw::wait::wait_for;

/// Files in a directory.
const IN_ONE: u64 = 1000;
/// How long something may take that should take no time, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Mounted {
    keeper: Child,
    back: PathBuf,
    mnt: PathBuf,
    events: File,
    events_path: PathBuf,
    /// What is not a whole line yet.
    rest: String,
    connection: u32,
    server: i32,
    inodes: u64,
    /// One of the files, for the request that waits.
    file: Option<File>,
}

/// What the keeper said of one crash.
#[derive(Default)]
struct Said {
    died: Option<u64>,
    told: Option<u64>,
    started: Option<i32>,
}

impl Mounted {
    pub fn new(scratch: &Path, inodes: u64, threads: u16) -> Result<Mounted> {
        let [back, mnt] = ["back", "mnt"].map(|name| scratch.join(name));
        for dir in [&back, &mnt] {
            fs::create_dir(dir)?;
        }
        let none = None::<&str>;
        let options = Some("size=90%,nr_inodes=0");
        mount(none, &back, Some("tmpfs"), MsFlags::empty(), options).context("a tmpfs")?;
        fill(&back, inodes)?;
        let events_path = scratch.join("events");
        let events = File::create_new(&events_path).and_then(|_| File::open(&events_path))?;
        let own = std::env::current_exe().context("finding our own binary")?;
        let keeper = Command::new(&own)
            // An instance that was killed did not fail: no back-off.
            .args(["keep", "--restart-delay", "0", "--stable-after", "0"])
            .arg("--mountpoint")
            .arg(&mnt)
            .arg("--json")
            .arg(&events_path)
            .arg("--")
            .arg(&own)
            .args(["serve", "passthrough", "--timeout", "3600"])
            .args(["--threads", &threads.to_string()])
            .arg(&back)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .env("RUST_LOG", "error")
            // Ctrl-C is for us, not for it.
            .process_group(0)
            .spawn()
            .context("starting a keeper")?;
        let mut mounted = Mounted {
            keeper,
            events,
            events_path,
            back,
            mnt,
            rest: String::new(),
            connection: 0,
            server: 0,
            inodes,
            file: None,
        };
        wait_for("the first server", PATIENCE, || {
            if let Some(status) = mounted.keeper.try_wait()? {
                bail!("the keeper ended ({status}) before it had mounted; it says above why");
            }
            for record in mounted.read_events()? {
                match record.event {
                    Event::Mounted { connection, .. } => mounted.connection = connection,
                    Event::Started { pid, .. } => mounted.server = pid,
                    _ => {}
                }
            }
            Ok(mounted.connection != 0 && mounted.server != 0)
        })?;
        Ok(mounted)
    }

    /// Through the mount.
    pub fn file(&self, n: u64) -> PathBuf {
        name(&self.mnt, n)
    }

    /// The kernel caches every inode from now on; how many that are, with directories and root.
    pub fn look_everything_up(&mut self) -> Result<u64> {
        for n in 0..self.inodes {
            let path = name(&self.mnt, n);
            fs::symlink_metadata(&path).with_context(|| format!("{}", path.display()))?;
        }
        let mut options = OpenOptions::new();
        // Not opened: what is asked later is one request, and no other.
        let options = options.read(true).custom_flags(libc::O_PATH);
        self.file = Some(options.open(name(&self.mnt, 0))?);
        let recovery = self.recovery()?;
        ensure!(
            recovery.supported(),
            "this kernel does not offer FUSE_RESTARTABLE: boot one with the series (scripts/vm)"
        );
        Ok(self.inodes + self.inodes.div_ceil(IN_ONE) + 1)
    }

    fn recovery(&self) -> Result<fusectl::Recovery> {
        fusectl::recovery(self.connection)?.context("this kernel knows nothing of recoveries")
    }

    /// Kills the server, and asks for something at once. The inner error: the stamps are not to be believed.
    pub fn crash(&mut self, trace: &Trace) -> Result<Result<Sample>> {
        trace.clear()?;
        let killed = now_ns();
        kill(Pid::from_raw(self.server), Signal::SIGKILL)
            .with_context(|| format!("killing the server {}", self.server))?;
        let file = self.file.as_ref().context("no file is held")?;
        ask(file).context("the request that waited")?;
        let answered = now_ns();
        let mut said = Said::default();
        wait_for("the keeper's events", PATIENCE, || {
            for record in self.read_events()? {
                match record.event {
                    Event::Died { .. } => said.died = Some(record.at_ns),
                    Event::Notified { ref how, .. } => {
                        ensure!(how == "restarted", "the kernel was told: {how}");
                        said.told = Some(record.at_ns);
                    }
                    Event::Started { pid, .. } => said.started = Some(pid),
                    _ => {}
                }
            }
            Ok(said.started.is_some())
        })?;
        self.server = said.started.context("no server was started")?;
        // The request may be answered before the kernel has said that it serves again.
        let mut changes = Vec::new();
        wait_for("the end of the recovery", PATIENCE, || {
            changes = trace.read(self.connection)?;
            Ok(changes.iter().any(|change| change.phase == "serving"))
        })?;
        let recovery = self.recovery()?;
        ensure!(
            recovery.get("revoked") == 0 && recovery.get("confirmed") == recovery.get("replayed"),
            "not every inode was confirmed: {recovery:?}"
        );
        Ok(Sample::new(&Stamps {
            killed,
            answered,
            died: said.died.context("the keeper saw no death")?,
            told: said.told.context("the keeper told the kernel nothing")?,
            changes: &changes,
            recovery: &recovery,
        }))
    }

    /// What the keeper wrote since the last call.
    fn read_events(&mut self) -> Result<Vec<Record>> {
        self.events.read_to_string(&mut self.rest)?;
        let Some(end) = self.rest.rfind('\n') else {
            return Ok(Vec::new());
        };
        let parse = |line| serde_json::from_str::<Record>(line).context("an event");
        let records = self.rest[..end].lines().map(parse).collect();
        self.rest.drain(..=end);
        records
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.file = None;
        let _ = kill(Pid::from_raw(self.keeper.id() as i32), Signal::SIGTERM);
        let _ = self.keeper.wait();
        let _ = umount2(&self.back, MntFlags::MNT_DETACH);
        for dir in [&self.back, &self.mnt] {
            let _ = fs::remove_dir(dir);
        }
        let _ = fs::remove_file(&self.events_path);
    }
}

fn name(root: &Path, n: u64) -> PathBuf {
    root.join(format!("d{}/f{n}", n / IN_ONE))
}

fn fill(back: &Path, inodes: u64) -> Result<()> {
    for n in 0..inodes {
        if n % IN_ONE == 0 {
            fs::create_dir(back.join(format!("d{}", n / IN_ONE)))?;
        }
        File::create(name(back, n)).context("making the files")?;
    }
    Ok(())
}

/// One GETATTR, whatever is cached.
fn ask(file: &File) -> Result<()> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_FORCE_SYNC;
    // SAFETY: all zeros is a valid value of this plain struct.
    let mut stx: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is NUL-terminated and the buffer writable.
    let ret = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            flags,
            libc::STATX_BASIC_STATS,
            &mut stx,
        )
    };
    Errno::result(ret)?;
    Ok(())
}
