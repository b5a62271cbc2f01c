// SPDX-License-Identifier: GPL-2.0
//! A planned restart, and who says beforehand whether what comes next can take over.
//!
//! A server that was ended cannot be had back. So with `--upgrade-test` the successor is tried first, beside the one that
//! serves and without a descriptor of the mount, and only if it passes that one is asked to end.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{killpg, SigSet, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::Pid;
use tracing::{error, info};

use super::super::events::Event;
use super::super::spawn::pidfd_open;
use super::{describe, readable, Phase, Supervisor};

/// How long a test may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What the test finds in its environment: the pid of the server that it is about.
const SERVER_VARIABLE: &str = "FUSE_RESTART_SERVER";

/// A test that runs; killed if it is dropped.
pub(super) struct Trial {
    pid: Pid,
    pidfd: OwnedFd,
    server: Pid,
    pub(super) until: Instant,
    reaped: bool,
}

impl Trial {
    fn start(command: &OsStr, server: Pid) -> Result<Trial> {
        let mut shell = Command::new("sh");
        shell
            .arg("-c")
            .arg(command)
            .env(SERVER_VARIABLE, server.to_string())
            .stdin(Stdio::null())
            .process_group(0);
        for name in ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"] {
            shell.env_remove(name);
        }
        // SAFETY: only system calls, which are async-signal-safe, and no memory.
        unsafe {
            shell.pre_exec(|| {
                SigSet::empty().thread_set_mask()?;
                // Descriptors of the mount, if a keeper above us handed them on.
                libc::syscall(
                    libc::SYS_close_range,
                    3,
                    u32::MAX,
                    libc::CLOSE_RANGE_CLOEXEC,
                );
                Ok(())
            });
        }
        let child = shell.spawn().context("cannot run sh")?;
        let pid = Pid::from_raw(child.id() as i32);
        Ok(Trial {
            pidfd: pidfd_open(pid)?,
            pid,
            server,
            until: Instant::now() + LIMIT,
            reaped: false,
        })
    }

    pub(super) fn pid(&self) -> Pid {
        self.pid
    }

    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// What came of it; `Err`: why it did not pass.
    fn finished(&mut self, now: Instant) -> Option<Result<(), String>> {
        if readable(&self.pidfd) {
            self.reaped = true;
            return Some(match waitpid(self.pid, None) {
                Ok(WaitStatus::Exited(_, 0)) => Ok(()),
                Ok(status) => Err(describe(status)),
                Err(errno) => Err(format!("its end was missed: {errno}")),
            });
        }
        (self.until <= now).then(|| Err(format!("took longer than {} s", LIMIT.as_secs())))
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = killpg(self.pid, Signal::SIGKILL);
            // Without waiting: should it ask the mount something, it waits for a server, and so would the keeper, which
            // alone can start one. Who is not gone yet is reaped with the remains of the server.
            let _ = waitpid(self.pid, Some(WaitPidFlag::WNOHANG));
        }
    }
}

impl Supervisor {
    /// SIGHUP.
    pub(super) fn on_upgrade(&mut self) {
        let Phase::Running(instance) = &self.phase else {
            info!("a restart is on its way already");
            return;
        };
        let server = instance.pid;
        let Some(command) = &self.upgrade_test else {
            self.restart_on_purpose(server);
            return;
        };
        if self.trial.is_some() {
            info!("what is to follow is being tried already");
            return;
        }
        match Trial::start(command, server) {
            Ok(trial) => {
                info!(
                    "planned restart: trying first what is to follow (pid {})",
                    trial.pid()
                );
                self.trial = Some(trial);
            }
            Err(e) => self.goes_on(server, &format!("{e:#}")),
        }
    }

    pub(super) fn look_at_trial(&mut self, now: Instant) {
        let Some(trial) = &mut self.trial else { return };
        let Some(outcome) = trial.finished(now) else {
            return;
        };
        let server = trial.server;
        self.trial = None;
        match (outcome, &self.phase) {
            (Ok(()), Phase::Running(instance)) if instance.pid == server => {
                self.log.write(Event::Tried {
                    passed: true,
                    how: None,
                });
                self.restart_on_purpose(server);
            }
            // It has died meanwhile, and is replaced anyway.
            (Ok(()), _) => {}
            (Err(how), _) => self.goes_on(server, &how),
        }
    }

    fn goes_on(&mut self, server: Pid, how: &str) {
        error!(
            "what is to follow did not pass the test ({how}; see above for what it said): the server (pid {server}) goes \
             on; mend it and send SIGHUP again"
        );
        self.log.write(Event::Tried {
            passed: false,
            how: Some(how.to_owned()),
        });
    }

    fn restart_on_purpose(&mut self, server: Pid) {
        info!("planned restart of the server (pid {server})");
        self.ask_to_end(server);
    }
}

/// An empty one would pass always.
pub fn command(text: &str) -> Result<OsString, String> {
    match text.trim() {
        "" => Err("a command for sh -c".into()),
        text => Ok(text.into()),
    }
}
