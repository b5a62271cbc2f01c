// SPDX-License-Identifier: GPL-2.0
//! Kills the server again and again while the processes race: at points of its own work, or from outside.
//!
//! Nothing here depends on time. A point is armed for one of its next reaches; a kill from outside comes when the
//! clock of the history has come to a drawn stamp, or as soon as the next instance is there.
//!
//! `keep --max-tries` (three) gives a request EIO on which the server died so often in trials of its own. That is its
//! promise and not what is tested here, so a request never sees three deaths: after two, the killer waits until every
//! call that was under way at the second has returned.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;

use super::shared::{Shared, MOST};
use crate::crash::kept::Kept;
use crate::crash_points::Seen;
use crate::raw::wait::Rng;

/// Deaths that one request may see.
const IN_A_ROW: u64 = 2;
/// Stamps after which an armed point that is not reached is given up for another one.
const GIVE_UP_AFTER: u64 = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Points,
    Signals,
}

pub struct Killer<'a> {
    way: Way,
    shared: &'a Shared,
    rng: Rng,
    /// How often the server died at each point in this run so far.
    before: &'a BTreeMap<String, u64>,
    /// How often each was armed here: some are hardly ever reached.
    tried: BTreeMap<String, u64>,
    armed: Option<Armed>,
    /// Killed from outside.
    signals: u64,
    /// The instance that was killed last, and the stamp at which the next one is.
    last_pid: i32,
    next: u64,
    /// Deaths since the last pause, and who must return before the next one.
    in_a_row: u64,
    pause: Option<[u64; MOST]>,
    pub marks: Vec<(u64, String)>,
}

struct Armed {
    points: Vec<String>,
    at: u64,
    killed: u64,
}

impl<'a> Killer<'a> {
    pub fn new(
        way: Way,
        seed: u64,
        shared: &'a Shared,
        before: &'a BTreeMap<String, u64>,
    ) -> Killer<'a> {
        Killer {
            way,
            shared,
            rng: Rng(seed),
            before,
            tried: BTreeMap::new(),
            armed: None,
            signals: 0,
            last_pid: 0,
            next: 20,
            in_a_row: 0,
            pause: None,
            marks: Vec::new(),
        }
    }

    /// Does what is to be done now; never waits.
    pub fn turn(&mut self, kept: &Kept<'_>) -> Result<()> {
        if let Some(then) = self.pause {
            let now = self.shared.stamps();
            // Odd: it was in a call. As many as then: it still is.
            let waits = |(then, now): (&u64, &u64)| then % 2 == 1 && then == now;
            if then.iter().zip(&now).any(waits) {
                return Ok(());
            }
            self.pause = None;
        }
        match self.way {
            Way::Points => self.points(kept),
            Way::Signals => self.signals(kept),
        }
    }

    fn points(&mut self, kept: &Kept<'_>) -> Result<()> {
        let Some(armed) = &self.armed else {
            return self.arm(kept);
        };
        let killed = killed(kept) - armed.killed;
        let gone = self.shared.now() - armed.at > GIVE_UP_AFTER;
        if killed < armed.points.len() as u64 && !gone {
            return Ok(());
        }
        for point in &armed.points {
            arm(kept, point, 0)?;
        }
        if killed > 0 {
            let what = format!("the server died at {}", armed.points.join(" and then at "));
            self.marks.push((self.shared.mark(), what));
            self.died(killed);
        }
        self.armed = None;
        Ok(())
    }

    /// Arms one of the points that the server is known to come to.
    fn arm(&mut self, kept: &Kept<'_>) -> Result<()> {
        let seen = kept.table.all();
        let of = |map: &BTreeMap<String, u64>, name: &str| map.get(name).copied().unwrap_or(0);
        let often = |name: &str| of(self.before, name) + of(&self.tried, name);
        let is = |name: &str, opcode: &str| name.starts_with(opcode);
        let mut candidates: Vec<&Seen> = seen
            .iter()
            .filter(|seen| seen.reached > 0)
            .filter(|seen| !is(&seen.name, "adopt.") && !is(&seen.name, "recover."))
            .collect();
        self.rng.shuffle(&mut candidates);
        // One time in three the one that it has died at least often, which is hardly ever reached; else one that is
        // reached often, or the server would hardly ever die.
        let found = match self.rng.below(3) {
            0 => candidates.iter().min_by_key(|seen| often(&seen.name)),
            _ => candidates.iter().take(8).max_by_key(|seen| seen.reached),
        };
        let Some(point) = found.map(|seen| seen.name.clone()) else {
            return Ok(());
        };
        *self.tried.entry(point.clone()).or_default() += 1;
        // 0: none, and forget the one that an earlier order may have left.
        let mut then = ("recover.start".to_owned(), 0);
        if self.in_a_row == 0 && self.rng.below(4) == 0 {
            let again = seen.iter().filter(|seen| is(&seen.name, "recover."));
            let again: Vec<_> = again.filter(|seen| seen.reached > 0).collect();
            if !again.is_empty() {
                then = (again[self.rng.below(again.len())].name.clone(), 1);
            }
        }
        kept.table.arm_then(&point, &then.0, then.1)?;
        let mut points = vec![point];
        points.extend((then.1 > 0).then_some(then.0));
        let (at, before) = (self.shared.now(), killed(kept));
        arm(kept, &points[0], 1 + self.rng.below(2) as u64)?;
        self.armed = Some(Armed {
            points,
            at,
            killed: before,
        });
        Ok(())
    }

    fn signals(&mut self, kept: &Kept<'_>) -> Result<()> {
        if self.shared.now() < self.next {
            return Ok(());
        }
        let keeper = kept.status()?.keeper;
        let Some(pid) = keeper.server_pid.filter(|pid| *pid != self.last_pid) else {
            return Ok(());
        };
        // Its parent is the keeper, which says that it lives and has not reaped it: the pid is nobody else's, but for
        // the moment in which the file is older than the death; then there is nobody to kill.
        if kill(Pid::from_raw(pid), Signal::SIGKILL).is_err() {
            return Ok(());
        }
        self.last_pid = pid;
        self.signals += 1;
        let at = self.shared.mark();
        self.marks.push((at, format!("the server {pid} is killed")));
        // Now and then the next one at once, in its recovery.
        self.next = match self.rng.below(4) {
            0 => at,
            _ => at + 4 + self.rng.below(40) as u64,
        };
        self.died(1);
        Ok(())
    }

    fn died(&mut self, times: u64) {
        self.in_a_row += times;
        if self.in_a_row >= IN_A_ROW {
            self.in_a_row = 0;
            self.pause = Some(self.shared.stamps());
        }
    }

    /// No more deaths from now on, but for one that is under way.
    pub fn stop(&mut self, kept: &Kept<'_>) -> Result<()> {
        let armed = self.armed.take();
        for seen in kept.table.all().iter().filter(|seen| seen.left > 0) {
            arm(kept, &seen.name, 0)?;
        }
        if let Some(armed) = armed.filter(|armed| killed(kept) > armed.killed) {
            let what = format!("the server died at {} before", armed.points.join(" or at "));
            self.marks.push((self.shared.mark(), what));
        }
        Ok(())
    }

    /// How often the server died or is dying.
    pub fn deaths(&self, kept: &Kept<'_>) -> u64 {
        self.signals + killed(kept)
    }
}

fn killed(kept: &Kept<'_>) -> u64 {
    kept.table.all().iter().map(|seen| seen.killed).sum()
}

fn arm(kept: &Kept<'_>, point: &str, nth: u64) -> Result<()> {
    let (opcode, name) = point.split_once('.').context("a point is OPCODE.POINT")?;
    Ok(kept.table.arm(opcode, name, nth)?)
}
