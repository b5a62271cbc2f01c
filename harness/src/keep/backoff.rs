// SPDX-License-Identifier: GPL-2.0
//! When to start the server again, and when to stop trying. Pure: time goes in, a decision comes out.

use std::time::Duration;

/// The shortest pause once restarting has failed, whatever `--restart-delay` says: a crash loop never spins.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    StartAfter(Duration),
    /// This many instances in a row came to nothing.
    GiveUp(u32),
}

#[derive(Debug, Clone)]
pub struct Backoff {
    delay: Duration,
    max_in_a_row: u32,
    stable: Duration,
    in_a_row: u32,
}

impl Backoff {
    /// `delay`: pause before a restart; `max_in_a_row`: restarts without progress before giving up;
    /// `stable`: an instance that served this long made progress.
    pub fn new(delay: Duration, max_in_a_row: u32, stable: Duration) -> Self {
        Self {
            delay,
            max_in_a_row,
            stable,
            in_a_row: 0,
        }
    }

    /// An instance died by itself. `serving`: it had taken over (or nobody can tell).
    pub fn died(&mut self, lived: Duration, serving: bool) -> Decision {
        if serving && lived >= self.stable {
            self.in_a_row = 0;
        }
        self.in_a_row += 1;
        if self.in_a_row > self.max_in_a_row {
            return Decision::GiveUp(self.in_a_row);
        }
        Decision::StartAfter(self.pause())
    }

    /// An instance was ended on purpose: no failure, no pause.
    pub fn planned(&mut self) -> Decision {
        self.in_a_row = 0;
        Decision::StartAfter(Duration::ZERO)
    }

    /// The instance got something out of the way that would have killed the next one too.
    pub fn progress(&mut self) {
        self.in_a_row = 0;
    }

    fn pause(&self) -> Duration {
        match self.in_a_row {
            0 | 1 => self.delay,
            n => {
                let doublings = (n - 2).min(16);
                let pause = self.delay.max(FIRST_PAUSE) * (1 << doublings);
                // A delay that the user asked for is not cut.
                pause.min(LONGEST_PAUSE.max(self.delay))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn backoff(delay: u64, max: u32) -> Backoff {
        Backoff::new(MS(delay), max, MS(1000))
    }

    #[test]
    fn the_first_restart_is_immediate_and_a_loop_slows_down() {
        let mut b = backoff(0, 20);
        let pauses: Vec<_> = (0..12).map(|_| b.died(MS(1), true)).collect();
        let expected = [
            0, 50, 100, 200, 400, 800, 1600, 3200, 6400, 10000, 10000, 10000,
        ];
        assert_eq!(pauses, expected.map(|ms| Decision::StartAfter(MS(ms))));
    }

    #[test]
    fn it_gives_up_after_so_many_in_a_row() {
        let mut b = backoff(0, 3);
        for _ in 0..3 {
            assert!(matches!(b.died(MS(999), true), Decision::StartAfter(_)));
        }
        assert_eq!(b.died(MS(999), true), Decision::GiveUp(4));
    }

    #[test]
    fn a_stable_instance_starts_the_count_again() {
        let mut b = backoff(0, 2);
        for _ in 0..100 {
            assert_eq!(b.died(MS(1), true), Decision::StartAfter(MS(0)));
            assert_eq!(b.died(MS(1), true), Decision::StartAfter(MS(50)));
            assert_eq!(b.died(MS(1000), true), Decision::StartAfter(MS(0)));
            b.planned();
        }
    }

    #[test]
    fn one_that_never_took_over_is_no_progress_however_long_it_lived() {
        let mut b = backoff(0, 1);
        assert_eq!(b.died(MS(60_000), false), Decision::StartAfter(MS(0)));
        assert_eq!(b.died(MS(60_000), false), Decision::GiveUp(2));
    }

    #[test]
    fn a_long_delay_of_the_user_is_kept() {
        let mut b = backoff(30_000, 50);
        for _ in 0..50 {
            assert_eq!(b.died(MS(1), true), Decision::StartAfter(MS(30_000)));
        }
    }

    #[test]
    fn zero_restarts_means_none() {
        assert_eq!(backoff(0, 0).died(MS(9999), true), Decision::GiveUp(1));
    }
}
