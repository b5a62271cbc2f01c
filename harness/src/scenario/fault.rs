// SPDX-License-Identifier: GPL-2.0
//! A page fault under way at the crash: its task waits for a page that a READ has locked, with the lock against
//! invalidation in its hands.

use anyhow::{ensure, Context, Result};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::help::{expect_resent, populated, still_serves};
use super::kill::dies;
use super::lost::{lose, never_asked, node, Staged};
use super::Scenario;
use crate::raw::app::{faults_kill, Proc};
use crate::raw::env::Env;
use crate::raw::kit::Kit;
use crate::raw::msg::Message;
use crate::raw::ops;
use crate::raw::rare;
use crate::raw::wire::op;

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "fault/confirmed",
            "a page fault under way at the crash gets its page from the next server",
            confirmed,
        ),
        Scenario::series(
            "fault/revoked",
            "if its file is revoked it is SIGBUS, and the release does not wait for it",
            revoked,
        ),
        Scenario::series(
            "fault/killed",
            "while it is held its task can be killed",
            killed,
        ),
    ]
}

/// A process in a page fault of `f1`, whose READ is in dead hands.
fn faulting(kit: &mut Kit<'_>) -> Result<(Proc, Message)> {
    let path = kit.path("f1");
    let staged = Staged::start(
        kit,
        "a process with a mapping",
        || {
            faults_kill();
            let fd = ops::open(&path, OFlag::O_RDWR).map_err(|_| 10)?;
            rare::map_untouched(fd).map_err(|_| 11)
        },
        // SAFETY: the page is mapped; if the file is gone then the process dies here, as it should.
        |at| i32::from(unsafe { (at as *const u8).read_volatile() }),
    )?;
    kit.settle()?;
    let app = staged.let_go();
    let read = kit.until_op(op::READ)?;
    app.wait_asleep(kit.patience)?;
    Ok((app, read))
}

fn confirmed(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let (mut app, old) = faulting(&mut kit)?;
    kit.recover()?;
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.answer(&new)?;
    kit.serve_until("the end of the process", |_| app.ended())?;
    let code = app.wait_code(kit.patience)?;
    ensure!(
        code == i32::from(b'c'),
        "the process read {code}, not {}",
        b'c'
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn revoked(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let (mut app, _) = faulting(&mut kit)?;
    let f1 = node(&kit, "f1")?;
    lose(&mut kit, &[f1]).context("the recovery waits for who is in a page fault")?;
    kit.serve_until("the end of the process", |_| app.ended())?;
    let status = app.wait(kit.patience)?;
    ensure!(
        matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)),
        "the process ended with {status:?}, not by SIGBUS"
    );
    never_asked(&kit, f1)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn killed(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let (mut app, old) = faulting(&mut kit)?;
    kit.restarted()?;
    dies(&kit, &mut app, "in a page fault")?;
    kit.recover()?;
    // Readahead is nobody's, and its page is locked until it has ended.
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    kit.answer(&new)?;
    kit.settle()?;
    let read = kit.run_on("read", "f1", ops::read_file)?;
    ensure!(read == Ok(b"content of 1".to_vec()), "f1 reads {read:?}");
    kit.check_counts()?;
    still_serves(&mut kit)
}
