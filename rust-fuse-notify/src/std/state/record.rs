// SPDX-License-Identifier: GPL-2.0
//! What the journal keeps of one operation, and how it lies in a slot.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::region::Region;

/// Longest name, in bytes.
pub(super) const MAX_NAME: usize = 255;
/// Longest state before, in bytes: three handles of 160.
pub(super) const MAX_BEFORE: usize = 480;
/// Longest payload of an outcome, in bytes.
pub(super) const MAX_PAYLOAD: usize = 128;

/// In a slot: an [`IntentHead`], the names and the state before.
const INTENT: usize = 8;
const NAMES: usize = INTENT + size_of::<IntentHead>();
const NAME_ROOM: usize = MAX_NAME + 1;
const BEFORE: usize = NAMES + 2 * NAME_ROOM;
/// In a slot: an [`OutcomeHead`] and the payload. Elsewhere than the intent, which stays valid until the outcome is.
const OUTCOME: usize = BEFORE + MAX_BEFORE;
const PAYLOAD: usize = OUTCOME + size_of::<OutcomeHead>();
/// Bytes of a slot.
pub(super) const SLOT_LEN: usize = 1280;

const _: () = assert!(PAYLOAD + MAX_PAYLOAD <= SLOT_LEN);

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct IntentHead {
    opcode: u32,
    name_len: [u16; 2],
    nodeids: [u64; 2],
    args: [u64; 4],
    before_len: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct OutcomeHead {
    errno: i32,
    payload_len: u32,
    nodeid: u64,
    fh: u64,
}

/// What is about to be done, with what is needed to decide afterwards whether it was.
#[derive(Clone, Copy, Debug, Default)]
pub struct Intent<'a> {
    /// Opcode of the request.
    pub opcode: u32,
    /// Nodeids that the request names (parent; second parent or source).
    pub nodeids: [u64; 2],
    /// Names in the request; up to [`super::Journal::MAX_NAME`] bytes each.
    pub names: [&'a [u8]; 2],
    /// Numbers in the request that matter (mode, flags, ...).
    pub args: [u64; 4],
    /// The state before: up to [`super::Journal::MAX_BEFORE`] bytes, for instance handles.
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
    /// Anything else; up to [`super::Journal::MAX_PAYLOAD`] bytes.
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

/// Whether the parts of an intent fit into a slot.
pub(super) fn fits(intent: &Intent<'_>) -> bool {
    intent.names.iter().all(|name| name.len() <= MAX_NAME) && intent.before.len() <= MAX_BEFORE
}

/// Stores an intent that [`fits`]; nothing points to it yet.
pub(super) fn write_intent(region: &Region, at: usize, intent: &Intent<'_>) {
    let head = IntentHead {
        opcode: intent.opcode,
        name_len: intent.names.map(|name| name.len() as u16),
        nodeids: intent.nodeids,
        args: intent.args,
        before_len: intent.before.len() as u64,
    };
    region.put(at + INTENT, &head);
    for (i, name) in intent.names.iter().enumerate() {
        region.write(at + NAMES + i * NAME_ROOM, name);
    }
    region.write(at + BEFORE, intent.before);
}

/// Reads an intent; `None` if a length is impossible.
pub(super) fn read_intent(region: &Region, at: usize, id: u64) -> Option<IntentRecord> {
    let head: IntentHead = region.get(at + INTENT);
    let name = |i: usize| {
        bytes(
            region,
            at + NAMES + i * NAME_ROOM,
            u64::from(head.name_len[i]),
            MAX_NAME,
        )
    };
    Some(IntentRecord {
        id,
        opcode: head.opcode,
        nodeids: head.nodeids,
        names: [name(0)?, name(1)?],
        args: head.args,
        before: bytes(region, at + BEFORE, head.before_len, MAX_BEFORE)?,
    })
}

/// Stores an outcome whose payload fits; nothing points to it yet.
pub(super) fn write_outcome(region: &Region, at: usize, outcome: &Outcome) {
    let nothing = Success::default();
    let (errno, success) = match outcome {
        Ok(success) => (0, success),
        Err(errno) => (*errno, &nothing),
    };
    let head = OutcomeHead {
        errno,
        payload_len: success.payload.len() as u32,
        nodeid: success.nodeid,
        fh: success.fh,
    };
    region.put(at + OUTCOME, &head);
    region.write(at + PAYLOAD, &success.payload);
}

/// Reads an outcome; `None` if a length is impossible.
pub(super) fn read_outcome(region: &Region, at: usize) -> Option<Outcome> {
    let head: OutcomeHead = region.get(at + OUTCOME);
    let payload = bytes(
        region,
        at + PAYLOAD,
        u64::from(head.payload_len),
        MAX_PAYLOAD,
    )?;
    Some(match head.errno {
        0 => Ok(Success {
            nodeid: head.nodeid,
            fh: head.fh,
            payload,
        }),
        errno => Err(errno),
    })
}

fn bytes(region: &Region, at: usize, len: u64, max: usize) -> Option<Vec<u8>> {
    let len = usize::try_from(len).ok().filter(|len| *len <= max)?;
    let mut bytes = vec![0; len];
    region.read(at, &mut bytes);
    Some(bytes)
}
