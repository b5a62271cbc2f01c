// SPDX-License-Identifier: GPL-2.0
//! Kills what a dead server left behind, and knows when it is really gone.
//!
//! Two live instances on one descriptor steal each other's messages, so not one thread of the old one may be alive
//! when the kernel is told. Three nets, each with holes that the others close: the cgroup (atomic, catches all, but
//! not every machine lets us make one), the process group (a daemon leaves it), and parentage: the keeper is a
//! "child subreaper", so whatever the server forked becomes the keeper's own child once its parents are dead.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{kill, killpg, Signal};
use nix::sys::wait::{waitid, waitpid, Id, WaitPidFlag, WaitStatus};
use nix::unistd::{getpgid, Pid};

use super::mount;

/// Everything that descends from a server this keeper started.
pub struct Remains {
    /// Of the instance that runs now, or ran last.
    cgroup: Option<Cgroup>,
    cgroups: u64,
    /// Are orphans our children? Not if we were started with children that are none of our business.
    subreaper: bool,
}

impl Remains {
    pub fn new() -> Self {
        let childless = waitid(
            Id::All,
            WaitPidFlag::WNOHANG | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT,
        ) == Err(Errno::ECHILD);
        // SAFETY: plain prctl without pointers.
        let subreaper =
            childless && unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } == 0;
        Self {
            cgroup: None,
            cgroups: 0,
            subreaper,
        }
    }

    /// A cgroup that the next server is to be born in, if we may make one.
    ///
    /// A new one each time: kernels since 6.14 kill at birth what clone3(2) puts into a cgroup that was killed once,
    /// because they compare the kill counts of the wrong two groups.
    pub fn new_cgroup(&mut self) -> Option<BorrowedFd<'_>> {
        self.cgroup = None;
        self.cgroups += 1;
        self.cgroup = Cgroup::create(self.cgroups).ok();
        self.cgroup.as_ref().map(|c| c.opened.as_fd())
    }

    pub fn describe(&self) -> &'static str {
        match (&self.cgroup, self.subreaper) {
            (Some(_), true) => "cgroup, process group, parentage",
            (Some(_), false) => "cgroup, process group",
            (None, true) => "process group, parentage",
            (None, false) => "process group",
        }
    }

    /// SIGKILL to all of it. To be repeated until `gone`: what is killed may have forked in the meantime.
    pub fn kill(&self, group: Pid) {
        if let Some(cgroup) = &self.cgroup {
            let _ = cgroup.kill();
        }
        let _ = killpg(group, Signal::SIGKILL);
        if self.subreaper {
            for child in processes().filter(is_our_child) {
                let _ = kill(child, Signal::SIGKILL);
            }
        }
    }

    /// Reaps what has died. True when nothing is left, not even a process that is still on its way out.
    pub fn gone(&self, group: Pid) -> bool {
        let childless = loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => break false,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => break true,
            }
        };
        let group_gone = killpg(group, None) == Err(Errno::ESRCH);
        group_gone
            && (childless || !self.subreaper)
            && !self.cgroup.as_ref().is_some_and(|c| populated(&c.dir))
    }

    /// Reaps orphans of a server that lives: it may run for years, and they are ours.
    pub fn reap_strays(server: Pid, trial: Option<Pid>) {
        let peek = WaitPidFlag::WNOHANG | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while let Ok(status) = waitid(Id::All, peek) {
            match status.pid() {
                Some(pid) if pid != server && Some(pid) != trial => drop(waitpid(pid, None)),
                // The server itself: its death has an order of its own. The test of its successor. None: nobody.
                _ => break,
            }
        }
    }

    /// Who is left, for a message.
    pub fn left(&self, group: Pid) -> Vec<Pid> {
        let mut pids = self.cgroup.as_ref().map(Cgroup::pids).unwrap_or_default();
        pids.extend(
            processes()
                .filter(|p| getpgid(Some(*p)) == Ok(group) || (self.subreaper && is_our_child(p))),
        );
        pids.sort();
        pids.dedup();
        pids
    }
}

struct Cgroup {
    dir: PathBuf,
    opened: File,
}

impl Cgroup {
    /// Below our own one, in the unified hierarchy.
    fn create(number: u64) -> io::Result<Self> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let own = fs::read_to_string("/proc/self/cgroup")?;
        let own = own
            .lines()
            .find_map(|l| l.strip_prefix("0::"))
            .ok_or_else(missing)?;
        let hierarchy = mount::mount_table()?
            .into_iter()
            .find(|m| m.fstype == "cgroup2")
            .ok_or_else(missing)?;
        // A container may see a part of the hierarchy only, with our own group above it.
        let below = Path::new(own)
            .strip_prefix(&hierarchy.root)
            .map_err(|_| missing())?;
        if below
            .components()
            .any(|c| matches!(c, std::path::Component::ParentDir))
        {
            return Err(missing());
        }
        let ours = hierarchy.mountpoint.join(below);
        if number == 1 {
            clear_left(&ours, OLD);
        }
        let dir = ours.join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&dir)?;
        let opened = File::open(&dir);
        if opened.is_err() || !dir.join("cgroup.kill").exists() {
            let _ = fs::remove_dir(&dir);
        }
        Ok(Self {
            opened: opened?,
            dir,
        })
    }

    fn kill(&self) -> io::Result<()> {
        OpenOptions::new()
            .write(true)
            .open(self.dir.join("cgroup.kill"))?
            .write_all(b"1")
    }

    fn pids(&self) -> Vec<Pid> {
        let text = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        text.lines()
            .filter_map(|l| l.parse().ok())
            .map(Pid::from_raw)
            .collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove_groups(&self.dir);
    }
}

fn populated(group: &Path) -> bool {
    fs::read_to_string(group.join("cgroup.events"))
        .is_ok_and(|t| t.lines().any(|l| l == "populated 1"))
}

/// Of a keeper; its pid and a number follow.
const PREFIX: &str = "fuse-restart-";
/// A keeper whose pid we do not see, in a container, may have made its group just now, for a server that is about to be
/// born there.
const OLD: Duration = Duration::from_secs(60);

/// Removes the groups of keepers that were killed, if there is no process in them.
fn clear_left(beside: &Path, older: Duration) {
    let entries = fs::read_dir(beside).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let keeper = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok());
        let Some(keeper) = keeper.map(Pid::from_raw) else {
            continue;
        };
        let age = entry.metadata().and_then(|m| m.modified());
        let old = age.is_ok_and(|at| at.elapsed().is_ok_and(|age| age >= older));
        let dead = keeper.as_raw() > 0 && kill(keeper, None) == Err(Errno::ESRCH);
        if old && dead && !populated(&entry.path()) {
            remove_groups(&entry.path());
        }
    }
}

/// A keeper that was killed below us left groups of its own.
fn remove_groups(dir: &Path) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    for below in entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
        remove_groups(&below.path());
    }
    let _ = fs::remove_dir(dir);
}

/// Every process that we see.
///
/// Of `/proc` the keeper only reads the names of its directories. `stat`, `status`, `maps` and the like take a reference
/// on a process's memory, and who drops the last one has to unmap it: with a file of our mount mapped, the keeper would
/// wait for the server that only it can start.
fn processes() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().to_str()?.parse().ok().map(Pid::from_raw))
}

/// A process that we could wait for, dead or alive.
fn is_our_child(pid: &Pid) -> bool {
    let peek = WaitPidFlag::WNOHANG | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(*pid), peek).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn groups_of_dead_keepers_are_removed_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let of = |pid: u32| dir.path().join(format!("{PREFIX}{pid}-1"));
        let mut dead = Command::new("true").spawn().unwrap();
        let gone = of(dead.id());
        dead.wait().unwrap();
        let inner = gone.join(format!("{PREFIX}1-7"));
        fs::create_dir_all(&inner).unwrap();
        let others = [
            of(child.id()),
            of(0),
            dir.path().join("fuse-restart-x-1"),
            dir.path().join("user.slice"),
        ];
        for other in &others {
            fs::create_dir(other).unwrap();
        }
        clear_left(dir.path(), OLD);
        assert!(inner.exists(), "it may be new");
        fs::write(gone.join("cgroup.events"), "populated 1\n").unwrap();
        clear_left(dir.path(), Duration::ZERO);
        assert!(inner.exists(), "there is a process in it");
        fs::remove_file(gone.join("cgroup.events")).unwrap();
        clear_left(dir.path(), Duration::ZERO);
        assert!(!gone.exists());
        for other in &others {
            assert!(other.exists(), "{}", other.display());
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_child_is_known_until_it_is_reaped() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        assert!(processes().any(|p| p == pid) && is_our_child(&pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_our_child(&pid));
        assert!(processes().any(|p| p == Pid::parent()) && !is_our_child(&Pid::parent()));
    }
}
