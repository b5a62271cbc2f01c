// SPDX-License-Identifier: GPL-2.0
//! The ways in which a keeper ends: asked to, unmounted under it, aborted, given up, or failed.

use std::time::Instant;

use anyhow::{anyhow, Result};
use nix::errno::Errno;
use tracing::{error, info, warn};

use super::super::events::Event;
use super::super::mount::Ours;
use super::super::unmounter::{How, Outcome};
use super::{describe, Dead, End, Phase, Supervisor, KILL_AGAIN};
use crate::fusectl;

impl Supervisor {
    /// Unmounted, by us or from outside, or aborted.
    pub(super) fn on_connection_gone(&mut self, dead: &Dead) -> Result<Option<End>> {
        if !self.mounted || !self.still_mounted() {
            if self.mounted {
                // Ours may have come through in the kernel before its thread told us.
                self.unmounted(match self.unmounter.running() {
                    true => "clean",
                    false => "from outside",
                });
            }
            return Ok(Some(End::Clean));
        }
        let reason = format!(
            "the kernel's connection of {} was aborted (through {} or by a time limit), and the server {}: open files are lost; start the keeper again",
            self.status.mountpoint,
            fusectl::directory(self.connection).join("abort").display(),
            describe(dead.status)
        );
        Ok(Some(self.give_up(reason)))
    }

    /// SIGTERM or SIGINT.
    pub(super) fn on_stop_request(&mut self) -> Result<()> {
        self.stop_requests += 1;
        if !self.mounted {
            return Ok(());
        }
        if self.borrowed {
            self.hand_back();
            return Ok(());
        }
        if self.unmounter.running() {
            // It waits for somebody, and whoever sends this does not want to.
            return self.unmount_by_force();
        }
        // Writeback may need a server: do not keep one back.
        self.paused = false;
        if let Phase::Waiting(due @ None) = &mut self.phase {
            *due = Some(Instant::now());
        }
        let how = if self.unmounter.was_busy() {
            How::Lazily
        } else {
            How::Clean
        };
        match self.device.try_clone() {
            Ok(device) => self.unmounter.start(how, self.connection, device),
            Err(e) => error!(
                "cannot unmount {}: {e}; still serving",
                self.status.mountpoint
            ),
        }
        Ok(())
    }

    fn unmount_by_force(&mut self) -> Result<()> {
        match self.ours().end() {
            Ok(()) => self.unmounted("by force"),
            Err(_) if !self.still_mounted() => self.unmounted("from outside"),
            Err(e) => error!("cannot unmount {} by force: {e}", self.status.mountpoint),
        }
        Ok(())
    }

    /// The unmounter has come to an end.
    pub(super) fn on_unmounted(&mut self, outcome: Outcome) {
        match outcome.result {
            Ok(()) => self.unmounted(outcome.how.name()),
            // Somebody else was faster.
            Err(Errno::EINVAL | Errno::ENOENT) if !self.still_mounted() => {
                self.unmounted("from outside")
            }
            Err(Errno::EBUSY) => {
                let holders = outcome.holders;
                let list: Vec<_> = holders
                    .iter()
                    .map(|h| format!("{} ({}: {})", h.pid, h.name, h.how))
                    .collect();
                let who = match list.is_empty() {
                    true => "by something that is no process (a mount below or over it, a loop device, another namespace: see findmnt and losetup)".into(),
                    false => format!("by {}", list.join(", ")),
                };
                error!(
                    "{} is busy, held {who}; still serving. End what uses it and send SIGTERM to {}, or send SIGTERM now to detach it under them",
                    self.status.mountpoint,
                    self.status.keeper_pid
                );
                self.log.write(Event::Busy {
                    pids: holders.iter().map(|h| h.pid).collect(),
                });
            }
            Err(e) => error!(
                "cannot unmount {}: {e}; still serving",
                self.status.mountpoint
            ),
        }
    }

    pub(super) fn unmounted(&mut self, how: &str) {
        if !std::mem::replace(&mut self.mounted, false) {
            return;
        }
        self.log.write(Event::Unmounted { how: how.into() });
        match how {
            "clean" | "from outside" => info!("unmounted {} ({how})", self.status.mountpoint),
            _ => warn!(
                "unmounted {} {how}: whoever still has files open there gets errors from now on",
                self.status.mountpoint
            ),
        }
        self.end_server();
    }

    /// The server ends, and applications wait for the next one: the mount stays with who holds its descriptors.
    fn hand_back(&mut self) {
        self.mounted = false;
        self.log.write(Event::HandedBack);
        info!(
            "asked to end; {} stays with who holds its descriptors",
            self.status.mountpoint
        );
        self.end_server();
    }

    /// And we with it.
    fn end_server(&mut self) {
        match &self.phase {
            Phase::Running(instance) => {
                let pid = instance.pid;
                self.ask_to_end(pid);
            }
            // on_time ends it through restart(): no server is wanted any more.
            Phase::Waiting(_) => self.phase = Phase::Waiting(Some(Instant::now())),
            Phase::Clearing { .. } => {}
        }
    }

    pub(super) fn give_up(&mut self, reason: String) -> End {
        self.log.write(Event::GaveUp {
            reason: reason.clone(),
        });
        self.take_mount_away();
        let rest = match self.borrowed {
            true => "stays with who holds its descriptors",
            false => "is unmounted",
        };
        End::Failed(anyhow!(
            "gave up: {reason}; {} {rest}. What the server wrote to stderr is above; repair it and start the keeper again",
            self.status.mountpoint
        ))
    }

    pub(super) fn ours(&self) -> Ours<'_> {
        Ours {
            mountpoint: &self.mountpoint,
            connection: self.connection,
            device: &self.device,
        }
    }

    fn still_mounted(&self) -> bool {
        self.ours().is_there()
    }

    pub(super) fn take_mount_away(&mut self) {
        if std::mem::replace(&mut self.mounted, false) && !self.borrowed {
            match self.ours().end() {
                Ok(()) => self.log.write(Event::Unmounted {
                    how: "by force".into(),
                }),
                Err(_) if !self.still_mounted() => self.log.write(Event::Unmounted {
                    how: "from outside".into(),
                }),
                Err(e) => error!(
                    "cannot unmount {}: {e}; try: umount -l {0}",
                    self.status.mountpoint
                ),
            }
        }
    }
}

impl Drop for Supervisor {
    /// However the keeper ends, no mount of its own and no server stays behind.
    fn drop(&mut self) {
        self.take_mount_away();
        if let Phase::Running(instance) = &self.phase {
            let pid = instance.pid;
            self.remains.kill(pid);
            while !self.remains.gone(pid) {
                self.remains.kill(pid);
                std::thread::sleep(KILL_AGAIN);
            }
        }
    }
}
