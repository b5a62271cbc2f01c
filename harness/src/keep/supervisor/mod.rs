// SPDX-License-Identifier: GPL-2.0
//! The keeper's one loop.
//!
//! It waits in poll(2) only, for a signal, the server's death (pidfd), the end of an unmount, or the next deadline,
//! and never asks the mounted file system anything: that could wait for the server which only this loop can start.

mod ending;
mod hang;
mod setup;
pub mod upgrade;

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{bail, Context, Result};
use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::{kill, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;
use tracing::{info, warn};

use super::backoff::{Backoff, Decision};
use super::events::{Event, EventLog};
use super::mount::{self, MountOptions};
use super::remains::Remains;
use super::spawn::{Instance, Program};
use super::status_file::{Status, StatusFile};
use super::tell::{self, Told};
use super::unmounter::Unmounter;
use super::watchdog::Watchdog;
use crate::fusectl;
use setup::new_state;

/// How long a server gets to end by itself when asked to.
const GRACE: Duration = Duration::from_secs(10);
/// How often a remainder that will not die is killed again.
const KILL_AGAIN: Duration = Duration::from_millis(20);
/// How long until we say that something will not die.
const COMPLAIN_AFTER: Duration = Duration::from_secs(5);

enum Phase {
    Running(Instance),
    /// The instance is dead; its remains are being killed.
    Clearing {
        dead: Dead,
        since: Instant,
        complained: bool,
    },
    /// No instance; the next one is due then. None: when somebody says so.
    Waiting(Option<Instant>),
}

#[derive(Clone)]
struct Dead {
    pid: Pid,
    status: WaitStatus,
    lived: Duration,
    /// Had it taken over, as far as anybody can tell?
    was_serving: bool,
}

/// How the keeper ends.
enum End {
    Clean,
    Failed(anyhow::Error),
}

pub struct Supervisor {
    program: Program,
    mountpoint: PathBuf,
    options: MountOptions,
    device: OwnedFd,
    state: OwnedFd,
    connection: u32,
    mounted: bool,
    /// The mount is of who handed us its descriptors: not ours to take away or to make anew.
    borrowed: bool,
    remains: Remains,
    backoff: Backoff,
    watchdog: Option<Watchdog>,
    /// Requests that were refused, when the last instance died.
    refused: u64,
    phase: Phase,
    signals: SignalFd,
    unmounter: Unmounter,
    /// Requests to stop, so far.
    stop_requests: u32,
    paused: bool,
    /// The running instance was asked to end: no failure when it does.
    planned: bool,
    /// ... and this is how long it may take.
    kill_at: Option<Instant>,
    /// What is to pass before a planned restart, for `sh -c`.
    upgrade_test: Option<OsString>,
    trial: Option<upgrade::Trial>,
    log: EventLog,
    status_file: Option<StatusFile>,
    status: Status,
}

impl Supervisor {
    pub fn run(mut self) -> Result<ExitCode> {
        let end = loop {
            match self.turn() {
                Ok(None) => {}
                Ok(Some(end)) => break end,
                Err(e) => break End::Failed(e),
            }
        };
        match end {
            End::Clean => Ok(ExitCode::SUCCESS),
            End::Failed(e) => Err(e),
        }
    }

    fn turn(&mut self) -> Result<Option<End>> {
        self.publish();
        self.wait()?;
        while let Some(signal) = self.signals.read_signal().context("reading the signalfd")? {
            if let Some(end) = self.on_signal(signal.ssi_signo as i32)? {
                return Ok(Some(end));
            }
        }
        if let Some(outcome) = self.unmounter.finished() {
            self.on_unmounted(outcome);
        }
        self.on_time()
    }

    // ---- waiting ----

    fn wait(&self) -> Result<()> {
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.unmounter.as_fd(), PollFlags::POLLIN),
        ];
        if let Phase::Running(instance) = &self.phase {
            fds.push(PollFd::new(instance.pidfd.as_fd(), PollFlags::POLLIN));
        }
        if let Some(trial) = &self.trial {
            fds.push(PollFd::new(trial.pidfd(), PollFlags::POLLIN));
        }
        let timeout = match self.next_deadline() {
            None => PollTimeout::NONE,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now());
                // Rounded up, or the last fraction of a millisecond would be a busy loop.
                let ms = left.as_micros().div_ceil(1000);
                PollTimeout::try_from(ms.min(3_600_000) as u32).expect("fits")
            }
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(e).context("poll"),
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Running(_) => [
                self.kill_at,
                self.watchdog.as_ref().map(|w| w.next),
                self.trial.as_ref().map(|t| t.until),
            ]
            .into_iter()
            .flatten()
            .min(),
            Phase::Clearing { .. } => Some(Instant::now() + KILL_AGAIN),
            Phase::Waiting(due) => *due,
        }
    }

    // ---- what can happen ----

    fn on_signal(&mut self, signal: i32) -> Result<Option<End>> {
        match signal {
            libc::SIGTERM | libc::SIGINT => self.on_stop_request()?,
            libc::SIGHUP => self.on_upgrade(),
            libc::SIGUSR1 => {
                info!("restarts are held back until SIGUSR2");
                self.paused = true;
                if let Phase::Waiting(due) = &mut self.phase {
                    *due = None;
                }
            }
            libc::SIGUSR2 => {
                self.paused = false;
                if let Phase::Waiting(due) = &mut self.phase {
                    *due = Some(Instant::now());
                }
            }
            // SIGCHLD: the remains of a dead instance are looked at in on_time.
            _ => {
                if let Phase::Running(instance) = &self.phase {
                    let trial = self.trial.as_ref().map(upgrade::Trial::pid);
                    Remains::reap_strays(instance.pid, trial);
                }
            }
        }
        Ok(None)
    }

    fn on_time(&mut self) -> Result<Option<End>> {
        let now = Instant::now();
        self.look_for_hang(now);
        self.look_at_trial(now);
        if let Phase::Running(instance) = &self.phase {
            if readable(&instance.pidfd) {
                self.on_death()?;
            } else if self.kill_at.is_some_and(|at| at <= now) {
                warn!(
                    "server (pid {}) did not end within {} s of being asked to: killing it",
                    instance.pid,
                    GRACE.as_secs()
                );
                let _ = kill(instance.pid, Signal::SIGKILL);
                self.kill_at = None;
            }
        }
        if let Phase::Clearing {
            dead,
            since,
            complained,
        } = &mut self.phase
        {
            let (dead, since) = (dead.clone(), *since);
            if self.remains.gone(dead.pid) {
                return self.on_cleared(dead, since);
            }
            if since.elapsed() > COMPLAIN_AFTER && !*complained {
                *complained = true;
                let left = self.remains.left(dead.pid);
                warn!(
                    "what is left of the dead server (pids {left:?}) will not die; it must, before another may start. \
                     If it hangs in the kernel, /proc/PID/stack says where; SIGTERM twice gives the mount up"
                );
            }
            self.remains.kill(dead.pid);
        }
        if let Phase::Waiting(Some(due)) = &self.phase {
            if *due <= now {
                return self.restart();
            }
        }
        Ok(None)
    }

    /// The server is dead, as the pidfd says; what it forked may live.
    fn on_death(&mut self) -> Result<()> {
        let Phase::Running(instance) = &self.phase else {
            return Ok(());
        };
        let (pid, lived) = (instance.pid, instance.started.elapsed());
        // What it was about is gone.
        self.trial = None;
        self.remains.kill(pid);
        let status = nix::sys::wait::waitpid(pid, None)
            .with_context(|| format!("waiting for the server (pid {pid})"))?;
        let recovery = fusectl::recovery(self.connection).ok().flatten();
        let was_serving = recovery
            .as_ref()
            .is_none_or(|r| r.serving() || !r.supported());
        self.status.deaths += 1;
        self.status.server_pid = None;
        self.status.last_exit = Some(describe(status));
        self.log.write(Event::Died {
            pid: pid.as_raw(),
            status: describe(status),
            lived_ns: lived.as_nanos() as u64,
            connected: !mount::connection_gone(&self.device),
            recovery,
        });
        let dead = Dead {
            pid,
            status,
            lived,
            was_serving,
        };
        self.phase = Phase::Clearing {
            dead,
            since: Instant::now(),
            complained: false,
        };
        Ok(())
    }

    /// Nothing of the dead instance is left.
    fn on_cleared(&mut self, dead: Dead, since: Instant) -> Result<Option<End>> {
        self.kill_at = None;
        self.phase = Phase::Waiting(None);
        if !self.mounted || mount::connection_gone(&self.device) {
            return self.on_connection_gone(&dead);
        }
        let told = tell::server_died(&self.device, tell::init_stored(&self.state));
        self.log.write(Event::Cleared {
            pid: dead.pid.as_raw(),
            took_ns: since.elapsed().as_nanos() as u64,
        });
        self.on_told(told)?;
        if !self.mounted {
            return Ok(Some(End::Clean));
        }
        let ended = describe(dead.status);
        self.count_refused();
        let decision = if self.planned {
            self.backoff.planned()
        } else {
            self.backoff.died(dead.lived, dead.was_serving)
        };
        match decision {
            Decision::GiveUp(times) => {
                let reason = format!(
                    "the server ({}) came to nothing {times} times in a row, the last one (pid {}) {ended} after {:.1} s",
                    self.program.name(),
                    dead.pid,
                    dead.lived.as_secs_f64()
                );
                Ok(Some(self.give_up(reason)))
            }
            Decision::StartAfter(pause) => {
                if !self.planned {
                    warn!(
                        "server (pid {}) {ended}; next one in {} ms",
                        dead.pid,
                        pause.as_millis()
                    );
                }
                let held_back = self.paused && self.stop_requests == 0;
                self.log.write(Event::Waiting {
                    delay_ns: (!held_back).then_some(pause.as_nanos() as u64),
                });
                self.phase = Phase::Waiting((!held_back).then(|| Instant::now() + pause));
                Ok(None)
            }
        }
    }

    fn on_told(&mut self, told: Told) -> Result<()> {
        let (how, error) = match told {
            Told::Restarted => ("restarted", None),
            Told::Resent => {
                if self.status.last_notification.as_deref() != Some("resent") {
                    warn!(
                        "this kernel, or this server's INIT, knows no recovery: unanswered requests were only sent again; \
                         nothing is promised of names and attributes that the kernel cached, of lookup counts, and of \
                         order (see Documentation/server-authors.md)"
                    );
                }
                ("resent", None)
            }
            Told::Refused(e) => {
                warn!("the kernel refused to be told of the server's death: {e}; the next server will say it again");
                ("refused", Some(e.to_string()))
            }
            Told::NeverInitialised if self.stop_requests > 0 => {
                self.take_mount_away();
                return Ok(());
            }
            Told::NeverInitialised if self.borrowed => bail!(
                "the server died before it had answered INIT: whoever holds the descriptors of {} has to mount it afresh",
                self.status.mountpoint
            ),
            Told::NeverInitialised => {
                return self.mount_afresh("the server died before it had answered INIT")
            }
        };
        self.status.last_notification = Some(how.into());
        self.log.write(Event::Notified {
            how: how.into(),
            error,
        });
        Ok(())
    }

    // ---- what is done ----

    fn start(&mut self) -> Result<()> {
        let instance = self.program.start(
            self.device.as_fd(),
            self.state.as_fd(),
            self.remains.new_cgroup(),
        )?;
        self.log.write(Event::Started {
            pid: instance.pid.as_raw(),
            restarts: self.status.restarts,
        });
        info!("server started, pid {}", instance.pid);
        self.status.server_pid = Some(instance.pid.as_raw());
        self.phase = Phase::Running(instance);
        self.planned = false;
        self.kill_at = None;
        if let Some(watchdog) = &mut self.watchdog {
            watchdog.restart(Instant::now());
        }
        Ok(())
    }

    fn restart(&mut self) -> Result<Option<End>> {
        if !self.mounted {
            return Ok(Some(End::Clean));
        }
        self.status.restarts += 1;
        let Err(e) = self.start() else {
            return Ok(None);
        };
        // A binary may be missing for a moment during an upgrade: an attempt that failed, like a crash.
        self.log.write(Event::StartFailed {
            error: format!("{e:#}"),
        });
        match self.backoff.died(Duration::ZERO, false) {
            Decision::GiveUp(times) => Ok(Some(self.give_up(format!("{e:#} (attempt {times})")))),
            Decision::StartAfter(pause) => {
                warn!("{e:#}; trying again in {} ms", pause.as_millis());
                self.phase = Phase::Waiting(Some(Instant::now() + pause));
                Ok(None)
            }
        }
    }

    fn ask_to_end(&mut self, pid: Pid) {
        let _ = kill(pid, Signal::SIGTERM);
        self.planned = true;
        self.kill_at = Some(Instant::now() + GRACE);
    }

    /// Nobody ever used the old mount: its first request was not answered. Who waits there gets an error.
    fn mount_afresh(&mut self, reason: &str) -> Result<()> {
        self.ours().end().with_context(|| {
            format!(
                "{reason}, and taking its mount {} away failed",
                self.status.mountpoint
            )
        })?;
        self.mounted = false;
        self.device = mount::open_device()?;
        self.state = new_state()?;
        self.connection = mount::mount_fuse(&self.device, &self.mountpoint, &self.options)?;
        self.mounted = true;
        self.status.connection = self.connection;
        info!("{reason}: fresh mount, connection {}", self.connection);
        self.log.write(Event::FreshMount {
            connection: self.connection,
            reason: reason.into(),
        });
        Ok(())
    }

    fn publish(&mut self) {
        let state = match &self.phase {
            Phase::Running(_) if self.unmounter.running() => "unmounting",
            Phase::Running(_) => "running",
            Phase::Clearing { .. } => "clearing",
            Phase::Waiting(None) => "paused",
            Phase::Waiting(Some(_)) => "waiting",
        };
        self.status.keeper_state = state.into();
        self.status.held_back = self.paused;
        if let Some(file) = &mut self.status_file {
            if let Err(e) = file.write(&self.status) {
                warn!("status file: {e}; `fuse-restart status` will not find this mount");
                self.status_file = None;
            }
        }
    }
}

fn readable(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
}

fn describe(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("exited with status {code}"),
        WaitStatus::Signaled(_, signal, core) => {
            format!(
                "was killed by {signal}{}",
                if core { " (core dumped)" } else { "" }
            )
        }
        other => format!("ended: {other:?}"),
    }
}
