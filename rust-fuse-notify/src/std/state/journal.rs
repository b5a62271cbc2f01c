// SPDX-License-Identifier: GPL-2.0
//! The journal: what makes an operation take effect exactly once.

/// Why an operation could not be entered.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Not implemented.
    #[error("not yet")]
    NotYet,
}

/// What is about to be done, with what is needed to decide afterwards whether it was.
#[derive(Clone, Copy, Debug, Default)]
pub struct Intent<'a> {
    /// Opcode of the request.
    pub opcode: u32,
    /// Nodeids that the request names (parent; second parent or source).
    pub nodeids: [u64; 2],
    /// Names in the request; up to [`Journal::MAX_NAME`] bytes each.
    pub names: [&'a [u8]; 2],
    /// Numbers in the request that matter (mode, flags, ...).
    pub args: [u64; 4],
    /// The state before: up to [`Journal::MAX_BEFORE`] bytes, for instance handles.
    pub before: &'a [u8],
}

/// An [`Intent`] read back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IntentRecord {
    /// Original id of the request.
    pub id: u64,
    /// Opcode of the request.
    pub opcode: u32,
    /// Nodeids that the request names.
    pub nodeids: [u64; 2],
    /// Names in the request.
    pub names: [Vec<u8>; 2],
    /// Numbers in the request.
    pub args: [u64; 4],
    /// The state before.
    pub before: Vec<u8>,
}

/// What a successful operation answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Success {
    /// Node that the answer names; 0: none. Answered again, it gets one more lookup.
    pub nodeid: u64,
    /// Handle that the answer gives; 0: none.
    pub fh: u64,
    /// Anything else; up to [`Journal::MAX_PAYLOAD`] bytes.
    pub payload: Vec<u8>,
}

/// How an operation ended: what is answered, or a positive errno.
pub type Outcome = Result<Success, i32>;

/// What the journal knows of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recorded {
    /// It may or may not have been executed. After start-up there are none of these from earlier instances.
    Intent(IntentRecord),
    /// It was executed; this is its answer.
    Outcome(Outcome),
}

/// The operations that must not be executed twice.
#[derive(Debug)]
pub struct Journal(());

impl Journal {
    /// Longest name, in bytes.
    pub const MAX_NAME: usize = 255;
    /// Longest state before, in bytes.
    pub const MAX_BEFORE: usize = 480;
    /// Longest payload of an outcome, in bytes.
    pub const MAX_PAYLOAD: usize = 128;

    /// Enters an operation, before anything of it is executed. `unique` is that of the request (resent or not).
    ///
    /// # Errors
    /// When the journal is full of operations in flight, or has an entry for this request already.
    pub fn begin(&self, _unique: u64, _intent: &Intent<'_>) -> Result<Slot<'_>, JournalError> {
        Err(JournalError::NotYet)
    }

    /// What is known of a request; ask only for resent ones, and answer an outcome without executing anything.
    pub fn lookup(&self, _unique: u64) -> Option<Recorded> {
        None
    }

    /// The slot of a request that is known, to [`Slot::done`] it once its outcome is answered again.
    pub fn resume(&self, _unique: u64) -> Option<Slot<'_>> {
        None
    }

    /// Every intent without an outcome, by id: at start-up each is to be resolved with [`Journal::resume`] and
    /// [`Slot::outcome`] (found done, or finished) or [`Slot::cancel`] (not done, or undone).
    pub fn unresolved(&self) -> Vec<IntentRecord> {
        Vec::new()
    }

    /// Drops every outcome whose id is smaller; `None` drops all of them. Gives back how many.
    pub fn drop_below(&self, _lowest_owed: Option<u64>) -> u64 {
        0
    }
}

/// The entry of one operation. Dropping the guard changes nothing: what is in the memfd stays.
#[derive(Debug)]
pub struct Slot<'a> {
    _journal: &'a Journal,
}

impl Slot<'_> {
    /// Enters how it ended, before it is answered.
    ///
    /// # Errors
    /// When the payload is too long.
    pub fn outcome(&mut self, _outcome: &Outcome) -> Result<(), JournalError> {
        Err(JournalError::NotYet)
    }

    /// It was answered: forgets it.
    pub fn done(self) {}

    /// It was not executed, or undone: forgets it, a resend executes it.
    pub fn cancel(self) {}
}
