// SPDX-License-Identifier: GPL-2.0
//! `--self-test`: what can be known before the old server is ended, without any descriptor of its mount.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{bail, Context, Result};
use fuser::{Session, SessionACL};
use rust_fuse_notify::std::adopt::rehearse;
use rust_fuse_notify::std::state::State;
use rust_fuse_notify::std::wire::Identity;

use super::backing::Backing;
use super::fs::Passthrough;
use super::graveyard::Graveyard;
use super::server::Server;
use super::wire::Device;
use super::{state, Args};

pub fn run(args: &Args, backing: Backing, nofile: u64) -> Result<ExitCode> {
    let shown = args.backing.display();
    let Some(pid) = args.replacing else {
        tracing::info!("{shown} can be served by this binary");
        return Ok(ExitCode::SUCCESS);
    };
    let memfd = state_of(pid)?;
    let identity = Identity(backing.identity);
    // A server of its own: a state, a graveyard and a device that nobody uses.
    let own = State::create_memfd().context("memfd for the test")?;
    let own = Arc::new(state::open(own, identity, false)?);
    let device = File::open("/dev/null").context("/dev/null")?.into();
    let server = Server::new(
        backing,
        Graveyard::none(),
        own,
        Device::new(device, args.clone_fd),
        args.options(),
        nofile,
    );
    let filesystem = Passthrough(Arc::new(server));
    rehearse(memfd.as_fd(), identity, |fd| {
        Session::from_fd(filesystem, fd, SessionACL::All, args.session())
    })
    .with_context(|| {
        format!(
            "this binary, with these options, cannot go on with the mount of process {pid}, which was left alone"
        )
    })?;
    tracing::info!(
        "{shown} can be served by this binary, and the mount of process {pid} taken over"
    );
    Ok(ExitCode::SUCCESS)
}

/// The memfd of a server, or of a keeper, to be read only.
fn state_of(pid: i32) -> Result<File> {
    let dir = format!("/proc/{pid}/fd");
    let unreadable = || format!("cannot look at the descriptors of process {pid}");
    // Duplicates are one file.
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(&dir).with_context(unreadable)? {
        let path = entry.with_context(unreadable)?.path();
        let is_state = fs::read_link(&path)
            .is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:fusestate "));
        if is_state {
            // Closed meanwhile: the others will do.
            if let Ok(file) = File::open(&path) {
                found.insert(file.metadata().with_context(unreadable)?.ino(), file);
            }
        }
    }
    match (found.pop_first(), found.len()) {
        (Some((_, file)), 0) => Ok(file),
        (None, _) => {
            bail!("process {pid} has no state of a mount: name a running server, or its keeper")
        }
        (Some(_), more) => bail!(
            "process {pid} has the states of {} mounts: name the server of one",
            more + 1
        ),
    }
}
