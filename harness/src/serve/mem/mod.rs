// SPDX-License-Identifier: GPL-2.0
//! `serve mem`: a file system that is nowhere but in the memfd that its keeper holds.
//!
//! The map: [`layout`] says where things are in the arena; [`store`] makes changes of many words as one; [`inode`],
//! [`names`], [`blocks`], [`data`], [`xattrs`] are what the tree is made of; [`tree`] is all of it, with its lock and
//! what is found out at the start ([`free`]), where all of it is looked at first ([`check`]) and what is damaged is
//! refused ([`error`]); [`make`], [`remove`], [`attr`] are the operations; [`once`] is the
//! journal; [`fs`] is fuser's trait, [`recover`] takes over from a dead instance.
//!
//! Why nothing is lost, and nothing happens twice, is in Documentation/exactly-once.md.

mod attr;
mod blocks;
mod check;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod damage_tests;
mod data;
mod error;
mod free;
mod fs;
#[cfg(test)]
mod hostile_tests;
mod inode;
mod layout;
mod make;
mod names;
mod once;
mod recover;
mod remove;
mod store;
#[cfg(test)]
mod tests;
mod tree;
mod xattrs;

use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use fuser::{Session, SessionACL};
use rust_fuse_notify::std::adopt::{Adopt, How};
use rust_fuse_notify::std::listen;
use rust_fuse_notify::std::state::{Config, State};
use rust_fuse_notify::std::watched::Watched;
use rust_fuse_notify::std::wire::Identity;

use crate::crash_points;
use layout::PAGE;
use recover::Recovery;
use tree::Tree;

/// Serve a file system that lives in memory
///
/// Runs under a keeper, which mounts it and starts it again when it dies:
///
///     fuse-restart keep --mountpoint /mnt -- fuse-restart serve mem --size 256
///
/// Everything is in the memfd that the keeper holds, so a server may be killed at any moment and loses nothing; when the
/// keeper ends, the files are gone. It needs neither root nor file handles.
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// The most memory that the files may take, in MiB; decided when the mount is made
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    size: u32,
    /// Requests served at the same time
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
}

/// A state whose tables are as small as can be: the tree has its own.
fn config(pages: u32) -> Config {
    Config {
        nodes: 16,
        handles: 2,
        journal: 1024,
        arena_pages: pages,
    }
}

pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let inherited = listen::adopt_from_environment().context(
        "this server takes /dev/fuse from a keeper; start it with \
         `fuse-restart keep --mountpoint DIR -- fuse-restart serve mem`",
    )?;
    let what = "cannot use the state of the mount";
    let identity = match State::identity_in(inherited.state.as_fd()).context(what)? {
        Some(identity) => identity,
        None => random_identity()?,
    };
    let pages = args.size * (1024 * 1024 / PAGE as u32);
    let state = State::open(inherited.state, identity, &config(pages)).context(what)?;
    let state = Arc::new(state);
    let tree = Arc::new(Tree::open(state.clone()).context(what)?);
    let device = inherited.device.try_clone().context("a descriptor")?;
    super::stop::on_term(device, state.clone())?;

    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(usize::from(args.threads));
    let filesystem = Watched::new(fs::Mem(tree.clone()), state.clone());
    let mut recovery = Recovery { tree, differed: 0 };
    let adopting = crash_points::begin("recover");
    let adopted = Adopt::new(inherited.device, state)
        .run(&mut recovery, |fd| {
            crash_points::reach("init");
            Session::from_fd(filesystem, fd, SessionACL::All, config)
        })
        .context("cannot take over the mount")?;
    drop(adopting);
    match &adopted.how {
        How::First(support) => tracing::info!("serving from memory ({support:?})"),
        How::Recovered { report, took } => tracing::info!(
            "serving from memory again: {} inodes confirmed, {} revoked, {} requests held, {took:?}",
            report.confirmed,
            report.revoked,
            report.held
        ),
        How::Resent => tracing::info!("serving from memory again: unanswered requests were resent"),
        How::Nothing => tracing::warn!(
            "serving from memory again; this kernel loses the requests that the last server had read"
        ),
    }
    adopted.session.run().context("the session ended")?;
    tracing::info!("unmounted; the files go with the keeper");
    Ok(ExitCode::SUCCESS)
}

fn random_identity() -> anyhow::Result<Identity> {
    let mut bytes = [0; 16];
    // SAFETY: the buffer is writable for its length. So few bytes are never given in part.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    anyhow::ensure!(
        got == bytes.len() as isize,
        "the kernel gives no random numbers"
    );
    // Zero means "none".
    let number = u128::from_ne_bytes(bytes) | 1;
    Ok(Identity([number as u64, (number >> 64) as u64]))
}
