// SPDX-License-Identifier: GPL-2.0
//! `scripts/test` and `scripts/demo`: everything in its order.

pub mod demo;
pub mod smoke;
pub mod test;
