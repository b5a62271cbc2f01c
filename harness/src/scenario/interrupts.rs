// SPDX-License-Identifier: GPL-2.0
//! INTERRUPT messages belong to a request: they go when it goes.

use anyhow::{ensure, Context, Result};
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use zerocopy::IntoBytes;

use super::help::{populated, readable, still_serves};
use super::Scenario;
use crate::raw::app::Proc;
use crate::raw::env::Env;
use crate::raw::ops;
use crate::raw::uffd::Abyss;
use crate::raw::wait::wait_for;
use crate::raw::wire::{op, OutHeader};

pub fn scenarios() -> Vec<Scenario> {
    vec![Scenario::series(
        "interrupts/writer-killed",
        "no INTERRUPT is left of a request that came back from a killed writer and whose application was killed",
        writer_killed,
    )]
}

extern "C" fn nothing(_: i32) {}

fn writer_killed(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let path = kit.path("d");
    let mut app = Proc::spawn("an interrupted mkdir", &[kit.dev.raw()], move || {
        let action = SigAction::new(
            SigHandler::Handler(nothing),
            SaFlags::empty(),
            SigSet::empty(),
        );
        // SAFETY: the handler does nothing.
        let _ = unsafe { sigaction(Signal::SIGUSR1, &action) };
        i32::from(ops::mkdir(&path).is_err())
    })?;
    let m = kit.until_op(op::MKDIR)?;
    app.wait_asleep(kit.patience)?;
    app.signal(Signal::SIGUSR1)?;
    readable(&kit, "the INTERRUPT")?;
    // The answer is begun, and its writer dies in the middle.
    let (dev, unique) = (kit.dev.raw(), m.unique());
    let mut writer = Proc::spawn("a writer out of the abyss", &[], move || {
        let header = OutHeader {
            len: 16 + 128,
            error: 0,
            unique,
        };
        Abyss::new(1 << 16).map_or(99, |a| a.write_to(dev, header.as_bytes(), 128))
    })?;
    let syscall = format!("/proc/{}/syscall", writer.tid());
    wait_for("the writer to sleep in its write", kit.patience, || {
        let text = std::fs::read_to_string(&syscall).unwrap_or_default();
        let number = text.split(' ').next().unwrap_or_default();
        Ok(number == libc::SYS_writev.to_string() || writer.ended()?)
    })?;
    writer.wait_asleep(kit.patience)?;
    ensure!(!writer.ended()?, "the writer did not wait");
    writer.signal(Signal::SIGKILL)?;
    writer.wait(kit.patience)?;
    app.signal(Signal::SIGKILL)?;
    app.wait(kit.patience)
        .context("the application, whose request came back")?;
    kit.settle()?;
    ensure!(
        kit.interrupts.is_empty(),
        "INTERRUPT of {:x?}, which is gone",
        kit.interrupts
    );
    kit.recover()?;
    still_serves(&mut kit)
}
