// SPDX-License-Identifier: GPL-2.0
//! Who waits for a server that is not there: killed within a second wherever it was caught, and not for ever.

use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;

use super::help::{expect_resent, populated, still_serves};
use super::Scenario;
use crate::raw::env::{skip, Env};
use crate::raw::kit::Kit;
use crate::raw::ops;
use crate::raw::trap::Trap;
use crate::raw::wire::op;

const TIMEOUT: &str = "/sys/module/fuse/parameters/recovery_timeout";
pub(super) const MAX_REQUEST: &str = "/proc/sys/fs/fuse/max_request_timeout";
const DEFAULT_REQUEST: &str = "/proc/sys/fs/fuse/default_request_timeout";

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "time/bound",
            "a recovery that nobody completes is aborted in time",
            |env| bound(env, Bound::Module),
        ),
        Scenario::series(
            "time/not-prolonged",
            "another RESTARTED does not prolong it",
            |env| bound(env, Bound::Prolonged),
        ),
        Scenario::series(
            "time/max-request-timeout",
            "nor does it take longer than the administrator lets a request take",
            |env| bound(env, Bound::Administrator),
        ),
        Scenario::series(
            "time/next-recovery",
            "a deadline that was late for its own recovery does not end the next one",
            next_recovery,
        ),
        Scenario::series(
            "time/very-long",
            "the longest limits do not become short ones",
            very_long,
        ),
        Scenario::series(
            "time/clocks",
            "request timeouts do not count what a recovery took",
            clocks,
        ),
        Scenario::series(
            "time/for-ever",
            "a server that recovers again and again and answers nothing is given up in time",
            for_ever,
        ),
    ]
}

/// Sets a knob for as long as this lives.
pub(super) struct Knob(&'static str, String);

impl Knob {
    pub(super) fn set(path: &'static str, value: &str) -> Result<Knob> {
        let Ok(old) = std::fs::read_to_string(path) else {
            return skip(format!("there is no {path}"));
        };
        std::fs::write(path, value).with_context(|| format!("{value} to {path}"))?;
        Ok(Knob(path, old.trim().to_owned()))
    }
}

impl Drop for Knob {
    fn drop(&mut self) {
        if let Err(e) = std::fs::write(self.0, &self.1) {
            eprintln!("cannot set {} back to {}: {e}", self.0, self.1);
        }
    }
}

#[derive(PartialEq)]
enum Bound {
    Module,
    Prolonged,
    Administrator,
}

fn bound(env: &Env<'_>, kind: Bound) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(3);
    let _knob = match kind {
        Bound::Administrator => Knob::set(MAX_REQUEST, "3")?,
        _ => Knob::set(TIMEOUT, "3")?,
    };
    let mut kit = populated(env, 3)?;
    let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    kit.until_op(op::GETATTR)?;
    let start = Instant::now();
    kit.restarted()?;
    let slack = kit.patience / 2;
    while !app.done() {
        let elapsed = start.elapsed();
        ensure!(
            elapsed < LIMIT + slack,
            "{elapsed:?} after RESTARTED the connection is still there"
        );
        std::thread::sleep(Duration::from_millis(200));
        if kind == Bound::Prolonged {
            let _ = kit.restarted();
        }
    }
    let elapsed = start.elapsed();
    ensure!(
        elapsed + Duration::from_millis(100) >= LIMIT,
        "aborted after {elapsed:?} already"
    );
    let result = app.take().context("the result")?;
    ensure!(
        matches!(result, Err(Errno::ECONNABORTED | Errno::ENOTCONN)),
        "stat gave {result:?}"
    );
    let state = kit.conn.recovery()?.context("recovery")?;
    ensure!(state.state() == "dead", "the state is {}", state.state());
    Ok(())
}

/// The connection is there, and recovers, for as long as `limit`.
fn goes_on(kit: &Kit<'_>, limit: Duration, when: &str) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < limit {
        ensure!(
            kit.dev.probe() == Errno::ESTALE,
            "{when}, after {:?}: the connection was aborted",
            start.elapsed()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn next_recovery(env: &Env<'_>) -> Result<()> {
    let _knob = Knob::set(TIMEOUT, "3")?;
    let mut kit = populated(env, 3)?;
    let trap = Trap::arm("deadline")?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    trap.wait(Duration::from_secs(3) + kit.patience)?;
    kit.commit(&recovered)?;
    kit.restarted()?;
    trap.go();
    goes_on(&kit, Duration::from_secs(1), "in the next recovery")?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    still_serves(&mut kit)
}

/// Whatever HZ is, one of these is a second at most if 32 bits of jiffies are all that is looked at.
fn very_long(env: &Env<'_>) -> Result<()> {
    for hz in [100u64, 250, 300, 1000] {
        let seconds = (1u64 << 32).div_ceil(hz);
        let _knob = Knob::set(TIMEOUT, &seconds.to_string())?;
        let mut kit = populated(env, 3)?;
        kit.restarted()?;
        goes_on(
            &kit,
            Duration::from_millis(1500),
            &format!("of {seconds} seconds"),
        )?;
        let recovered = kit.answer_replays(&mut |_, _| None)?;
        kit.commit(&recovered)?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

/// The kernel looks at request timeouts every 15 seconds, and knows no shorter ones: this takes its time.
fn clocks(env: &Env<'_>) -> Result<()> {
    let _knob = Knob::set(DEFAULT_REQUEST, "15")?;
    let mut kit = populated(env, 3)?;
    let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    let old = kit.until_op(op::GETATTR)?;
    kit.restarted()?;
    // Two looks at the clocks, and half the time to the third.
    goes_on(&kit, Duration::from_secs(37), "in the recovery")?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    kit.commit(&recovered)?;
    let new = kit.next_request()?;
    expect_resent(&kit, &old, &new)?;
    // The third look: the request is older than the timeout, but not to its server.
    goes_on(&kit, Duration::from_secs(10), "after the recovery")?;
    kit.answer(&new)?;
    ensure!(kit.serve(&app)? == Ok(()), "stat");
    still_serves(&mut kit)
}

/// Whole recoveries, each within every limit, and the next begins before the kernel looks at its clocks.
fn for_ever(env: &Env<'_>) -> Result<()> {
    const TIMEOUT: Duration = Duration::from_secs(15);
    const RECOVERY: Duration = Duration::from_secs(4);
    let _knob = Knob::set(DEFAULT_REQUEST, "15")?;
    let mut kit = populated(env, 3)?;
    let app = kit.on("stat", "f0", |p| ops::stat(p).map(drop))?;
    kit.until_op(op::GETATTR)?;
    let start = Instant::now();
    let mut recoveries = 0;
    while !app.done() {
        let elapsed = start.elapsed();
        // The first recovery restarts the clock, and the end of another sees that it has run out.
        ensure!(
            elapsed < RECOVERY + TIMEOUT + RECOVERY + kit.patience,
            "{elapsed:?} and {recoveries} recoveries after stat() was read it still waits"
        );
        let Err(e) = one_slow_recovery(&mut kit, RECOVERY) else {
            recoveries += 1;
            continue;
        };
        ensure!(
            kit.dev.probe() != Errno::ESTALE,
            "recovery {recoveries}: {e:#}"
        );
        let deadline = Instant::now() + kit.patience;
        while !app.done() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let elapsed = start.elapsed();
    ensure!(
        elapsed >= TIMEOUT && recoveries > 2,
        "aborted after {elapsed:?} and {recoveries} recoveries already"
    );
    let result = app.take().context("the result")?;
    ensure!(
        matches!(result, Err(Errno::ECONNABORTED | Errno::ENOTCONN)),
        "stat gave {result:?}"
    );
    Ok(())
}

fn one_slow_recovery(kit: &mut Kit<'_>, time: Duration) -> Result<()> {
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    std::thread::sleep(time);
    kit.commit(&recovered)
}
