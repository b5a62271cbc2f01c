// SPDX-License-Identifier: GPL-2.0
//! Restartable FUSE servers.
#![cfg_attr(not(feature = "std"), no_std)]

pub mod proto;
#[cfg(feature = "std")]
pub mod std;
