// SPDX-License-Identifier: GPL-2.0

//! Request ids across a restart.
//!
//! A request keeps the id under which it was sent first in its low 48 bits. Sent again it carries
//! the RESEND bit and the low byte of the epoch. The RESEND bit alone would be idempotent: after a
//! second crash a late reply of the second server would match the third server's request.

/// Set in the id of every resent and every replayed request.
pub const RESEND: u64 = 1 << 63;

/// Where the low byte of the epoch is found in such an id.
pub const EPOCH_SHIFT: u32 = 48;

/// The original id.
pub const ID_MASK: u64 = (1 << EPOCH_SHIFT) - 1;

/// Returns the id under which the request was sent first.
pub const fn original(unique: u64) -> u64 {
    unique & ID_MASK
}

/// Returns whether the request may have been seen by an earlier server.
pub const fn is_resent(unique: u64) -> bool {
    unique & RESEND != 0
}

/// Returns the id under which a request goes to the server of `epoch`.
pub const fn resent(unique: u64, epoch: u32) -> u64 {
    original(unique) | RESEND | ((epoch as u64 & 0xff) << EPOCH_SHIFT)
}
