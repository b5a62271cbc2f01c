// SPDX-License-Identifier: GPL-2.0
//! Instances that die are states that are dropped without their flights having ended.

use std::mem::forget;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::Duration;

use super::tests::{open, report};
use super::*;
use crate::std::wire::FUSE_UNIQUE_RESEND;

fn request(id: u64) -> InFlight {
    InFlight {
        unique: id,
        opcode: 1,
        nodeid: 7,
        pid: 42,
    }
}

fn resent(id: u64) -> InFlight {
    request(id | FUSE_UNIQUE_RESEND)
}

fn memfd() -> OwnedFd {
    State::create_memfd().unwrap()
}

/// An instance that dies with these in its hands.
fn dies_with(fd: &OwnedFd, ids: &[u64]) {
    let state = open(fd).unwrap();
    for id in ids {
        forget(state.flights().enter(request(*id)));
    }
}

#[test]
fn what_is_answered_leaves_nothing() {
    let fd = memfd();
    let state = open(&fd).unwrap();
    state.flights().watch();
    let flight = state.flights().enter(request(10));
    let seen = pulse(fd.as_fd()).unwrap();
    assert_eq!(
        (seen.watched, seen.answered, &seen.in_hands[..]),
        (true, 0, &[request(10)][..])
    );
    drop(flight);
    let seen = pulse(fd.as_fd()).unwrap();
    assert_eq!((seen.answered, seen.in_hands.len()), (1, 0));
    drop(state);
    let again = open(&fd).unwrap();
    assert!(!again
        .flights()
        .quarantine
        .load(std::sync::atomic::Ordering::Relaxed));
}

#[test]
fn a_request_that_kills_when_alone_is_refused_after_so_many_tries() {
    for max in [1, 3] {
        let fd = memfd();
        dies_with(&fd, &[10, 12, 14]);
        for _ in 0..max {
            let state = open(&fd).unwrap();
            state.flights().set_max_tries(max);
            let flight = state.flights().enter(resent(10));
            assert!(!flight.is_refused());
            forget(flight); // dies of it
        }
        let state = open(&fd).unwrap();
        state.flights().set_max_tries(max);
        let flight = state.flights().enter(resent(10));
        assert!(flight.is_refused(), "{max}");
        drop(flight);
        // The others were never tried, so they are not blamed.
        for innocent in [12, 14] {
            assert!(!state.flights().enter(resent(innocent)).is_refused());
        }
        assert_eq!(pulse(fd.as_fd()).unwrap().refused, 1);
        drop(state);
        assert!(!open(&fd).unwrap().flights().enter(request(20)).is_refused());
    }
}

#[test]
fn zero_tries_means_for_ever() {
    let fd = memfd();
    dies_with(&fd, &[10]);
    for _ in 0..20 {
        let state = open(&fd).unwrap();
        state.flights().set_max_tries(0);
        let flight = state.flights().enter(resent(10));
        assert!(!flight.is_refused());
        forget(flight);
    }
}

/// Whether `enter` of another request comes back within `wait`.
fn admitted_while(
    flight: Option<Flight<'_>>,
    state: &State,
    other: InFlight,
    wait: Duration,
) -> bool {
    std::thread::scope(|scope| {
        let (say, said) = channel();
        scope.spawn(move || {
            let entered = state.flights().enter(other);
            let _ = say.send(());
            drop(entered);
        });
        let result = said.recv_timeout(wait);
        drop(flight);
        result != Err(RecvTimeoutError::Timeout)
    })
}

#[test]
fn nothing_runs_beside_a_suspect_for_a_while() {
    let fd = memfd();
    dies_with(&fd, &[10, 12]);
    let state = open(&fd).unwrap();
    let flight = state.flights().enter(resent(10));
    let short = Duration::from_millis(300);
    assert!(!admitted_while(Some(flight), &state, request(20), short));
    let flight = state.flights().enter(resent(12));
    assert!(admitted_while(
        Some(flight),
        &state,
        request(22),
        Duration::from_secs(20)
    ));
}

#[test]
fn who_was_not_alone_is_not_blamed_and_comes_last() {
    let fd = memfd();
    dies_with(&fd, &[10, 12]);
    for _ in 0..5 {
        let state = open(&fd).unwrap();
        let flight = state.flights().enter(resent(10));
        assert!(!flight.is_refused());
        // Lets itself in after a second, and then the instance dies.
        assert!(admitted_while(
            None,
            &state,
            request(20),
            Duration::from_secs(20)
        ));
        forget(flight);
    }
}

#[test]
fn what_hung_stays_alone() {
    let fd = memfd();
    dies_with(&fd, &[10]);
    let state = open(&fd).unwrap();
    forget(state.flights().enter(resent(10)));
    let hung = pulse(fd.as_fd()).unwrap().in_hands;
    assert_eq!(hung, [request(10)]);
    blame(fd.as_fd(), &hung).unwrap();
    drop(state);
    let state = open(&fd).unwrap();
    assert_eq!(pulse(fd.as_fd()).unwrap().in_hands, []);
    let flight = state.flights().enter(resent(10));
    let longer = Duration::from_millis(2500);
    assert!(!admitted_while(Some(flight), &state, request(20), longer));
}

#[test]
fn a_wait_for_an_application_is_no_sign_of_a_hang() {
    let fd = memfd();
    let state = open(&fd).unwrap();
    for opcode in [33, 40] {
        let waits = InFlight {
            opcode,
            ..request(10)
        };
        let _flight = state.flights().enter(waits);
        assert_eq!(pulse(fd.as_fd()).unwrap().in_hands, []);
    }
}

#[test]
fn suspects_that_are_not_owed_are_dropped() {
    let fd = memfd();
    dies_with(&fd, &[10, 12, 14]);
    let state = open(&fd).unwrap();
    state.settle(&report(Some(14)), |_| Keep::Keep);
    drop(state);
    let state = open(&fd).unwrap();
    forget(state.flights().enter(resent(14)));
    drop(state);
    let state = open(&fd).unwrap();
    state.settle(&report(None), |_| Keep::Keep);
    assert!(!state
        .flights()
        .quarantine
        .load(std::sync::atomic::Ordering::Relaxed));
}

#[test]
fn more_requests_than_slots_are_served_without_a_mark() {
    let fd = memfd();
    let state = open(&fd).unwrap();
    let flights: Vec<_> = (1..=300)
        .map(|id| state.flights().enter(request(id)))
        .collect();
    assert_eq!(pulse(fd.as_fd()).unwrap().in_hands.len(), 256);
    drop(flights);
    assert_eq!(pulse(fd.as_fd()).unwrap().answered, 256);
}

#[test]
fn an_empty_memfd_has_no_pulse() {
    assert_eq!(pulse(memfd().as_fd()).unwrap(), Pulse::default());
}
