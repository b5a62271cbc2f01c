// SPDX-License-Identifier: GPL-2.0
//! What the author of a FUSE server uses.
#![deny(missing_docs)]

pub mod adopt;
mod device;
pub mod listen;
pub mod message;
pub mod notify;
pub mod state;
pub mod wire;
