// SPDX-License-Identifier: GPL-2.0
//! One crash: its stamps, the parts of its outage, and whether they can be believed.

use anyhow::{ensure, Context, Result};
use serde::{Deserialize, Serialize};

use super::trace::Change;
use crate::fusectl::Recovery;

/// How much the kernel's own measurements of its phases may be off the trace's, in nanoseconds: two clocks are read one
/// after the other, on a machine that may take a processor away in between.
pub const TOLERANCE_NS: u64 = 10_000_000;
/// The same as a share of what is compared, for long phases.
pub const TOLERANCE: f64 = 0.02;

pub const PARTS: [&str; 5] = ["notice", "start", "replay", "report", "release"];

/// Nanoseconds from the crash to the first answered request, and its parts in the order of [`PARTS`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    pub whole: u64,
    pub parts: [u64; 5],
    /// Of `notice`: until the keeper had seen the death, reaped the server and killed what it may have left.
    pub seen: u64,
    pub replayed: u64,
}

/// What one crash left behind, all on CLOCK_MONOTONIC.
pub struct Stamps<'a> {
    /// Before kill(2).
    pub killed: u64,
    /// After the request that was made then was answered.
    pub answered: u64,
    /// Events of the keeper: the server died; the kernel was told.
    pub died: u64,
    pub told: u64,
    pub changes: &'a [Change],
    pub recovery: &'a Recovery,
}

/// The last change to `phase` before `limit`.
fn last(changes: &[Change], phase: &str, limit: u64) -> Result<u64> {
    let found = changes
        .iter()
        .rev()
        .find(|change| change.phase == phase && change.at_ns <= limit);
    Ok(found
        .with_context(|| format!("the trace says nothing of {phase:?}: {changes:?}"))?
        .at_ns)
}

impl Sample {
    /// # Errors
    /// If the stamps are not in the order in which these things happen, or what the keeper and the kernel say of the
    /// parts is not what the trace says.
    pub fn new(stamps: &Stamps<'_>) -> Result<Sample> {
        let Stamps {
            killed, answered, ..
        } = *stamps;
        let changes = stamps.changes;
        let first = changes.iter().find(|change| change.phase == "held");
        let held = first.context("the trace says nothing of this crash")?.at_ns;
        let prepared = last(changes, "prepared", answered)?;
        let restarted = last(changes, "held", prepared)?;
        let release = last(changes, "release", answered)?;
        let serving = last(changes, "serving", u64::MAX)?;
        // The trace cuts to microseconds, so what is told of one moment may be one less.
        let order = [killed, held, restarted, prepared, release, answered];
        ensure!(
            order.windows(2).all(|pair| pair[0] <= pair[1] + 1000)
                && restarted > held
                && release <= serving + 1000,
            "the stamps are not in order: {order:?}"
        );
        let between = |from: u64, to: u64| to.saturating_sub(from);
        let parts = [
            between(killed, held),
            between(held, restarted),
            between(restarted, prepared),
            between(prepared, release),
            between(release, answered),
        ];
        let sample = Sample {
            whole: between(killed, answered),
            parts,
            seen: between(killed, stamps.died),
            replayed: stamps.recovery.get("replayed"),
        };
        // The keeper has seen the death before it tells the kernel, and says so afterwards.
        ensure!(
            killed <= stamps.died && stamps.died <= held + 1000 && held <= stamps.told,
            "the keeper saw the death at {}, told the kernel before {}; the kernel says {held}",
            stamps.died,
            stamps.told
        );
        let ns = |key: &str| stamps.recovery.get(key);
        let replay = ns("hold_ns") + ns("root_ns") + ns("replay_ns") + ns("settle_ns");
        agree("replay", parts[2], replay)?;
        agree(
            "COMMIT to serving",
            between(release, serving),
            ns("release_ns"),
        )?;
        let sum: u64 = parts.iter().sum();
        ensure!(
            sum.abs_diff(sample.whole) <= TOLERANCE_NS,
            "the parts are {sum} ns together, the whole is {} ns",
            sample.whole
        );
        Ok(sample)
    }
}

fn agree(what: &str, trace: u64, kernel: u64) -> Result<()> {
    let allowed = TOLERANCE_NS.max((trace as f64 * TOLERANCE) as u64);
    ensure!(
        trace.abs_diff(kernel) <= allowed,
        "{what}: {trace} ns by the trace, {kernel} ns by the kernel's numbers; more than {allowed} ns apart"
    );
    Ok(())
}

/// The value that `percent` of all are not above (nearest rank).
pub fn percentile(values: &mut [u64], percent: usize) -> u64 {
    values.sort_unstable();
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn changes() -> Vec<Change> {
        let of = |at_ms: u64, epoch, phase: &str| Change {
            at_ns: at_ms * MS,
            connection: 1,
            epoch,
            phase: phase.into(),
        };
        vec![
            of(12, 2, "held"),
            of(12, 2, "root"),
            of(40, 3, "held"),
            of(40, 3, "root"),
            of(43, 3, "replay"),
            of(60, 3, "settle"),
            of(60, 3, "prepared"),
            of(65, 3, "release"),
            of(66, 3, "serving"),
        ]
    }

    fn recovery(replay_ns: u64) -> Recovery {
        let text = format!(
            "state serving\nreplayed 5\nhold_ns 10\nroot_ns {}\nreplay_ns {replay_ns}\nsettle_ns 5\nrelease_ns {MS}\n",
            3 * MS
        );
        Recovery::parse(&text).unwrap()
    }

    fn sample(changes: &[Change], recovery: &Recovery, died: u64) -> Result<Sample> {
        Sample::new(&Stamps {
            killed: 10 * MS,
            answered: 70 * MS,
            died,
            told: 13 * MS,
            changes,
            recovery,
        })
    }

    #[test]
    fn the_parts_are_the_whole() {
        let sample = sample(&changes(), &recovery(17 * MS), 11 * MS).unwrap();
        assert_eq!(sample.parts, [2, 28, 20, 5, 5].map(|ms| ms * MS));
        assert_eq!((sample.whole, sample.seen), (60 * MS, MS));
        assert_eq!(sample.replayed, 5);
    }

    #[test]
    fn the_answer_may_be_there_before_the_kernel_says_that_it_serves() {
        let mut late = changes();
        late[8].at_ns = 71 * MS;
        assert!(sample(&late, &recovery(17 * MS), 11 * MS).is_ok());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let fine = (changes(), recovery(17 * MS), 11 * MS);
        assert!(sample(&fine.0, &fine.1, fine.2).is_ok());
        // The kernel measured something else: a little may be.
        assert!(sample(&fine.0, &recovery(10 * MS), fine.2).is_ok());
        assert!(sample(&fine.0, &recovery(30 * MS), fine.2).is_err());
        // The death was seen when the kernel had been told already, or before it.
        assert!(sample(&fine.0, &fine.1, 20 * MS).is_err());
        assert!(sample(&fine.0, &fine.1, 9 * MS).is_err());
        // Something is missing, or the server never said RESTARTED for itself.
        for phase in ["held", "prepared", "release", "serving"] {
            let less: Vec<Change> = fine
                .0
                .iter()
                .filter(|change| change.phase != phase)
                .cloned()
                .collect();
            assert!(sample(&less, &fine.1, fine.2).is_err(), "{phase}");
        }
        let less: Vec<Change> = fine.0[2..].to_vec();
        assert!(sample(&less, &fine.1, fine.2).is_err());
        // Before the crash.
        let mut early = changes();
        early[0].at_ns = 5 * MS;
        assert!(sample(&early, &fine.1, fine.2).is_err());
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let mut values: Vec<u64> = (1..=100).rev().collect();
        assert_eq!(
            [50, 90, 99, 100].map(|p| percentile(&mut values, p)),
            [50, 90, 99, 100]
        );
        assert_eq!(percentile(&mut [7], 50), 7);
        assert_eq!(percentile(&mut [1, 2], 99), 2);
        assert_eq!(percentile(&mut [], 50), 0);
    }
}
