// SPDX-License-Identifier: GPL-2.0
//! `fuse-restart keep` as its users meet it: the real binary, the real device, real signals.

mod bad_input;
#[macro_use]
mod keeper;
mod life;
mod nested;
mod store;
