// SPDX-License-Identifier: GPL-2.0
//! Why an operation could not be entered in the journal.

/// Why an operation could not be entered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// More operations in flight, and outcomes that may be owed, than slots. With four times as many slots as the
    /// server has threads it is never seen.
    #[error(
        "all {capacity} slots of the journal hold operations in flight, or outcomes that are owed"
    )]
    Full {
        /// Slots of the journal.
        capacity: u32,
    },
    /// A resent request must be looked up first.
    #[error("request {id} is in the journal already: look it up before beginning it")]
    Known {
        /// Its original id.
        id: u64,
    },
    /// Id 0 is no request.
    #[error("0 is not the id of a request")]
    NoId,
    /// A name, the state before or the payload has no room.
    #[error("{what} is longer than the {max} bytes that the journal keeps")]
    TooLong {
        /// Which part.
        what: &'static str,
        /// Room for it, in bytes.
        max: usize,
    },
    /// [`super::Slot::outcome`] of a slot that was given away; cannot happen while the guard lives.
    #[error("request {id} is not in the journal any more")]
    Lost {
        /// Its original id.
        id: u64,
    },
}
