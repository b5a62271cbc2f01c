// SPDX-License-Identifier: GPL-2.0
//! The time limit of a run.
//!
//! A task that waits in FUSE may not even be killable, so at the limit the connection is aborted: everybody who waits
//! in the mount gets an error, and every thread of the demo comes to its end by itself.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{killpg, Signal};
use nix::unistd::Pid;

use crate::keep::events::now_ns;
use crate::keep::mount;

#[derive(Default)]
struct State {
    done: bool,
    /// Why the run was cut short.
    cut: Option<String>,
    /// ... and when, on CLOCK_MONOTONIC.
    cut_at: Option<u64>,
    /// The process group of the command that runs now.
    command: Option<i32>,
}

pub struct Watchdog {
    state: Mutex<State>,
    changed: Condvar,
    mountpoint: PathBuf,
}

impl Watchdog {
    pub fn start(limit: Duration, mountpoint: PathBuf) -> Arc<Self> {
        let dog = Arc::new(Self {
            state: Mutex::default(),
            changed: Condvar::new(),
            mountpoint,
        });
        let watching = dog.clone();
        std::thread::spawn(move || watching.watch(limit));
        dog
    }

    fn watch(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut state = self.state.lock().expect("no panic inside");
        while !state.done && state.cut.is_none() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(state);
                return self.cut(&format!("not done within its {} s", limit.as_secs()));
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .expect("no panic inside")
                .0;
        }
    }

    /// Ends the run now.
    pub fn cut(&self, why: &str) {
        let mut state = self.state.lock().expect("no panic inside");
        if state.done || state.cut.is_some() {
            return;
        }
        state.cut = Some(why.to_owned());
        state.cut_at = Some(now_ns());
        if let Some(group) = state.command {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        let _ = mount::unmount_by_force(&self.mountpoint);
        self.changed.notify_all();
    }

    pub fn why_cut(&self) -> Option<String> {
        self.state.lock().expect("no panic inside").cut.clone()
    }

    pub fn cut_at(&self) -> Option<u64> {
        self.state.lock().expect("no panic inside").cut_at
    }

    /// The command that a cut has to end. False: the run was cut already.
    pub fn command(&self, group: Option<i32>) -> bool {
        let mut state = self.state.lock().expect("no panic inside");
        state.command = group;
        if let (Some(group), true) = (group, state.cut.is_some()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        state.cut.is_none()
    }

    /// The run came to its own end.
    pub fn done(&self) {
        self.state.lock().expect("no panic inside").done = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;

    #[test]
    fn a_command_ends_at_the_limit() {
        let dog = Watchdog::start(Duration::from_millis(50), "/no/such/mount".into());
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .process_group(0)
            .spawn()
            .unwrap();
        dog.command(Some(child.id() as i32));
        assert!(!child.wait().unwrap().success());
        assert!(dog.why_cut().unwrap().contains("not done within"));
        assert!(dog.cut_at().unwrap() <= now_ns());
        assert!(!dog.command(None));
    }

    #[test]
    fn a_run_that_is_done_is_not_cut() {
        let dog = Watchdog::start(Duration::from_secs(1000), "/no/such/mount".into());
        dog.done();
        dog.cut("late");
        assert_eq!(dog.why_cut(), None);
    }
}
