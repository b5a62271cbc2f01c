// SPDX-License-Identifier: GPL-2.0
//! A server that hangs, and one that keeps dying of one request.

use std::os::fd::AsFd;
use std::time::Instant;

use nix::sys::signal::{kill, Signal};
use rust_fuse_notify::std::state;
use tracing::{error, warn};

use super::super::events::Event;
use super::super::watchdog;
use super::{Phase, Supervisor};

impl Supervisor {
    pub(super) fn look_for_hang(&mut self, now: Instant) {
        let (Phase::Running(instance), Some(watchdog)) = (&self.phase, &mut self.watchdog) else {
            return;
        };
        if watchdog.next > now {
            return;
        }
        let pid = instance.pid;
        let look = watchdog::look(pid, self.connection, &self.state);
        if !watchdog.look(look.clone(), now) {
            return;
        }
        watchdog.restart(now);
        let what = look.describe();
        error!(
            "server (pid {pid}) hangs: {what}; its threads:\n{}killing it",
            watchdog::stacks(pid)
        );
        self.log.write(Event::Hung {
            pid: pid.as_raw(),
            what,
        });
        let _ = kill(pid, Signal::SIGKILL);
        // The marks of a killed server stay as they are.
        if let Err(e) = state::blame(self.state.as_fd(), &look.in_hands) {
            warn!("cannot write down what the server hung with: {e}");
        }
    }

    /// The last instance may have died, but not for nothing.
    pub(super) fn count_refused(&mut self) {
        let Ok(pulse) = state::pulse(self.state.as_fd()) else {
            return;
        };
        if pulse.refused > self.refused {
            self.backoff.progress();
            self.log.write(Event::RequestsRefused {
                total: pulse.refused,
            });
        }
        self.refused = pulse.refused;
    }
}
