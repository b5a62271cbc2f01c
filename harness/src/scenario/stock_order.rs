// SPDX-License-Identifier: GPL-2.0
//! The order of NOTIFY_RESEND, which has nothing to do with recoveries.

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;

use super::help::still_serves;
use super::Scenario;
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::ops;
use crate::raw::wire::{notify, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    vec![Scenario::series(
        "order/resend",
        "NOTIFY_RESEND, which every kernel since 6.9 has, sends in the order of issue as well",
        resend,
    )]
}

/// Needs nothing but the fix: `--run-anyway` on a kernel without it shows the bug.
fn resend(env: &Env<'_>) -> Result<()> {
    const N: usize = 300;
    let config = match env.support.series {
        true => Config::default(),
        false => Config::unsigned(),
    };
    let mut kit = Kit::mount(env, config)?;
    kit.tree.file(ROOT, "f0", b"");
    ensure!(kit.run_on("stat", "f0", ops::stat)?.is_ok(), "stat");
    let (jobs, old) = super::resend::park_stats(&mut kit, N)?;
    match kit.dev.notify(notify::RESEND, &[0u8; 0], &[]) {
        Err(Errno::EINVAL) => return skip("this kernel has no FUSE_NOTIFY_RESEND"),
        other => other.context("NOTIFY_RESEND")?,
    }
    let mut ids = Vec::new();
    for _ in &old {
        let m = kit.next_request()?;
        ids.push(m.original());
        kit.answer(&m)?;
    }
    super::resend::all_ok(&mut kit, &jobs)?;
    let younger_first = ids.windows(2).filter(|w| w[0] > w[1]).count();
    ensure!(
        younger_first == 0,
        "{younger_first} of {N} requests come after one that is younger"
    );
    still_serves(&mut kit)
}
