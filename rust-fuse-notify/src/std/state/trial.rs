// SPDX-License-Identifier: GPL-2.0
//! Suspects: requests that a dead instance had in its hands. One of them may have killed it.
//!
//! Each is run alone, so that a death tells which it was: a suspect waits until nothing else runs, and everything else
//! waits until it is answered. Deaths during such a *trial* are counted, and only these: nobody is blamed for having
//! run at the same time. An application must not wait for ever for a suspect that itself waits for an application, so
//! after [`ALONE`] the others are let in, the trial does not count, and next time that suspect comes last. A suspect
//! that was in a hang stays alone until it is answered, or until the keeper finds the hang again.
//!
//! A suspect whose caller was killed does not come again. The report of the recovery tells most of these; the rest is
//! given up [`ARRIVAL`] after the first request that is new, since resent ones come before.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::flights::{Flights, HUNG, SLOW};

/// How long a suspect may keep all others waiting.
const ALONE: Duration = Duration::from_secs(1);
/// The same for one that was in a hang: longer than any keeper waits.
const ALONE_HUNG: Duration = Duration::from_secs(600);
/// How long a suspect may be on its way after the first new request.
const ARRIVAL: Duration = Duration::from_secs(2);

/// Low half of the word: deaths in a trial.
const TRIES: u64 = 0xffff_ffff;

#[derive(Debug, Default)]
pub(super) struct Trials {
    /// Not arrived yet: original id, slot.
    suspects: BTreeMap<u64, usize>,
    /// Arrived, waiting to be alone.
    waiting: u32,
    running: u32,
    trial: Option<Trial>,
    first_new: Option<Instant>,
}

#[derive(Debug)]
struct Trial {
    slot: usize,
    until: Instant,
    /// Nothing else runs, so far.
    alone: bool,
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

    fn over(&self) -> bool {
        self.suspects.is_empty() && self.waiting == 0 && self.trial.is_none()
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
            let until = Instant::now() + ALONE;
            while (trials.any() || trials.waiting > 0 || trials.trial.is_some())
                && Instant::now() < until
            {
                trials = self.wait(trials, until);
            }
            trials.running += 1;
            return Entry::Slow(slot);
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
        // Before it begins: should the process die of it, this stays.
        self.set_flags_and_tries(slot, word + 1);
        let time = if word & HUNG != 0 { ALONE_HUNG } else { ALONE };
        trials.trial = Some(Trial {
            slot,
            until: Instant::now() + time,
            alone,
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
        if let Some(trial) = &mut trials.trial {
            if std::mem::replace(&mut trial.alone, false) {
                let word = self.flags_and_tries(trial.slot);
                self.set_flags_and_tries(trial.slot, (word - 1) | SLOW);
            }
            // From now on it is one of those that run.
            trials.trial = None;
            trials.running += 1;
            self.turn.notify_all();
        }
    }

    /// A request that began while there were suspects was answered.
    pub(super) fn leave(&self, slot: Option<usize>) {
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
