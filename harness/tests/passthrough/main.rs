// SPDX-License-Identifier: GPL-2.0
//! `fuse-restart serve passthrough` under `fuse-restart keep`, on the running kernel.
//!
//! [`ops`]: every operation does through the mount what it does on the backing. [`identity`]: who
//! owns what is made, what is refused. [`crash`]: the server is killed, nobody notices.
//! [`survives`]: what else lives on. `points`: it is killed at chosen moments (cargo feature
//! `crash-points`); `poison`: requests that kill it each time, or are never answered;
//! `late_create`: an answer that is taken after the next recovery. [`refusals`]: what it says when it
//! cannot serve. [`discarded`]: it goes on without a state. [`mem`]: `fuse-restart serve mem`, the same way. [`older`]: a
//! kernel without the series. [`upgrade`]: what is known before a server is replaced. [`examples`]: those of the crate.
//! [`full`]: no room for another file.

mod calls;
mod crash;
mod discarded;
mod examples;
mod full;
mod identity;
#[cfg(feature = "crash-points")]
mod late_create;
mod mem;
mod older;
mod ops;
mod ops_attributes;
mod ops_data;
mod ops_names;
#[cfg(feature = "crash-points")]
mod points;
#[cfg(feature = "crash-points")]
mod poison;
mod refusals;
mod served;
mod snapshot;
mod survives;
mod upgrade;
