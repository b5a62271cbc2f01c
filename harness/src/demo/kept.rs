// SPDX-License-Identifier: GPL-2.0
//! The mount of a demo: its keeper (a process of its own), and what can be asked about it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::watchdog::Watchdog;
use crate::fusectl::Recovery;
use crate::keep::events::{Event, Record};
use crate::status::{self, Report};

/// How often a condition is looked at.
const LOOK: Duration = Duration::from_millis(2);
/// A server that does not serve after so long never will.
const LONGEST_RECOVERY: Duration = Duration::from_secs(60);

pub struct Kept {
    keeper: Child,
    pub mountpoint: PathBuf,
    log: PathBuf,
    stderr: PathBuf,
}

impl Kept {
    pub fn start(work: &Path, backing: &Path, threads: u32) -> Result<Self> {
        // Started again and again, so from a file system that is not the outage itself (a guest has its root over 9p).
        let own = work.join("fuse-restart");
        let here = std::env::current_exe().context("finding our own binary")?;
        fs::copy(&here, &own).with_context(|| format!("copying {}", here.display()))?;
        let mountpoint = work.join("mnt");
        fs::create_dir(&mountpoint)?;
        let (log, stderr) = (work.join("keeper.jsonl"), work.join("keeper.stderr"));
        let keeper = Command::new(&own)
            .args(["keep", "--max-restarts", "20", "--mountpoint"])
            .arg(&mountpoint)
            .arg("--json")
            .arg(&log)
            .arg("--")
            .arg(&own)
            .args(["serve", "passthrough", "--threads", &threads.to_string()])
            .arg(backing)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&stderr)?)
            .spawn()
            .context("starting the keeper")?;
        Ok(Self {
            keeper,
            mountpoint,
            log,
            stderr,
        })
    }

    pub fn status(&self) -> Option<Report> {
        status::read(&self.mountpoint).ok()
    }

    /// Waits until `condition` says something of the status.
    pub fn wait<T>(
        &mut self,
        dog: &Watchdog,
        what: &str,
        mut condition: impl FnMut(&Report) -> Option<T>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(found) = self.status().as_ref().and_then(&mut condition) {
                return Ok(found);
            }
            if let Some(why) = dog.why_cut() {
                bail!("{why}");
            }
            if let Some(status) = self.keeper.try_wait()? {
                bail!(
                    "the keeper ended ({status}) while waiting for: {what}; {}",
                    self.last_words()
                );
            }
            if start.elapsed() > LONGEST_RECOVERY {
                let status = self.status().map(|s| format!("{s:?}")).unwrap_or_default();
                bail!(
                    "waited {} s in vain for: {what}; {status}; {}",
                    start.elapsed().as_secs(),
                    self.last_words()
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    /// What is left when something has gone wrong.
    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.stderr).unwrap_or_default();
        let lines: Vec<_> = text.lines().rev().take(5).collect();
        let last = lines.into_iter().rev().collect::<Vec<_>>().join("\n    ");
        format!("the last lines of {}:\n    {last}", self.stderr.display())
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.keeper.id() as i32), signal).context("signalling the keeper")
    }

    /// Everything that the keeper logged.
    pub fn events(&self) -> Result<Vec<Record>> {
        let text = fs::read_to_string(&self.log)
            .with_context(|| format!("event log {}", self.log.display()))?;
        text.lines()
            .map(|l| serde_json::from_str(l).with_context(|| format!("event {l}")))
            .collect()
    }

    /// SIGTERM, and the keeper's exit status.
    pub fn stop(&mut self, dog: &Watchdog) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.keeper.try_wait()? {
                if status.success() {
                    return Ok(());
                }
                bail!("the keeper ended with {status}; {}", self.last_words());
            }
            if start.elapsed() > LONGEST_RECOVERY {
                bail!("the keeper did not end; {}", self.last_words());
            }
            if let Some(why) = dog.why_cut() {
                bail!("{why}");
            }
            std::thread::sleep(LOOK);
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // Twice: a mount that is busy is detached, a keeper that has ended does not mind.
        let start = Instant::now();
        let mut asked = 0;
        while !matches!(self.keeper.try_wait(), Ok(Some(_)) | Err(_)) {
            let seconds = start.elapsed().as_secs();
            if asked <= seconds && asked < 3 {
                let _ = self.signal(Signal::SIGTERM);
                asked += 1;
            } else if seconds > 30 {
                let _ = self.keeper.kill();
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// Numbers of the keeper's log.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Logged {
    pub starts: u64,
    pub deaths: u64,
    pub restarted: u64,
    pub resent: u64,
    pub refused: u64,
    /// The kernel's counts, as they were at each death.
    pub recoveries: Vec<Recovery>,
    /// When the kernel was told, and when the next server ran, for each death.
    pub told_at: Vec<u64>,
    pub started_at: Vec<u64>,
}

pub fn count(events: &[Record]) -> Logged {
    let mut logged = Logged::default();
    // A server that ends because the mount does has not died.
    let unmounted = |e: &&Record| !matches!(e.event, Event::Unmounted { .. });
    for record in events.iter().take_while(unmounted) {
        match &record.event {
            Event::Started { restarts, .. } => {
                logged.starts += 1;
                logged
                    .started_at
                    .extend((*restarts > 0).then_some(record.at_ns));
            }
            Event::Died {
                connected: false, ..
            } => {}
            Event::Died { recovery, .. } => {
                logged.deaths += 1;
                logged.recoveries.extend(recovery.clone());
            }
            Event::Notified { how, .. } => {
                logged.told_at.push(record.at_ns);
                match how.as_str() {
                    "restarted" => logged.restarted += 1,
                    "resent" => logged.resent += 1,
                    _ => logged.refused += 1,
                }
            }
            _ => {}
        }
    }
    logged
}
