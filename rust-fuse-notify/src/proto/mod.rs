// SPDX-License-Identifier: GPL-2.0

//! The pure core of the recovery of a FUSE connection.
//!
//! Nothing in here allocates, locks, sleeps or knows the kernel: the same files are compiled into
//! `fs/fuse` and, on the host, into the crate `rust_fuse_notify`, where unit, property and model
//! tests run them.
//!
//! One idea a file:
//!
//! - [`wire`]: what goes over `/dev/fuse`, and which notification is refused with which error.
//! - [`ids`]: original, resent and replayed request ids.
//! - [`verdict`]: what the answer to one replay means for the inode.
//! - [`phase`]: the states of one recovery and what moves it from one to the next.
//! - [`window`]: how many replays are in flight.
//! - [`tally`]: the numbers of one recovery and of all, which must add up.

pub mod ids;
pub mod phase;
pub mod tables;
pub mod tally;
pub mod verdict;
pub mod window;
pub mod wire;
