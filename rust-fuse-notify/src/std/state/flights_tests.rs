// SPDX-License-Identifier: GPL-2.0
//! Instances that die are states that are dropped without their flights having ended.

use std::mem::forget;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::sys::uio::{pread, pwrite};

use super::flights::{CAPACITY, SLOT_LEN};
use super::header::FLIGHTS_AT;
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

/// One more instance, which dies `after` it has begun with request 10 again; whether that was refused instead.
fn killed_after(fd: &OwnedFd, after: Duration) -> bool {
    let state = open(fd).unwrap();
    let flight = state.flights().enter(resent(10));
    if flight.is_refused() {
        return true;
    }
    let (mut slots, began) = (vec![0; CAPACITY * SLOT_LEN], Instant::now());
    std::thread::scope(|scope| {
        let (say, said) = channel();
        let state = &state;
        // Somebody else wants in, and is let in if it takes too long.
        scope.spawn(move || {
            let entered = state.flights().enter(request(20));
            let _ = say.send(());
            drop(entered);
        });
        let _ = said.recv_timeout(after);
        std::thread::sleep(after.saturating_sub(began.elapsed()));
        pread(fd, &mut slots, FLIGHTS_AT as i64).unwrap();
        drop(flight);
    });
    drop(state);
    // What the dead leave is what was there at that moment.
    pwrite(fd, &slots, FLIGHTS_AT as i64).unwrap();
    false
}

#[test]
fn who_was_not_alone_is_not_blamed() {
    let fd = memfd();
    dies_with(&fd, &[10, 12]);
    // Longer than it has, each time.
    for secs in [2, 3, 6] {
        assert!(!killed_after(&fd, Duration::from_secs(secs)));
    }
    let state = open(&fd).unwrap();
    assert!(!state.flights().enter(resent(10)).is_refused());
}

#[test]
fn who_takes_more_than_a_second_to_kill_is_found_out() {
    let fd = memfd();
    dies_with(&fd, &[10]);
    let deaths = (0..10).position(|_| killed_after(&fd, Duration::from_millis(1500)));
    // Disturbed once, and then alone for as many deaths as any other.
    assert_eq!(deaths, Some(1 + DEFAULT_MAX_TRIES as usize));
}

#[test]
fn a_slow_one_that_hangs_later_is_found_out() {
    let fd = memfd();
    dies_with(&fd, &[10]);
    let short = Duration::from_millis(1200);
    assert!(!killed_after(&fd, short));
    for _ in 0..DEFAULT_MAX_TRIES {
        blame(fd.as_fd(), &[request(10)]).unwrap();
        assert!(!killed_after(&fd, short));
    }
    assert!(killed_after(&fd, short));
}

#[test]
fn what_may_wait_for_an_application_keeps_nobody_waiting_for_long() {
    let fd = memfd();
    let waits = |id| InFlight {
        opcode: 33,
        ..request(id)
    };
    let state = open(&fd).unwrap();
    forget(state.flights().enter(waits(10)));
    drop(state);
    for _ in 0..4 {
        let state = open(&fd).unwrap();
        let flight = state.flights().enter(waits(10 | FUSE_UNIQUE_RESEND));
        let wait = Duration::from_millis(1900);
        assert!(admitted_while(None, &state, request(20), wait));
        forget(flight);
    }
}

#[test]
fn the_one_that_was_disturbed_less_often_comes_first() {
    let fd = memfd();
    dies_with(&fd, &[10, 12]);
    assert!(!killed_after(&fd, Duration::from_secs(2)));
    let state = open(&fd).unwrap();
    std::thread::scope(|scope| {
        let (say, said) = channel();
        for (id, wait) in [(10, 0), (12, 200)] {
            let (state, say) = (&state, say.clone());
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(wait));
                let flight = state.flights().enter(resent(id));
                say.send(id).unwrap();
                drop(flight);
            });
        }
        let order: Vec<_> = said.iter().take(2).collect();
        assert_eq!(order, [12, 10]);
    });
}

#[test]
fn who_is_ended_on_purpose_died_of_nothing() {
    let fd = memfd();
    dies_with(&fd, &[10]);
    for _ in 0..2 * DEFAULT_MAX_TRIES {
        // Before it is tried, and while it is.
        for before in [true, false] {
            let state = open(&fd).unwrap();
            if before {
                state.flights().leave();
            }
            let flight = state.flights().enter(resent(10));
            assert!(!flight.is_refused());
            state.flights().leave();
            forget(flight);
        }
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
        let seen = pulse(fd.as_fd()).unwrap();
        assert_eq!((seen.in_hands.len(), seen.may_wait), (0, 1));
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
