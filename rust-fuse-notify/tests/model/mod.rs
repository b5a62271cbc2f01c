// SPDX-License-Identifier: GPL-2.0

//! The model: the kernel's side of a recovery, servers, applications, and everything that may
//! happen to them at any moment. `Documentation/model.md` tells what it shows.
//!
//! - [`state`]: what a state consists of.
//! - [`queue`], [`engine`], [`apps`]: the kernel. The decisions are those of the crate's core.
//! - [`server`]: servers that keep the contract.
//! - [`check`]: what can happen next, and what must hold.
//! - [`sizes`], [`seeds`]: what is explored, and how it can be broken.
//! - [`fair`]: whether what happens by itself comes to an end.
//! - [`story`]: a run, told step by step.

// The tests and the example use different parts of it.
#![allow(dead_code)]

pub mod apps;
pub mod check;
pub mod engine;
pub mod fair;
pub mod queue;
pub mod reached;
pub mod seeds;
pub mod server;
pub mod sizes;
pub mod state;
pub mod story;
