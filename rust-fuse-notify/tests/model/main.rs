// SPDX-License-Identifier: GPL-2.0

//! The model, explored. See `Documentation/model.md`.
//!
//! `cargo test` explores the small models, and the rest with
//! `cargo test --release -p rust-fuse-notify --test model -- --ignored`.

#[path = "mod.rs"]
mod model;

use model::check::{COUNTS, SUCCESSOR, UNTOLD};
use model::sizes::{Order, Size};
use model::{fair, reached, seeds, sizes};
use stateright::{Checker, Expectation, HasDiscoveries, Model};
use std::collections::BTreeSet;

/// Explores a model whole: every property holds. Returns what it reached.
fn explore(size: Size) -> BTreeSet<&'static str> {
    let checker = size.checker().threads(2).spawn_bfs().join();
    for property in checker.model().properties() {
        if property.expectation == Expectation::Always {
            checker.assert_no_discovery(property.name);
        }
    }
    checker.discoveries().into_keys().collect()
}

/// The property fails in this model.
fn fails(size: Size, property: &'static str) {
    size.checker()
        .threads(2)
        .finish_when(HasDiscoveries::AnyOf(BTreeSet::from([property])))
        .spawn_bfs()
        .join()
        .assert_any_discovery(property);
}

#[test]
fn every_property_holds() {
    let small = sizes::sizes().into_iter().filter(|s| s.small);
    let reached: BTreeSet<_> = small.flat_map(explore).collect();
    for (what, _) in reached::REACHED {
        assert!(reached.contains(what), "no model reaches this: {what}");
    }
}

#[test]
#[ignore = "half a minute with --release, several without"]
fn every_property_holds_in_large_models() {
    for size in sizes::sizes() {
        explore(size);
    }
}

#[test]
fn progress_comes_to_an_end() {
    for size in sizes::sizes().into_iter().filter(|s| s.small) {
        assert!(
            fair::ends(&size).is_ok(),
            "{}: progress in a circle",
            size.name
        );
    }
}

#[test]
#[ignore = "a minute with --release"]
fn progress_comes_to_an_end_in_large_models() {
    for size in sizes::sizes() {
        assert!(
            fair::ends(&size).is_ok(),
            "{}: progress in a circle",
            size.name
        );
    }
}

#[test]
fn every_seeded_bug_is_found() {
    for row in seeds::TABLE {
        fails(sizes::by_name(row.size).seeded(row.seed), row.property);
    }
}

#[test]
fn resend_first_is_wrong() {
    for (size, property) in [
        ("orders", SUCCESSOR),
        ("orders", UNTOLD),
        ("counts", COUNTS),
    ] {
        fails(sizes::by_name(size).ordered(Order::ResendFirst), property);
    }
}
