// SPDX-License-Identifier: GPL-2.0
//! The applications of a scenario: an operation in a thread of its own, whose end rings a bell that the scripted
//! server can poll together with the device; or a whole process, where the scenario wants to kill it.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{fork, ForkResult, Pid};

use super::dev::poll_one;
use super::wait::wait_for;

/// Readable as soon as an application has finished since the bell was last silenced.
#[derive(Clone)]
pub struct Bell(Arc<EventFd>);

impl Bell {
    pub fn new() -> Result<Bell> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Bell(Arc::new(
            EventFd::from_flags(flags).context("eventfd")?,
        )))
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    pub fn ring(&self) {
        // The counter cannot overflow within a scenario.
        let _ = self.0.write(1);
    }

    pub fn silence(&self) {
        // EAGAIN: it was silent.
        let _ = self.0.read();
    }
}

/// An application in a thread.
pub struct App<T> {
    pub what: String,
    pub tid: i32,
    slot: Arc<Mutex<Option<T>>>,
    bell: Bell,
}

/// Lets SIGBUS and SIGSEGV kill this process, as they kill a C program: Rust's runtime catches both.
pub fn faults_kill() {
    use nix::sys::signal::{signal, SigHandler};
    for number in [Signal::SIGBUS, Signal::SIGSEGV] {
        // SAFETY: the default action runs no code of ours.
        let _ = unsafe { signal(number, SigHandler::SigDfl) };
    }
}

/// What the kit keeps of every application, to find out who hangs at the end.
pub struct AppWatch {
    pub what: String,
    pub tid: i32,
    done: Arc<Mutex<bool>>,
}

impl AppWatch {
    pub fn done(&self) -> bool {
        *self.done.lock().unwrap()
    }
}

impl<T: Send + 'static> App<T> {
    pub fn spawn(
        what: &str,
        bell: &Bell,
        run: impl FnOnce() -> T + Send + 'static,
    ) -> Result<(App<T>, AppWatch)> {
        let slot = Arc::new(Mutex::new(None));
        let done = Arc::new(Mutex::new(false));
        let (send, receive) = std::sync::mpsc::channel();
        let (slot2, done2, bell2) = (slot.clone(), done.clone(), bell.clone());
        std::thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(move || {
                let _ = send.send(nix::unistd::gettid().as_raw());
                let result = run();
                *slot2.lock().unwrap() = Some(result);
                *done2.lock().unwrap() = true;
                bell2.ring();
            })
            .with_context(|| format!("cannot start a thread for {what}"))?;
        let tid = receive
            .recv()
            .with_context(|| format!("the thread for {what} ended at once"))?;
        let app = App {
            what: what.to_owned(),
            tid,
            slot,
            bell: bell.clone(),
        };
        Ok((
            app,
            AppWatch {
                what: what.to_owned(),
                tid,
                done,
            },
        ))
    }

    pub fn done(&self) -> bool {
        self.slot.lock().unwrap().is_some()
    }

    /// The result, if there is one; only once.
    pub fn take(&self) -> Option<T> {
        self.slot.lock().unwrap().take()
    }

    /// Waits for the end of an application that nobody needs to serve any more.
    pub fn finish(&self, limit: Duration) -> Result<T> {
        let deadline = std::time::Instant::now() + limit;
        loop {
            self.bell.silence();
            if let Some(result) = self.take() {
                return Ok(result);
            }
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                bail!(
                    "{} did not end within {:.1} s; {}",
                    self.what,
                    limit.as_secs_f64(),
                    describe(self.tid)
                );
            }
            poll_one(
                self.bell.fd(),
                PollFlags::POLLIN,
                left.min(Duration::from_millis(50)),
            )?;
        }
    }

    /// Waits until the thread sleeps in the kernel: its request is on its way.
    pub fn wait_asleep(&self, limit: Duration) -> Result<()> {
        wait_asleep(self.tid, limit).with_context(|| self.what.clone())
    }

    /// How often the thread has gone to sleep by itself; endless if it is gone.
    pub fn times_asleep(&self) -> Result<u64> {
        times_asleep(self.tid)
    }
}

/// How often a thread has gone to sleep by itself; endless if it is gone.
pub fn times_asleep(tid: i32) -> Result<u64> {
    let Ok(status) = fs::read_to_string(format!("/proc/{tid}/status")) else {
        return Ok(u64::MAX);
    };
    let line = status
        .lines()
        .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
    Ok(line.context("no voluntary_ctxt_switches")?.trim().parse()?)
}

/// The state letter of a task, and where it sleeps.
pub fn describe(tid: i32) -> String {
    let read = |file: &str| fs::read_to_string(format!("/proc/{tid}/{file}")).unwrap_or_default();
    let stack: Vec<String> = read("stack")
        .lines()
        .take(12)
        .map(|l| l.trim().to_owned())
        .collect();
    format!(
        "task {tid}: state {}, in {} [{}]",
        state(tid).unwrap_or('?'),
        read("wchan"),
        stack.join(" < ")
    )
}

/// The state letter of a task (`/proc/TID/stat`), `None` when it is gone.
pub fn state(tid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{tid}/stat")).ok()?;
    // The command's name may hold anything, so look behind its last parenthesis.
    stat.rsplit_once(") ")?.1.chars().next()
}

pub fn wait_asleep(tid: i32, limit: Duration) -> Result<()> {
    wait_for(&format!("task {tid} to sleep"), limit, || {
        Ok(matches!(state(tid), Some('S' | 'D') | None))
    })
}

/// An application in a process of its own.
pub struct Proc {
    pub what: String,
    pub pid: Pid,
    pidfd: OwnedFd,
    reaped: Option<WaitStatus>,
}

impl Proc {
    /// Forks; the child drops `close` (the device must not live on in it), runs `run` and exits with its value.
    pub fn spawn(what: &str, close: &[RawFd], run: impl FnOnce() -> i32) -> Result<Proc> {
        // SAFETY: the child only runs `run` and leaves with _exit; glibc makes malloc usable after fork.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Child => {
                for fd in close {
                    // SAFETY: closing a number; the child owns its copy of the table.
                    unsafe { libc::close(*fd) };
                }
                let code = run();
                // SAFETY: _exit does not return and runs no handler of the parent.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                // SAFETY: pidfd_open takes plain integers and returns a new descriptor or an error.
                let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0) };
                ensure!(
                    fd >= 0,
                    "pidfd_open of {child}: {}",
                    std::io::Error::last_os_error()
                );
                // SAFETY: the descriptor was just made and nobody else owns it.
                let pidfd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
                Ok(Proc {
                    what: what.to_owned(),
                    pid: child,
                    pidfd,
                    reaped: None,
                })
            }
        }
    }

    pub fn tid(&self) -> i32 {
        self.pid.as_raw()
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid, signal)
            .with_context(|| format!("cannot send {signal} to {} ({})", self.what, self.pid))
    }

    pub fn wait_asleep(&self, limit: Duration) -> Result<()> {
        wait_asleep(self.tid(), limit).with_context(|| self.what.clone())
    }

    /// Whether it has ended by now.
    pub fn ended(&self) -> Result<bool> {
        self.ended_within(Duration::ZERO)
    }

    pub fn ended_within(&self, limit: Duration) -> Result<bool> {
        Ok(poll_one(self.pidfd.as_fd(), PollFlags::POLLIN, limit)?.contains(PollFlags::POLLIN))
    }

    /// Waits for the end.
    pub fn wait(&mut self, limit: Duration) -> Result<WaitStatus> {
        if let Some(status) = self.reaped {
            return Ok(status);
        }
        if !poll_one(self.pidfd.as_fd(), PollFlags::POLLIN, limit)?.contains(PollFlags::POLLIN) {
            bail!(
                "{} did not end within {:.1} s; {}",
                self.what,
                limit.as_secs_f64(),
                describe(self.tid())
            );
        }
        let status = waitpid(self.pid, None)?;
        self.reaped = Some(status);
        Ok(status)
    }

    /// Waits for the end and expects an exit code.
    pub fn wait_code(&mut self, limit: Duration) -> Result<i32> {
        match self.wait(limit)? {
            WaitStatus::Exited(_, code) => Ok(code),
            other => bail!("{} ended with {other:?}", self.what),
        }
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        if self.reaped.is_none() {
            let _ = kill(self.pid, Signal::SIGKILL);
            // A child that hangs even now is found by the runner, which aborts the connection.
            if self.wait(Duration::from_secs(2)).is_err() {
                eprintln!(
                    "{} ({}) outlived SIGKILL: {}",
                    self.what,
                    self.pid,
                    describe(self.tid())
                );
            }
        }
    }
}
