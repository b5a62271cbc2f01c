// SPDX-License-Identifier: GPL-2.0
//! The line between the guest's init and the runner: frames on one byte
//! stream (a UML serial line, a virtio port), so that the command's two
//! outputs, its status and its result file never mix with the kernel's log.
//!
//! A frame is one byte of kind, four bytes of little-endian length, payload.

use serde::{Deserialize, Serialize};
use std::io::{self, Write};

/// Larger payloads are split; a length above this is a broken stream.
pub const MAX_PAYLOAD: usize = 64 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest is up and about to start the command.
    Ready = b'r' as isize,
    Stdout = b'o' as isize,
    Stderr = b'e' as isize,
    /// A piece of the file that the command left at `FUSE_RESTART_OUT`.
    Out = b'f' as isize,
    /// What a checker in the guest found that is not in the log (kmemleak).
    Report = b'k' as isize,
    /// The last frame: [`Status`] as JSON.
    Status = b's' as isize,
}

impl Kind {
    fn from_byte(b: u8) -> Option<Kind> {
        use Kind::*;
        [Ready, Stdout, Stderr, Out, Report, Status]
            .into_iter()
            .find(|k| *k as u8 == b)
    }
}

/// How the command ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Exit status as a shell gives it: 128 + signal for a killed command.
    pub code: i32,
    /// `/proc/sys/kernel/tainted` before the command and after it.
    pub tainted: [u64; 2],
    /// lockdep is in the kernel but has switched itself off: it checks nothing.
    pub lockdep_off: bool,
    /// Why the command could not even be started.
    pub error: Option<String>,
    /// Processes that survived SIGKILL, as `pid name wchan`.
    pub unkillable: Vec<String>,
}

/// Writes `payload` as one or more frames.
pub fn write(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let mut rest = payload;
    loop {
        let (now, later) = rest.split_at(rest.len().min(MAX_PAYLOAD));
        let mut head = [kind as u8, 0, 0, 0, 0];
        head[1..].copy_from_slice(&(now.len() as u32).to_le_bytes());
        to.write_all(&head)?;
        to.write_all(now)?;
        rest = later;
        if rest.is_empty() {
            return to.flush();
        }
    }
}

/// Collects bytes as they come and gives back whole frames.
#[derive(Default)]
pub struct Decoder {
    buf: Vec<u8>,
}

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    /// The next whole frame; `Err` says what is wrong with the stream.
    pub fn next(&mut self) -> Result<Option<(Kind, Vec<u8>)>, String> {
        if self.buf.len() < 5 {
            return Ok(None);
        }
        let kind = Kind::from_byte(self.buf[0])
            .ok_or_else(|| format!("unknown frame kind {:#04x} from the guest", self.buf[0]))?;
        let len = u32::from_le_bytes([self.buf[1], self.buf[2], self.buf[3], self.buf[4]]) as usize;
        if len > MAX_PAYLOAD {
            return Err(format!(
                "frame of {len} bytes from the guest, the limit is {MAX_PAYLOAD}"
            ));
        }
        if self.buf.len() < 5 + len {
            return Ok(None);
        }
        let payload = self.buf[5..5 + len].to_vec();
        self.buf.drain(..5 + len);
        Ok(Some((kind, payload)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_any_split() {
        let mut stream = Vec::new();
        write(&mut stream, Kind::Ready, b"").unwrap();
        write(&mut stream, Kind::Stdout, b"hello").unwrap();
        write(&mut stream, Kind::Stderr, &[0xff; 3]).unwrap();
        for cut in 1..stream.len() {
            let mut d = Decoder::default();
            let mut got = Vec::new();
            for part in stream.chunks(cut) {
                d.push(part);
                while let Some(f) = d.next().unwrap() {
                    got.push(f);
                }
            }
            assert_eq!(
                got,
                vec![
                    (Kind::Ready, vec![]),
                    (Kind::Stdout, b"hello".to_vec()),
                    (Kind::Stderr, vec![0xff; 3])
                ]
            );
        }
    }

    #[test]
    fn long_payloads_are_split_and_come_back_whole() {
        let payload: Vec<u8> = (0..MAX_PAYLOAD * 2 + 7).map(|i| i as u8).collect();
        let mut stream = Vec::new();
        write(&mut stream, Kind::Out, &payload).unwrap();
        let mut d = Decoder::default();
        d.push(&stream);
        let mut got = Vec::new();
        let mut frames = 0;
        while let Some((kind, p)) = d.next().unwrap() {
            assert_eq!(kind, Kind::Out);
            got.extend(p);
            frames += 1;
        }
        assert_eq!((frames, got), (3, payload));
    }

    #[test]
    fn garbage_is_an_error_not_a_hang() {
        let mut d = Decoder::default();
        d.push(b"login: ");
        assert!(d.next().unwrap_err().contains("0x6c"));
        let mut d = Decoder::default();
        d.push(&[b'o', 0xff, 0xff, 0xff, 0x7f]);
        assert!(d.next().is_err());
    }

    #[test]
    fn a_status_is_read_back() {
        let s = Status {
            code: 137,
            tainted: [0, 512],
            lockdep_off: false,
            error: None,
            unkillable: vec!["7 cat wait".into()],
        };
        let json = serde_json::to_vec(&s).unwrap();
        assert_eq!(serde_json::from_slice::<Status>(&json).unwrap(), s);
    }
}
