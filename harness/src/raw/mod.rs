// SPDX-License-Identifier: GPL-2.0
//! A FUSE server by hand: scripted, message by message, on a bare `/dev/fuse`.
//!
//! The scenarios and benchmarks need a server that does what no library would: answer late, twice, wrongly or
//! never, and die between any two bytes. Start with [`kit::Kit`], which holds one mount, its scripted server
//! and its applications; [`recover`] plays the part of a new instance.
//!
//! * [`wire`] the protocol, [`msg`] one message, [`dev`] the device
//! * [`tree`] and [`answer`]: an honest toy file system to answer from
//! * [`app`] and [`ops`]: the applications
//! * [`ctl`]: what the kernel says about the connection

pub mod aio;
pub mod answer;
pub mod app;
pub mod ctl;
pub mod dev;
pub mod env;
pub mod kit;
pub mod msg;
pub mod ops;
pub mod rare;
pub mod recover;
pub mod sleeper;
pub mod trap;
pub mod tree;
pub mod uffd;
pub mod wait;
pub mod wire;
