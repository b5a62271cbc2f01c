// SPDX-License-Identifier: GPL-2.0
//! From a command line to a keeper whose first server runs: on a mount of its own, or on one that it was handed.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rust_fuse_notify::std::state::State;
use rust_fuse_notify::std::watched::MAX_TRIES_VARIABLE;
use tracing::{info, warn};

use super::super::adopted;
use super::super::events::{Event, EventLog};
use super::super::mount::{self, MountOptions};
use super::super::remains::Remains;
use super::super::spawn::Program;
use super::super::status_file::{Status, StatusFile};
use super::super::tell::{self, Told};
use super::super::unmounter::Unmounter;
use super::super::Args;
use super::{Phase, Supervisor};
use crate::fusectl;

const HANDLED: [Signal; 6] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGCHLD,
];

/// What will be mounted, or is.
struct Place {
    mountpoint: PathBuf,
    device: OwnedFd,
    state: OwnedFd,
    /// Mounted by who handed us the descriptors.
    connection: Option<u32>,
}

impl Place {
    fn find(path: &Path) -> Result<Place> {
        if let Some(taken) = adopted::take(path)? {
            return Ok(Place {
                mountpoint: taken.mountpoint,
                device: taken.device,
                state: taken.state,
                connection: Some(taken.connection),
            });
        }
        Ok(Place {
            mountpoint: mount::check_mountpoint(path)?,
            device: mount::open_device()?,
            state: new_state()?,
            connection: None,
        })
    }
}

impl Supervisor {
    /// Everything that can be wrong with the command line or the machine shows here, before or with the first start.
    pub fn set_up(args: &Args) -> Result<Self> {
        let program = Program::new(&args.server)?
            .with_variable(MAX_TRIES_VARIABLE, args.max_tries.to_string());
        let place = Place::find(&args.mountpoint)?;
        let borrowed = place.connection.is_some();
        let log = EventLog::open(args.json.as_deref())?;
        let signals = block_signals()?;
        if let Err(e) = fusectl::ensure_mounted() {
            warn!("{e}; the keeper works without it, but `fuse-restart status` shows less");
        }
        let fsname = args.fsname.clone().unwrap_or_else(|| program.name().into());
        let options = MountOptions {
            fsname,
            allow_other: args.allow_other,
        };
        // Whatever can fail comes before the mount.
        let unmounter = Unmounter::new(place.mountpoint.clone())?;
        let status_file = status_file(&place);
        let connection = match place.connection {
            Some(connection) => connection,
            None => mount::mount_fuse(&place.device, &place.mountpoint, &options)?,
        };
        let status = Status {
            mountpoint: place.mountpoint.display().to_string(),
            keeper_pid: std::process::id() as i32,
            keeper_state: "waiting".into(),
            held_back: false,
            server_pid: None,
            server_command: shell_words(&args.server),
            restarts: 0,
            deaths: 0,
            last_exit: None,
            connection,
            last_notification: None,
        };
        let mut keeper = Self {
            program,
            unmounter,
            mountpoint: place.mountpoint,
            options,
            device: place.device,
            state: place.state,
            connection,
            mounted: true,
            borrowed,
            remains: Remains::new(),
            backoff: args.backoff(),
            watchdog: args.watchdog(),
            refused: 0,
            phase: Phase::Waiting(None),
            signals,
            stop_requests: 0,
            paused: false,
            planned: false,
            kill_at: None,
            upgrade_test: args.upgrade_test.clone(),
            trial: None,
            log,
            status_file,
            status,
        };
        keeper.begin()?;
        Ok(keeper)
    }

    fn begin(&mut self) -> Result<()> {
        let (mountpoint, connection) = (self.status.mountpoint.clone(), self.connection);
        self.log.write(match self.borrowed {
            false => Event::Mounted {
                mountpoint,
                connection,
            },
            true => Event::Adopted {
                mountpoint,
                connection,
            },
        });
        if self.borrowed {
            // The last keeper may have died together with its server, without a word.
            match tell::server_died(&self.device, tell::init_stored(&self.state)) {
                // The first keeper on this mount: its server finds INIT.
                Told::NeverInitialised => {}
                told => self.on_told(told)?,
            }
        }
        // Before the server is there, which may be a keeper that looks whether somebody tells the mount's status already.
        self.phase = Phase::Waiting(Some(Instant::now()));
        self.publish();
        // A first start that fails is a wrong command line, not a crash: no second try. Drop unmounts.
        self.start()?;
        info!(
            "{} {} (connection {connection}); what a dead server leaves is found by {}",
            if self.borrowed {
                "took over"
            } else {
                "mounted"
            },
            self.status.mountpoint,
            self.remains.describe()
        );
        Ok(())
    }
}

/// Who handed us the mount may be a keeper that tells its status itself.
fn status_file(place: &Place) -> Option<StatusFile> {
    if place.connection.is_some() && StatusFile::is_of_another(&place.mountpoint) {
        return None;
    }
    let created = StatusFile::create(&place.mountpoint);
    created
        .inspect_err(|e| {
            warn!("no status file: {e}; `fuse-restart status` will not find this mount")
        })
        .ok()
}

/// The library decides how large it must be. It outlives every server, and dies with the keeper.
pub(super) fn new_state() -> Result<OwnedFd> {
    State::create_memfd().context("memfd for the server's state")
}

fn block_signals() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    HANDLED.iter().for_each(|s| set.add(*s));
    nix::sys::signal::sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)
        .context("sigprocmask")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")
}

fn shell_words(words: &[std::ffi::OsString]) -> String {
    words
        .iter()
        .map(|w| w.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
