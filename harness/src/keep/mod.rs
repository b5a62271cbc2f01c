// SPDX-License-Identifier: GPL-2.0
//! `fuse-restart keep`: mounts, keeps the descriptor, and sees that a server serves it.
//!
//! The order that matters when a server dies: kill what is left of it, wait until that is *gone*, only then tell the
//! kernel, then start the next one.  [`supervisor`] is that order; everything else here is a part of it:
//!
//! * [`mount`]: the mount and its checks; [`adopted`]: a mount that somebody else keeps; [`busy`]: who keeps it from being unmounted;
//! * [`spawn`]: one instance with its descriptors; [`remains`]: what it may leave behind;
//! * [`tell`]: the notification; [`backoff`]: when to start the next one, and when to stop trying;
//! * [`watchdog`]: a server that lives and does nothing;
//! * [`events`], [`status_file`]: what others can see of it.

mod adopted;
pub mod backoff;
pub mod busy;
pub mod events;
pub mod mount;
pub mod remains;
pub mod spawn;
pub mod status_file;
mod supervisor;
mod tell;
mod unmounter;
mod watchdog;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Mount, keep the descriptor, start the server, and start it again whenever it dies.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
The server is started with the /dev/fuse descriptor and a memfd for its state, in the way of systemd's socket
activation: LISTEN_FDS=2, LISTEN_FDNAMES=fusedev:fusestate, LISTEN_PID.  When it dies, what is left of it is killed,
the kernel is told (FUSE_NOTIFY_RESTARTED; FUSE_NOTIFY_RESEND on kernels that do not know it), and it is started
again; applications wait meanwhile, and go on.

Signals:
  SIGTERM, SIGINT  unmount, then stop the server.  If the mount is in use, says by whom and goes on serving;
                   a second one unmounts lazily and stops
  SIGHUP           planned restart: SIGTERM to the server, then the next instance (see --upgrade-test)
  SIGUSR1          hold restarts back: when the server ends (or if it is down now), applications wait
  SIGUSR2          restart again

A keeper that is itself started with such descriptors takes the mount over instead of making one, and leaves it when it
ends.  So one keeper can keep another, which may then be killed; `status` shows the outer one, whose server is the inner.

Examples:
  fuse-restart keep --mountpoint /mnt -- fuse-restart serve passthrough /srv/data &
  fuse-restart status /mnt
  fuse-restart keep --mountpoint /mnt --upgrade-test \
      'fuse-restart serve passthrough --self-test --replacing $FUSE_RESTART_SERVER /srv/data' -- \
      fuse-restart serve passthrough /srv/data &
  fuse-restart keep --mountpoint /mnt -- \\
      fuse-restart keep --mountpoint /mnt -- fuse-restart serve passthrough /srv/data")]
pub struct Args {
    /// An existing directory on which nothing is mounted
    #[arg(long, value_name = "DIR")]
    pub mountpoint: PathBuf,

    /// Pause before the server is started again; doubles (up to 10 s) while restarts come to nothing
    #[arg(long, value_name = "MS", default_value_t = 0)]
    pub restart_delay: u64,

    /// Give up after this many restarts in a row without progress: unmount, and fail
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub max_restarts: u32,

    /// An instance that served this long has made progress
    #[arg(long, value_name = "MS", default_value_t = 1000)]
    pub stable_after: u64,

    /// Kill and restart a server that has requests in its hands and answers none for this long; 0: never
    ///
    /// Off by default: only who knows the server knows how long a request may take. What waits for an application
    /// (a blocking lock, poll) does not count, if the server marks its requests (`Watched` of rust-fuse-notify). The
    /// stacks of the server are logged first.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0, value_parser = seconds)]
    pub hang_timeout: f64,

    /// A request that the server has died of this often, running alone, gets EIO; 0: never
    ///
    /// Requests that a dead server had in its hands are run one at a time by the next one, if it marks its requests.
    #[arg(long, value_name = "N", default_value_t = rust_fuse_notify::std::state::DEFAULT_MAX_TRIES)]
    pub max_tries: u32,

    /// Run COMMAND (by sh -c) before a planned restart; if it fails, or takes over a minute, the server goes on
    ///
    /// FUSE_RESTART_SERVER is the server's pid. It must not ask the mount anything, whose server may die meanwhile. For `serve passthrough` it is its own command line with --self-test, which
    /// looks whether that binary, with these options, could go on with the mount.
    #[arg(long, value_name = "COMMAND", value_parser = supervisor::upgrade::command)]
    pub upgrade_test: Option<OsString>,

    /// Append what happens to FILE, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// What the mount table shows as the source (default: the server's name)
    #[arg(long, value_name = "NAME")]
    pub fsname: Option<OsString>,

    /// Let users other than the one who mounts use the file system
    #[arg(long)]
    pub allow_other: bool,

    /// The server and its arguments
    #[arg(last = true, required = true, value_name = "SERVER")]
    pub server: Vec<OsString>,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value == 0.0 || (0.1..=1e6).contains(&value) => Ok(value),
        _ => Err("0, or a number of seconds between 0.1 and 1000000".into()),
    }
}

impl Args {
    fn watchdog(&self) -> Option<watchdog::Watchdog> {
        let limit = Duration::from_secs_f64(self.hang_timeout);
        let watchdog = || watchdog::Watchdog::new(limit, std::time::Instant::now());
        (!limit.is_zero()).then(watchdog)
    }

    fn backoff(&self) -> backoff::Backoff {
        backoff::Backoff::new(
            Duration::from_millis(self.restart_delay),
            self.max_restarts,
            Duration::from_millis(self.stable_after),
        )
    }
}

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    supervisor::Supervisor::set_up(&args)?.run()
}
