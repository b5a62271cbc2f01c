// SPDX-License-Identifier: GPL-2.0
//! Who a notification is from: its identity, and the fields that only COMMIT has.

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;

use super::bad_input::{good, untouched};
use super::help::{expect_errno, populated, still_serves};
use super::Scenario;
use crate::raw::env::Env;
use crate::raw::kit::IDENTITY;
use crate::raw::wire::{RestartedOut, RESTARTED_COMMIT};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "bad-input/identity",
            "a server for another file system is ESTALE",
            wrong_identity,
        ),
        Scenario::series(
            "bad-input/identity-none",
            "a keeper that knows no identity may say RESTARTED",
            no_identity,
        ),
        Scenario::series(
            "bad-input/commit-identity",
            "COMMIT needs the identity",
            commit_identity,
        ),
        Scenario::series(
            "bad-input/epoch-alone",
            "an epoch without COMMIT is refused",
            epoch_alone,
        ),
    ]
}

fn wrong_identity(env: &Env<'_>) -> Result<()> {
    untouched(env, |kit| {
        for identity in [
            [IDENTITY[0], 0],
            [0, IDENTITY[1]],
            [IDENTITY[0], IDENTITY[1] ^ 1],
            [1, 1],
            [u64::MAX; 2],
        ] {
            let out = RestartedOut { identity, ..good() };
            expect_errno(
                &format!("identity {identity:x?}"),
                kit.dev.restarted(out),
                Errno::ESTALE,
            )?;
        }
        Ok(())
    })
}

fn no_identity(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    kit.restarted_as([0; 2])
        .context("RESTARTED without an identity")?;
    kit.conn.wait_state(&["held", "root"], kit.patience)?;
    kit.check_counts_in_recovery()?;
    still_serves(&mut kit)
}

/// Who commits has read the report: it is the server, and knows what it serves.
fn commit_identity(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    for identity in [[0; 2], [1, 1], [IDENTITY[0], 0]] {
        let out = RestartedOut {
            flags: RESTARTED_COMMIT,
            epoch: recovered.report.epoch,
            identity,
            ..good()
        };
        expect_errno(
            &format!("COMMIT with identity {identity:x?}"),
            kit.dev.restarted(out),
            Errno::ESTALE,
        )?;
    }
    let state = kit.conn.recovery()?.context("recovery file")?;
    ensure!(
        state.state() == "prepared",
        "the state is {}",
        state.state()
    );
    kit.commit(&recovered)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn epoch_alone(env: &Env<'_>) -> Result<()> {
    untouched(env, |kit| {
        for epoch in [1, 2, u32::MAX] {
            let out = RestartedOut { epoch, ..good() };
            expect_errno(
                &format!("RESTARTED with epoch {epoch}"),
                kit.dev.restarted(out),
                Errno::EINVAL,
            )?;
        }
        Ok(())
    })
}
