// SPDX-License-Identifier: GPL-2.0
//! A fresh mount under the real keeper, for one case.
//!
//! Nothing here touches the mounted file system: whoever does that may wait for a server, and is therefore a process
//! with a time limit, see [`super::case`].

use std::fs;
use std::os::unix::fs::{chown, symlink, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::mount::{umount2, MntFlags};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::dim::{Dim, Mode};
use super::op::{pattern, Workload};
use super::plan::{Deaths, Kill};
use super::rest::Rest;
use crate::crash_points::Table;
use crate::fusectl;
use crate::keep::events::{Event, Record};
use crate::keep::mount;
use crate::raw::ctl::Connection;
use crate::raw::wait::wait_for;
use crate::status;

/// What all cases of a run have in common.
pub struct Setup<'a> {
    /// This program.
    pub binary: PathBuf,
    pub mode: Mode,
    /// How long something may take that should take no time.
    pub patience: Duration,
    /// On a file system with file handles, for backings and mount points.
    pub scratch: &'a Path,
}

/// What the keeper says of itself, and one that is kept by it.
const EVENTS: &str = "events";
const EVENTS_WITHIN: &str = "events-within";

pub struct Kept<'a> {
    setup: &'a Setup<'a>,
    dir: PathBuf,
    keeper: Option<Child>,
    /// The keeper has a keeper.
    nested: bool,
    pub table: Table,
}

impl<'a> Kept<'a> {
    pub fn start(
        setup: &'a Setup<'a>,
        dim: &Dim,
        workload: &Workload,
        deaths: Deaths<'_>,
    ) -> Result<Kept<'a>> {
        let dir = nix::unistd::mkdtemp(&setup.scratch.join("case.XXXXXX"))
            .context("no directory for a case")?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        for name in ["mnt", "back"] {
            fs::create_dir(dir.join(name))?;
        }
        prepare(&dir.join("back"), workload).context("cannot prepare the backing directory")?;
        let table = Table::open(&dir.join("points")).context("the table of points")?;
        let kills = deaths.kills;
        let first = if deaths.together { kills.len() } else { 1 };
        for kill in kills.iter().take(first) {
            let (opcode, point) = kill.parts();
            table.arm(opcode, point, kill.nth)?;
        }
        for pair in kills.windows(2).filter(|_| !deaths.together) {
            table.arm_then(&pair[0].point, &pair[1].point, pair[1].nth)?;
        }
        for kill in kills.iter().filter(|_| deaths.keeper) {
            table.kill_the_keeper_at(&kill.point)?;
        }
        let mut kept = Kept {
            setup,
            dir,
            keeper: None,
            nested: deaths.keeper,
            table,
        };
        kept.keeper = Some(kept.spawn(dim, deaths.together)?);
        kept.wait_until("the mount is served", |kept| {
            // The second if the first died when it had begun its state.
            let served = |opcode| kept.table.seen(opcode, "end").reached > 0;
            Ok(served("adopt") || served("recover"))
        })?;
        Ok(kept)
    }

    fn spawn(&self, dim: &Dim, many: bool) -> Result<Child> {
        let said = fs::File::create(self.dir.join("said"))?;
        let mut command = Command::new(&self.setup.binary);
        self.keep(&mut command, many, EVENTS);
        command.arg(&self.setup.binary);
        if self.nested {
            self.keep(&mut command, many, EVENTS_WITHIN);
            command.arg(&self.setup.binary);
        }
        command
            .args(["serve", "passthrough"])
            .args(dim.options())
            .args(self.setup.mode.options())
            .arg(self.back())
            .env("FUSE_RESTART_CRASH_POINTS", self.dir.join("points"))
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said)
            .spawn()
            .context("cannot start the keeper")
    }

    /// The arguments of a keeper, up to what it keeps.
    fn keep(&self, command: &mut Command, many: bool, events: &str) {
        command
            // An instance that was killed by the matrix did not fail: no back-off.
            .args(["keep", "--allow-other", "--max-restarts", "1000"])
            // Nor is a request to be blamed that is under way at many deaths.
            .args(many.then_some("--max-tries=0"))
            .args(["--stable-after", "0", "--mountpoint"])
            .arg(self.mnt())
            .arg("--json")
            .arg(self.dir.join(events))
            .arg("--");
    }

    pub fn setup(&self) -> &Setup<'_> {
        self.setup
    }

    pub fn mnt(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    pub fn back(&self) -> PathBuf {
        self.dir.join("back")
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Waits for a condition, but not for a keeper that has ended.
    pub fn wait_until(
        &mut self,
        what: &str,
        mut condition: impl FnMut(&Kept) -> Result<bool>,
    ) -> Result<()> {
        let limit = self.setup.patience;
        wait_for(what, limit, || {
            if condition(self)? {
                return Ok(true);
            }
            let ended = self.keeper.as_mut().map(Child::try_wait).transpose()?;
            if let Some(Some(status)) = ended {
                bail!("the keeper ended ({status})");
            }
            Ok(false)
        })
        .with_context(|| self.scene())
    }

    /// How often the server killed itself, all points together.
    pub fn killed(&self, kills: &[Kill]) -> u64 {
        let mut points: Vec<_> = kills.iter().map(Kill::parts).collect();
        points.sort_unstable();
        points.dedup();
        let seen = points
            .iter()
            .map(|(opcode, point)| self.table.seen(opcode, point));
        seen.map(|seen| seen.killed).sum()
    }

    /// Nobody dies any more.
    pub fn disarm(&self, kills: &[Kill]) -> Result<()> {
        for kill in kills {
            let (opcode, point) = kill.parts();
            self.table.arm(opcode, point, 0)?;
        }
        Ok(())
    }

    pub fn status(&self) -> Result<status::Report> {
        status::read(&self.mnt())
    }

    /// Whether the instance that runs has nothing to do: every worker waits, for the kernel has nothing to say.
    pub fn idle(&self) -> Result<bool> {
        let report = self.status()?;
        let Some(pid) = self.server(&report)? else {
            return Ok(false);
        };
        for _ in 0..3 {
            if !workers_wait(pid) || fusectl::waiting(report.keeper.connection)? != 0 {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_micros(150));
        }
        Ok(workers_wait(pid))
    }

    /// The pid of the instance that runs.
    fn server(&self, report: &status::Report) -> Result<Option<i32>> {
        if !self.nested {
            return Ok(report.keeper.server_pid);
        }
        let mut running = None;
        for event in self.events(EVENTS_WITHIN)? {
            match event {
                Event::Started { pid, .. } => running = Some(pid),
                // The last keeper did not live to see the end of its server.
                Event::Died { .. } | Event::Adopted { .. } => running = None,
                _ => {}
            }
        }
        Ok(running)
    }

    pub fn wait_until_idle(&mut self) -> Result<()> {
        self.wait_until("the server is idle", |kept| kept.idle())
    }

    /// The keeper says exactly these restarts, and that each was a SIGKILL.
    pub fn check_restarts(&mut self, kills: u64) -> Result<()> {
        self.wait_until("the keeper has started the next server", |kept| {
            Ok(kept.status()?.keeper.restarts >= kills)
        })?;
        let keeper = self.status()?.keeper;
        ensure!(
            (keeper.restarts, keeper.deaths) == (kills, kills),
            "the server was killed {kills} times, but the keeper says {} restarts and {} deaths ({})",
            keeper.restarts,
            keeper.deaths,
            keeper.last_exit.unwrap_or_default()
        );
        for event in self.events(EVENTS)? {
            if let Event::Died { status, .. } = event {
                ensure!(status.contains("SIGKILL"), "a server {status}");
            }
        }
        if !self.nested {
            return Ok(());
        }
        // A keeper that was killed told nothing, and one that lives has a server that does.
        for event in self.events(EVENTS_WITHIN)? {
            match event {
                Event::Died { pid, status, .. } => bail!("server {pid} {status} by itself"),
                Event::StartFailed { error } => bail!("a server that did not start: {error}"),
                _ => {}
            }
        }
        Ok(())
    }

    /// The kernel would ask the next instance for every inode: without that it would only send requests again, and most
    /// of what is looked for would not show.
    pub fn ensure_recoverable(&self) -> Result<()> {
        let recovery = self.status()?.recovery;
        ensure!(
            recovery.as_ref().is_some_and(fusectl::Recovery::supported),
            "the mount is not restartable: the kernel says {}",
            recovery.map_or("nothing".into(), |r| r.state)
        );
        Ok(())
    }

    /// A planned restart at rest: what the kernel shows is what the server has, and nothing else is there. The server
    /// must be idle, and nobody may use the mount any more; `excused`: see [`super::rest::excused`].
    pub fn at_rest(&mut self, excused: u64) -> Result<Rest> {
        let before = self.table.seen("recover", "end").reached;
        let keeper = self.status()?.keeper;
        kill(Pid::from_raw(keeper.keeper_pid), Signal::SIGHUP).context("SIGHUP to the keeper")?;
        self.wait_until("the planned restart", |kept| {
            Ok(kept.table.seen("recover", "end").reached > before)
        })?;
        let mut rest = Rest::parse(&self.said(), excused)?;
        // Whatever the kernel had yet to say has been said.
        self.wait_until_idle()?;
        rest.look_for_graves(&self.back())?;
        Ok(rest)
    }

    /// Ends the keeper in the regular way, and sees that nothing is left but the backing.
    pub fn stop(&mut self) -> Result<()> {
        let connection = self.status()?.keeper.connection;
        let mut keeper = self.keeper.take().context("no keeper")?;
        kill(Pid::from_raw(keeper.id() as i32), Signal::SIGTERM)?;
        let ended = wait_for("the keeper to unmount and end", self.setup.patience, || {
            Ok(keeper.try_wait()?.is_some())
        });
        if let Err(e) = ended {
            let scene = self.scene();
            self.keeper = Some(keeper);
            return Err(e.context(scene));
        }
        let status = keeper.wait()?;
        ensure!(
            status.success(),
            "the keeper ended with {status}: {}",
            self.tail()
        );
        for event in self.all_events()? {
            match event {
                Event::Unmounted { how } => {
                    let by_its_keeper = self.nested && how == "from outside";
                    ensure!(how == "clean" || by_its_keeper, "unmounted {how}");
                }
                Event::Busy { pids } => bail!("the mount was busy (pids {pids:?})"),
                Event::GaveUp { reason } => bail!("the keeper gave up: {reason}"),
                Event::Started { pid, .. } => ensure!(
                    !Path::new(&format!("/proc/{pid}")).exists(),
                    "the server {pid} is left over"
                ),
                _ => {}
            }
        }
        ensure!(
            !(Connection { id: connection }).exists(),
            "the connection {connection} is left over"
        );
        ensure!(
            mount::mount_at(&self.mnt())?.is_none(),
            "the mount is left over"
        );
        Ok(())
    }

    /// Those of the keeper's keeper too.
    fn all_events(&self) -> Result<Vec<Event>> {
        let mut events = self.events(EVENTS)?;
        if self.nested {
            events.extend(self.events(EVENTS_WITHIN)?);
        }
        Ok(events)
    }

    fn events(&self, file: &str) -> Result<Vec<Event>> {
        let text = fs::read_to_string(self.dir.join(file))?;
        // The last line may still be being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let parse = |line| Ok(serde_json::from_str::<Record>(line)?.event);
        whole.lines().map(parse).collect()
    }

    fn said(&self) -> String {
        fs::read_to_string(self.dir.join("said")).unwrap_or_default()
    }

    /// The last of what keeper and server said.
    pub fn tail(&self) -> String {
        let said = self.said();
        let lines: Vec<&str> = said.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n      ")
    }

    /// Where everybody is, for the report of somebody who hangs.
    pub fn scene(&self) -> String {
        let status = match self.status() {
            Ok(report) => {
                let pid = report.keeper.server_pid.unwrap_or(0);
                let recovery = report.recovery.map(|r| r.state).unwrap_or_default();
                let waiting = fusectl::waiting(report.keeper.connection).ok();
                format!(
                    "keeper {}, server {pid}, kernel {recovery}, waiting {waiting:?}, {}",
                    report.keeper.keeper_state,
                    tasks(pid).join("; ")
                )
            }
            Err(e) => format!("{e:#}"),
        };
        format!("{status}\n      {}", self.tail())
    }

    /// Takes everything down, whatever state it is in.
    fn abandon(&mut self) {
        if let Ok(report) = self.status() {
            let _ = Connection {
                id: report.keeper.connection,
            }
            .abort();
        }
        if let Some(mut keeper) = self.keeper.take() {
            let _ = kill(Pid::from_raw(keeper.id() as i32), Signal::SIGTERM);
            let deadline = Instant::now() + Duration::from_secs(3);
            while Instant::now() < deadline && matches!(keeper.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(5));
            }
            let _ = keeper.kill();
            let _ = keeper.wait();
            // Its own children, by the pids that it reported; they are gone if it could end by itself.
            for event in self.all_events().unwrap_or_default() {
                if let Event::Started { pid, .. } = event {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                }
            }
        }
        let _ = umount2(&self.mnt(), MntFlags::MNT_DETACH);
    }
}

impl Drop for Kept<'_> {
    fn drop(&mut self) {
        if self.keeper.is_some() {
            self.abandon();
        }
        // Never into a mount: the directory of it must go first.
        if fs::remove_dir(self.mnt()).is_ok() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

fn tasks(pid: i32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    tasks
        .filter_map(|task| task.file_name().to_str()?.parse().ok())
        .map(crate::raw::app::describe)
        .collect()
}

/// Every thread that reads requests sleeps, and there are some.
fn workers_wait(pid: i32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    let mut workers = 0;
    for task in tasks.flatten() {
        let Ok(stat) = fs::read_to_string(task.path().join("stat")) else {
            return false;
        };
        if stat.contains("(fuser-") {
            workers += 1;
            if !stat.contains(") S ") {
                return false;
            }
        }
    }
    workers > 0
}

/// What every process finds in its directory, see [`super::steps`].
fn prepare(back: &Path, workload: &Workload) -> Result<()> {
    for proc in &workload.procs {
        let dir = back.join(format!("p{}", proc.id));
        fs::create_dir(&dir)?;
        let mut made = vec![dir.clone()];
        for n in 0..4u8 {
            let file = dir.join(format!("f{n}"));
            fs::write(&file, pattern(5000 * (usize::from(n) + 1), 200 + n))?;
            made.push(file);
        }
        for name in ["d0", "e0", "e1", "e2"] {
            fs::create_dir(dir.join(name))?;
            made.push(dir.join(name));
        }
        for name in ["d0/x0", "h0", "a0"] {
            fs::write(dir.join(name), name)?;
            made.push(dir.join(name));
        }
        fs::hard_link(dir.join("h0"), dir.join("h1"))?;
        symlink("f0", dir.join("l0"))?;
        set_attribute(&dir.join("a0"))?;
        if proc.many {
            fs::create_dir(dir.join("many"))?;
            made.push(dir.join("many"));
            for n in 0..60 {
                fs::write(dir.join(format!("many/s{n}")), b"")?;
            }
        }
        for path in made.iter().filter(|_| proc.uid != 0) {
            chown(path, Some(proc.uid), Some(proc.uid))?;
        }
    }
    // So that other users come to their directories.
    fs::set_permissions(back, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn set_attribute(path: &Path) -> Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let value = b"value";
    // SAFETY: strings are NUL-terminated, the value is readable for its length.
    let ret = unsafe {
        libc::setxattr(
            path.as_ptr(),
            c"user.k0".as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    nix::errno::Errno::result(ret).context("this file system has no user.* attributes")?;
    Ok(())
}
