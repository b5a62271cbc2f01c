// SPDX-License-Identifier: GPL-2.0
//! Properties of the pure core that must hold for every input, not only for the tables' rows.

use proptest::prelude::*;
use rust_fuse_notify::proto::ids;
use rust_fuse_notify::proto::phase::{Machine, Phase};
use rust_fuse_notify::proto::tally::{Tally, Totals};
use rust_fuse_notify::proto::verdict::{judge, Answer, Known, Shown, Verdict};
use rust_fuse_notify::proto::window::{Window, SLOTS};

proptest! {
    #[test]
    fn a_reply_of_another_of_the_last_255_epochs_never_matches(
        id in 0u64..1 << 48, epoch in any::<u32>(), ago in 1u32..256,
    ) {
        let now = ids::resent(id, epoch);
        prop_assert_ne!(now, ids::resent(id, epoch.wrapping_sub(ago)));
        prop_assert_ne!(now, id);
        prop_assert_eq!(ids::original(now), id);
    }

    #[test]
    fn only_the_same_type_and_number_is_confirmed(
        kind in any::<u32>(), ino in any::<Option<u64>>(),
        mode in any::<u32>(), shown_ino in any::<u64>(), size in any::<u64>(),
    ) {
        let shown = Shown { mode, ino: shown_ino, size };
        let verdict = judge(Known { kind, ino }, Answer::Attr(shown));
        prop_assert_ne!(verdict, Verdict::Void);
        prop_assert_ne!(verdict, Verdict::RevokedUnknown);
        if verdict == Verdict::Confirmed {
            prop_assert_eq!(kind & 0o170000, mode & 0o170000);
            prop_assert!(ino.is_none_or(|i| i == shown_ino));
            prop_assert!(shown.is_valid());
        }
    }

    /// Whatever happens in whatever order: requests are released only after a COMMIT that named
    /// the epoch whose root was confirmed and whose replays were all answered.
    #[test]
    fn nothing_is_released_before_its_time(steps in prop::collection::vec(0u8..9, 0..64)) {
        let mut m = Machine::new();
        let mut epoch = 0;
        let (mut root, mut walked, mut reported, mut committed) = (false, false, false, false);
        for step in steps {
            match step {
                0 => {
                    epoch += 1;
                    if m.restarted(epoch).is_ok() {
                        (root, walked, reported, committed) = (false, false, false, false);
                    }
                }
                1 => { m.root_sent(); }
                2 => root |= m.root_answered(true),
                3 => { m.root_answered(false); }
                4 => if m.replayed() { prop_assert!(root); walked = true },
                5 => if m.prepared() { prop_assert!(walked); reported = true },
                6 => if m.commit(epoch).is_ok() { prop_assert!(reported); committed = true },
                7 => prop_assert!(epoch == 0 || m.commit(epoch - 1).is_err()),
                _ => if m.released() { prop_assert!(committed); committed = false },
            }
            prop_assert!(m.phase() != Phase::Release || committed);
        }
    }

    #[test]
    fn a_slot_is_never_given_twice(steps in prop::collection::vec(any::<Option<u8>>(), 0..300)) {
        let mut w = Window::new();
        let mut taken = std::collections::BTreeSet::new();
        for step in steps {
            match step {
                None => match w.take() {
                    Some(slot) => prop_assert!(slot < SLOTS && taken.insert(slot)),
                    None => prop_assert_eq!(taken.len(), SLOTS),
                },
                Some(slot) => prop_assert_eq!(w.give(slot.into()), taken.remove(&slot.into())),
            }
            prop_assert_eq!(w.in_flight() as usize, taken.len());
        }
    }

    #[test]
    fn the_numbers_add_up(verdicts in prop::collection::vec(0u8..4, 0..200)) {
        let mut tally = Tally::default();
        for v in &verdicts {
            tally.count(match v {
                0 => Verdict::Confirmed,
                1 => Verdict::RevokedCounted,
                2 => Verdict::RevokedUnknown,
                _ => Verdict::Void,
            });
        }
        let report = tally.report(3, 8);
        prop_assert_eq!(report.replayed, report.confirmed + report.revoked);
        prop_assert_eq!(report.replayed + tally.void, verdicts.len() as u64);
        let mut totals = Totals::default();
        totals.add(&tally, true);
        totals.add(&tally, false);
        prop_assert_eq!(totals.recoveries, 1);
        prop_assert_eq!(totals.replayed, 2 * report.replayed);
    }
}
