// SPDX-License-Identifier: GPL-2.0

//! Explores the model of `tests/model` and tells what happens in it; see `Documentation/model.md`.
//!
//! ```text
//! cargo run --release -p rust-fuse-notify --example model -- sizes
//! cargo run --release -p rust-fuse-notify --example model -- seeds
//! cargo run --release -p rust-fuse-notify --example model -- fair
//! cargo run --release -p rust-fuse-notify --example model -- resend-first
//! cargo run --release -p rust-fuse-notify --example model -- seed KeepForgets
//! ```

#[path = "../tests/model/mod.rs"]
mod model;

use model::check::{COUNTS, SUCCESSOR, UNTOLD};
use model::sizes::{by_name, sizes, Order, Size};
use model::story::story;
use model::{fair, seeds};
use stateright::{Checker, Expectation, HasDiscoveries, Model};
use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Instant;

const USAGE: &str = "\
usage: model sizes         explore every model whole, tell how many states it has
       model fair          look for progress that goes in a circle
       model seeds         find every seeded bug, tell which property it breaks
       model seed NAME     the same for one bug, and tell what happens
       model resend-first  why inodes are replayed before requests are sent again";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let good = match words[..] {
        ["sizes"] => explore_all(),
        ["fair"] => all_ends(),
        ["seeds"] => seeds::TABLE.iter().all(|row| seed(row, false)),
        ["seed", name] => {
            let is = |row: &&seeds::Row| format!("{:?}", row.seed) == name;
            match seeds::TABLE.iter().find(is) {
                Some(row) => seed(row, true),
                None => {
                    eprintln!("no bug is called {name}; `model seeds` lists them");
                    return ExitCode::from(2);
                }
            }
        }
        ["resend-first"] => [
            ("orders", SUCCESSOR),
            ("orders", UNTOLD),
            ("counts", COUNTS),
        ]
        .into_iter()
        .all(|(size, property)| {
            let size = by_name(size).ordered(Order::ResendFirst);
            counterexample(size, property, true)
        }),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Returns whether every property holds in every model.
fn explore_all() -> bool {
    println!("| model | states | steps at most | seconds | what |");
    println!("|---|---|---|---|---|");
    let mut holds = true;
    let (mut states, start) = (0, Instant::now());
    for size in sizes() {
        let (name, about) = (size.name, size.about);
        let begun = Instant::now();
        let checker = size.checker().threads(2).spawn_bfs().join();
        let seconds = begun.elapsed().as_secs_f32();
        let count = checker.unique_state_count();
        states += count;
        let depth = checker.max_depth();
        println!("| {name} | {count} | {depth} | {seconds:.1} | {about} |");
        for property in checker.model().properties() {
            if property.expectation != Expectation::Always {
                continue;
            }
            if let Some(path) = checker.discovery(property.name) {
                holds = false;
                println!(
                    "does not hold: {}\n{}",
                    property.name,
                    story(path.into_vec())
                );
            }
        }
    }
    let seconds = start.elapsed().as_secs_f32();
    println!("{states} states in {seconds:.0} seconds");
    holds
}

/// Returns whether progress comes to an end in every model.
fn all_ends() -> bool {
    sizes().iter().all(|size| match fair::ends(size) {
        Ok(ends) => {
            let (name, states, longest) = (size.name, ends.states, ends.longest);
            println!("{name}: {states} states, at most {longest} steps without mischief");
            true
        }
        Err(state) => {
            println!("{}: progress in a circle: {state:?}", size.name);
            false
        }
    })
}

fn seed(row: &seeds::Row, tell: bool) -> bool {
    print!("{:?}: ", row.seed);
    counterexample(by_name(row.size).seeded(row.seed), row.property, tell)
}

/// Returns whether there is one.
fn counterexample(size: Size, property: &'static str, tell: bool) -> bool {
    let name = size.name;
    let checker = size
        .checker()
        .finish_when(HasDiscoveries::AnyOf(BTreeSet::from([property])))
        .spawn_bfs()
        .join();
    let Some(path) = checker.discovery(property) else {
        println!("not found in the model {name}: {property}");
        return false;
    };
    let states = path.into_vec();
    println!(
        "in the model {name}, after {} steps, this fails: {property}",
        states.len() - 1
    );
    if tell {
        println!("{}", story(states));
    }
    true
}
