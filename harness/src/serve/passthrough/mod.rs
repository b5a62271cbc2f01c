// SPDX-License-Identifier: GPL-2.0
//! `serve passthrough`: a directory of another file system, served so that it survives its server.
//!
//! The map: [`fs`] is fuser's trait, [`answer`] gives the answers; [`nodes`], [`make`], [`remove`],
//! [`attr`] and [`open`] are the operations; [`server`] is what they share. [`intent`] says what
//! the journal remembers of a change, [`recover`] what a new instance does with it.
//! [`graveyard`] keeps what has lost its name, [`owner`] says whose. [`backing`], [`handle`], [`dents`], [`creds`],
//! [`sys`] talk to the backing file system, [`wire`] to the kernel where fuser cannot.

mod answer;
mod attr;
mod backing;
#[cfg(test)]
mod crash_cases;
#[cfg(test)]
mod crash_tests;
mod creds;
mod dents;
mod fdcache;
mod fs;
mod graveyard;
mod handle;
mod intent;
#[cfg(test)]
mod left_tests;
mod make;
#[cfg(test)]
mod moved_tests;
mod nodes;
mod open;
mod owner;
mod recover;
#[cfg(test)]
mod refused_tests;
mod remove;
mod self_test;
mod server;
mod state;
mod sys;
mod wire;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{bail, Context};
use fuser::{Session, SessionACL};
use rust_fuse_notify::std::adopt::{Adopt, How};
use rust_fuse_notify::std::watched::Watched;
use rust_fuse_notify::std::wire::Identity;

use crate::crash_points;
use crate::serve::store;
use backing::Backing;
use graveyard::Graveyard;
use recover::Recovery;
use server::{Options, Server};
use wire::Device;

/// Serve a directory of another file system
///
/// Runs under a keeper, which mounts it and starts it again when it dies:
///
///     fuse-restart keep --mountpoint /mnt -- fuse-restart serve passthrough /srv/data
///
/// The backing must be on a file system with file handles (ext4, xfs, btrfs, tmpfs) and be changed
/// through the mount only; what is changed behind it shows after --timeout. Removed files that are
/// still in use live in a hidden directory of the backing until they are closed.
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Let the kernel cache writes and send them later
    #[arg(long)]
    writeback: bool,
    /// Requests served at the same time
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Give each thread a descriptor of its own (FUSE_DEV_IOC_CLONE)
    ///
    /// On a kernel without FUSE_NOTIFY_RESTARTED, requests that such a thread had read are lost
    /// with it (ECONNABORTED).
    #[arg(long)]
    clone_fd: bool,
    /// For how long the kernel may believe names and attributes, in seconds
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    timeout: f64,
    /// Go on with an empty state if the state of the mount cannot be used
    ///
    /// That is, if it is damaged or of another version. Applications get EIO for what they have open, and for what
    /// they had asked of the dead server: nothing is guessed. A state that can be used is used.
    #[arg(long)]
    discard_state: bool,
    /// Enter no change in the journal: for measurements, and to see what it is good for
    #[arg(long, hide = true)]
    no_journal: bool,
    /// For the crash matrix: do as if the kernel could only send requests again
    #[cfg(feature = "crash-points")]
    #[arg(long, hide = true)]
    unsigned: bool,
    /// Without a keeper: mount on DIR, and keep the mount in the descriptor store of systemd
    ///
    /// For units with NotifyAccess=main and FileDescriptorStoreMax=; Documentation/systemd.md has one.
    #[arg(long, value_name = "DIR")]
    mountpoint: Option<PathBuf>,
    /// Only check that this binary can serve the directory, and exit
    ///
    /// Touches no descriptor of a mount, so it can run beside the server that it is to replace. For upgrades: replace
    /// a server only by one that passes, with the options that it is to have.
    #[arg(long)]
    self_test: bool,
    /// With --self-test: check also that this binary can go on with the mount of that server, or of its keeper
    ///
    /// Only reads its state: whether that is of a version that this binary knows and of this directory, and whether
    /// the kernel would be told the same as at the mount.
    #[arg(long, value_name = "PID", requires = "self_test", value_parser = clap::value_parser!(i32).range(1..))]
    replacing: Option<i32>,
    /// The directory to serve
    backing: PathBuf,
}

#[cfg(feature = "crash-points")]
impl Args {
    fn unsigned(&self) -> bool {
        self.unsigned
    }
}

#[cfg(not(feature = "crash-points"))]
impl Args {
    fn unsigned(&self) -> bool {
        false
    }
}

impl Args {
    fn options(&self) -> Options {
        Options {
            writeback: self.writeback,
            timeout: Duration::from_secs_f64(self.timeout),
            discard: self.discard_state,
            journal: !self.no_journal,
            sign: !self.unsigned(),
        }
    }

    fn session(&self) -> fuser::Config {
        let mut config = fuser::Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(usize::from(self.threads));
        config.clone_fd = self.clone_fd;
        config
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1e6).contains(&value) => Ok(value),
        _ => Err("a number of seconds between 0 and 1000000".into()),
    }
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    #[cfg(feature = "crash-points")]
    tracing::warn!("built with crash points, for tests only: it may kill itself when told to");
    let path = backing::resolved(&args.backing);
    let shown = path.display();
    let nofile = backing::raise_nofile();
    let backing = Backing::open(&path)?;
    if std::fs::metadata("/proc/self/fd").is_err() {
        bail!("/proc is not mounted: the server reaches open files through /proc/self/fd");
    }
    if args.self_test {
        return self_test::run(args, backing, nofile);
    }
    let inherited = store::inherit_or_mount(args.mountpoint.as_deref())?;
    let identity = Identity(backing.identity);
    let state = state::open(inherited.state, identity, args.discard_state)
        .with_context(|| format!("cannot use the state of the mount for {shown}"))?;
    let yard = Graveyard::open(backing.root()).with_context(|| format!("cannot serve {shown}"))?;
    let first = state.nodes().is_empty();
    if let Some(dir) = yard.open_dir().filter(|_| first) {
        owner::claim(dir, inherited.device.as_fd())
            .with_context(|| format!("cannot serve {shown}"))?;
    }

    let state = Arc::new(state);
    super::stop::on_term(wire::duplicate(inherited.device.as_fd())?, state.clone())?;
    let device = Device::new(wire::duplicate(inherited.device.as_fd())?, args.clone_fd);
    if args.no_journal {
        tracing::warn!(
            "--no-journal: nothing is promised of changes that are under way when this server dies, \
             they may take effect twice or fail; for measurements only"
        );
    }
    let server = Arc::new(Server::new(
        backing,
        yard,
        state.clone(),
        device,
        args.options(),
        nofile,
    ));
    state.nodes().set_root(&server.describe_root()?);
    let config = args.session();
    let filesystem = Watched::new(fs::Passthrough(server.clone()), state.clone());
    let recovery = crash_points::begin(if first { "adopt" } else { "recover" });
    let adopted = Adopt::new(inherited.device, state)
        .run(&mut Recovery::new(server.clone()), |fd| {
            crash_points::reach("init");
            Session::from_fd(filesystem, fd, SessionACL::All, config)
        })
        .with_context(|| format!("cannot take over the mount of {shown}"))?;
    drop(recovery);
    if matches!(adopted.how, How::First(_)) {
        // Left by a mount that ended without an unmount, and nobody uses it any more. Not earlier: who has the wrong state
        // in his hands is refused by now. And no later: nodeids are given out from here on.
        server.sweep_graves();
    }
    match &adopted.how {
        How::First(support) => tracing::info!("serving {shown} ({support:?})"),
        How::Recovered { report, took } => tracing::info!(
            "serving {shown} again: {} inodes confirmed, {} revoked, {} requests held, {took:?}",
            report.confirmed,
            report.revoked,
            report.held
        ),
        How::Resent => tracing::info!("serving {shown} again: unanswered requests were resent"),
        How::Nothing => tracing::warn!(
            "serving {shown} again; this kernel loses the requests that the last server had read"
        ),
    }
    store::ready();
    adopted
        .session
        .run()
        .with_context(|| format!("the session of {shown} ended"))?;
    // Unmounted: nothing is in use any more.
    server.yard.clear(server.backing.root());
    tracing::info!("{shown} was unmounted");
    Ok(ExitCode::SUCCESS)
}
