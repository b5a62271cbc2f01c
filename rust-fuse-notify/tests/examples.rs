// SPDX-License-Identifier: GPL-2.0
//! What is said of the examples. That they survive SIGKILL is tested with a keeper, in the harness.

use std::sync::Arc;

use rust_fuse_notify::std::adopt::Recover;
use rust_fuse_notify::std::state::{Config, Intent, Recorded, State, Success};

#[path = "../examples/counters.rs"]
#[allow(dead_code)]
mod counters;

/// A death between the change and its outcome is too short a moment for a test that kills at random ones.
#[test]
fn the_example_reads_the_fate_of_a_write_off_the_value() {
    let config = Config {
        arena_pages: 1,
        ..Config::default()
    };
    for made in [false, true] {
        let memfd = State::create_memfd().unwrap();
        let open = || {
            let fd = memfd.try_clone().unwrap();
            Arc::new(State::open(fd, counters::IDENTITY, &config).unwrap())
        };
        let state = open();
        let intent = Intent {
            opcode: 16,
            nodeids: [2, 0],
            ..Intent::default()
        };
        drop(state.journal().begin(50, &intent).unwrap());
        if made {
            state.arena().publish(0, 1);
        }
        drop(state);
        let state = open();
        counters::Counters(state.clone()).resolve(&state).unwrap();
        let done = Recorded::Outcome(Ok(Success::default()));
        assert_eq!(state.journal().lookup(50), made.then_some(done));
    }
}

/// Lines that only one of the two has, by their longest common subsequence.
fn changed(before: &str, after: &str) -> usize {
    let (a, b): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
    let mut common = vec![0_usize; b.len() + 1];
    for line in &a {
        let mut diagonal = 0;
        for (j, other) in b.iter().enumerate() {
            let here = if line == other {
                diagonal + 1
            } else {
                common[j].max(common[j + 1])
            };
            diagonal = std::mem::replace(&mut common[j + 1], here);
        }
    }
    a.len().max(b.len()) - common[b.len()]
}

#[test]
fn lines_that_differ_are_counted() {
    assert_eq!(changed("a\nb\nc", "a\nb\nc"), 0);
    assert_eq!(changed("a\nb\nc", "a\nx\nc\ny"), 2);
}

/// As a diff has it: a line that became another one counts once.
#[test]
fn a_server_is_made_restartable_in_under_30_lines() {
    let before = include_str!("../examples/hello_plain.rs");
    let after = include_str!("../examples/hello.rs");
    let code = |text: &str| {
        let lines = text.lines().map(str::trim);
        let code = lines.filter(|l| !l.is_empty() && !l.starts_with("//"));
        code.map(str::to_owned).collect::<Vec<_>>().join("\n")
    };
    let changed = changed(&code(before), &code(after));
    assert!((1..30).contains(&changed), "{changed} lines");
}
