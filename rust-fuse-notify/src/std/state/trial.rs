// SPDX-License-Identifier: GPL-2.0
//! Suspects: requests that a dead instance had in its hands. One of them may have killed it.
//!
//! Each is run alone, so that a death tells which it was: a suspect waits until nothing else runs, and everything else
//! waits until it is answered. Deaths during such a *trial* are counted, and only these: nobody is blamed for having
//! run at the same time. An application must not wait for ever for a suspect that itself waits for an application, so
//! after [`ALONE`] the others are let in, and the trial does not count. Next time that suspect comes last and has twice
//! as long, so that one which takes its time to kill the server is found out as well. A suspect that was in a hang
//! stays alone until it is answered, or until the keeper finds the hang again.
//!
//! An instance that is ended on purpose ([`Flights::leave`]) takes the trial under way back.
//!
//! A suspect whose caller was killed does not come again. The report of the recovery tells most of these; the rest is
//! given up [`ARRIVAL`] after the first request that is new, since resent ones come before.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::flights::{Flights, HUNG, SLOW};

/// How long a suspect may keep all others waiting, the first time.
const ALONE: Duration = Duration::from_secs(1);
/// The same for one that was in a hang: longer than any keeper waits.
const ALONE_HUNG: Duration = Duration::from_secs(600);
/// How long a suspect may be on its way after the first new request.
const ARRIVAL: Duration = Duration::from_secs(2);

/// Low half of the word: deaths in a trial.
const TRIES: u64 = 0xffff_ffff;
/// Where in the word it stands how often the others were let in.
const DISTURBED_AT: u32 = 40;
/// From then on it has [`ALONE`] times 64: more would cost applications more than one that kills so slowly does.
const DISTURBED_MAX: u64 = 6;

fn disturbed(word: u64) -> u64 {
    (word >> DISTURBED_AT).min(DISTURBED_MAX)
}

/// How long a suspect may keep the others waiting. One whose opcode may wait for an application is not given more time,
/// for that application may be one of the others.
fn time_alone(word: u64, may_wait: bool) -> Duration {
    match word & HUNG {
        0 if may_wait => ALONE,
        0 => ALONE * (1 << disturbed(word)),
        _ => ALONE_HUNG,
    }
}

#[derive(Debug, Default)]
pub(super) struct Trials {
    /// Not arrived yet: original id, slot.
    suspects: BTreeMap<u64, usize>,
    /// Arrived, waiting to be alone.
    waiting: u32,
    /// Arrived, lets others go first: how often each was disturbed.
    patient: Vec<u64>,
    running: u32,
    trial: Option<Trial>,
    first_new: Option<Instant>,
    /// This instance ends on purpose: no trial counts any more.
    leaving: bool,
}

#[derive(Debug)]
struct Trial {
    slot: usize,
    until: Instant,
    /// Nothing else runs so far: a death is counted.
    counts: bool,
}

/// What becomes of a request that comes while there are suspects.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// A suspect whose turn it is.
    Trial(usize),
    /// A suspect that has cost too many instances.
    Refused { slot: usize, tries: u32 },
    /// A suspect that runs with the others.
    Slow(usize),
    /// None, or one that nobody had begun with.
    Other,
    /// There are no suspects any more.
    Over,
}

impl Trials {
    pub(super) fn suspect(&mut self, id: u64, slot: usize) {
        self.suspects.insert(id, slot);
    }

    pub(super) fn any(&self) -> bool {
        !self.suspects.is_empty()
    }

    /// Whether somebody should be tried before one that was disturbed so often.
    fn others_first(&self, times: u64) -> bool {
        self.any()
            || self.waiting > 0
            || self.trial.is_some()
            || self.patient.iter().any(|other| *other < times)
    }

    fn over(&self) -> bool {
        self.suspects.is_empty()
            && self.waiting == 0
            && self.patient.is_empty()
            && self.trial.is_none()
    }
}

impl Flights {
    fn locked(&self) -> MutexGuard<'_, Trials> {
        self.trials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Trials>, until: Instant) -> MutexGuard<'a, Trials> {
        let left = until.saturating_duration_since(Instant::now());
        let waited = self.turn.wait_timeout(guard, left);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    pub(super) fn gate(&self, id: u64, resent: bool, max_tries: u32) -> Entry {
        let mut trials = self.locked();
        let slot = resent.then(|| trials.suspects.remove(&id)).flatten();
        let Some(slot) = slot else {
            return self.admit(trials, resent);
        };
        let word = self.flags_and_tries(slot);
        let tries = (word & TRIES) as u32;
        if max_tries != 0 && tries >= max_tries {
            return Entry::Refused { slot, tries };
        }
        if word & SLOW != 0 {
            // The others first, if they come.
            let times = disturbed(word);
            trials.patient.push(times);
            let until = Instant::now() + ALONE;
            while trials.others_first(times) && Instant::now() < until {
                trials = self.wait(trials, until);
            }
            if let Some(own) = trials.patient.iter().position(|other| *other == times) {
                trials.patient.swap_remove(own);
            }
            self.turn.notify_all();
        }
        trials.waiting += 1;
        while let Some(trial) = &trials.trial {
            let until = trial.until;
            if Instant::now() >= until {
                self.disturb(&mut trials);
                break;
            }
            trials = self.wait(trials, until);
        }
        let until = Instant::now() + ALONE;
        while (trials.running > 0 || trials.trial.is_some()) && Instant::now() < until {
            trials = self.wait(trials, until);
        }
        trials.waiting -= 1;
        let alone = trials.running == 0 && trials.trial.is_none();
        if !alone {
            // It has to go on, or those that it waits for might never end.
            trials.running += 1;
            return Entry::Slow(slot);
        }
        let counts = !trials.leaving;
        if counts {
            // Before it begins: should the process die of it, this stays.
            self.set_flags_and_tries(slot, word + 1);
        }
        trials.trial = Some(Trial {
            slot,
            until: Instant::now() + time_alone(word, self.may_wait(slot)),
            counts,
        });
        Entry::Trial(slot)
    }

    /// Any other request, while there are suspects.
    fn admit(&self, mut trials: MutexGuard<'_, Trials>, resent: bool) -> Entry {
        let first_new = match resent {
            true => trials.first_new,
            false => Some(*trials.first_new.get_or_insert_with(Instant::now)),
        };
        if first_new.is_some_and(|at| at.elapsed() > ARRIVAL) {
            for slot in std::mem::take(&mut trials.suspects).into_values() {
                self.clear(slot);
            }
        }
        if trials.over() {
            self.quarantine.store(false, Ordering::Release);
            return Entry::Over;
        }
        // Those that wait for their turn come first, each for as long as it may.
        let give_up = Instant::now() + ALONE;
        loop {
            let until = match &trials.trial {
                Some(trial) => trial.until,
                None if trials.waiting > 0 => give_up,
                None => break,
            };
            if Instant::now() >= until {
                self.disturb(&mut trials);
                break;
            }
            trials = self.wait(trials, until);
        }
        trials.running += 1;
        Entry::Other
    }

    /// Somebody else begins while a suspect runs: a death would not tell whose fault it is.
    fn disturb(&self, trials: &mut Trials) {
        if let Some(trial) = trials.trial.take() {
            let word = self.flags_and_tries(trial.slot);
            let word = word.saturating_sub(u64::from(trial.counts));
            let times = (disturbed(word) + 1).min(DISTURBED_MAX);
            let rest = word & ((1 << DISTURBED_AT) - 1) | SLOW;
            self.set_flags_and_tries(trial.slot, times << DISTURBED_AT | rest);
            // From now on it is one of those that run.
            trials.running += 1;
            self.turn.notify_all();
        }
    }

    /// Call it when this instance is about to end because somebody wants it to (`SIGTERM`, before the signal takes
    /// effect): what it has in its hands is not the reason, so the trial under way does not count, nor does one that
    /// begins from now on.
    pub fn leave(&self) {
        let mut trials = self.locked();
        trials.leaving = true;
        if let Some(trial) = &mut trials.trial {
            if std::mem::replace(&mut trial.counts, false) {
                let word = self.flags_and_tries(trial.slot);
                self.set_flags_and_tries(trial.slot, word.saturating_sub(1));
            }
        }
    }

    /// A request that began while there were suspects was answered.
    pub(super) fn answered(&self, slot: Option<usize>) {
        let mut trials = self.locked();
        let own = slot.is_some() && trials.trial.as_ref().map(|trial| trial.slot) == slot;
        if own {
            trials.trial = None;
        } else {
            trials.running -= 1;
        }
        self.end(trials);
    }

    pub(super) fn settle_quarantine(&self) {
        self.end(self.locked());
    }

    fn end(&self, trials: MutexGuard<'_, Trials>) {
        if trials.over() {
            self.quarantine.store(false, Ordering::Release);
        }
        drop(trials);
        self.turn.notify_all();
    }

    /// What the report of a recovery says is not owed does not come again.
    pub(super) fn drop_below(&self, lowest_owed: Option<u64>) {
        let mut trials = self.locked();
        let lowest = lowest_owed.unwrap_or(u64::MAX);
        let owed = trials.suspects.split_off(&lowest);
        for slot in std::mem::replace(&mut trials.suspects, owed).into_values() {
            self.clear(slot);
        }
        self.end(trials);
    }
}
