// SPDX-License-Identifier: GPL-2.0
//! What each racing process does, drawn from the seed.

use super::op::{How, Name, Op, DIRS, NAMES, REGISTERS};
use crate::raw::wait::Rng;

/// `count` operations for each of `processes`.
pub fn workload(seed: u64, processes: usize, count: usize) -> Vec<Vec<Op>> {
    let mut rng = Rng(seed);
    (0..processes)
        .map(|process| (0..count).map(|n| draw(&mut rng, process, n)).collect())
        .collect()
}

fn name(rng: &mut Rng) -> Name {
    Name(rng.below(NAMES) as u8)
}

fn draw(rng: &mut Rng, process: usize, n: usize) -> Op {
    // As different as a byte can be, and never 0, which is what a register begins with.
    let value = 1 + ((process * 61 + n) % 255) as u8;
    let (one, two) = (name(rng), name(rng));
    match rng.below(32) {
        0..=2 => Op::Create(one),
        3 => Op::Mknod(one),
        4..=6 => Op::Mkdir(one),
        7..=8 => Op::Symlink(one, (process * 10_000 + n) as u32),
        9..=10 => Op::Rmdir(one),
        11..=12 => Op::Unlink(one),
        13..=14 => Op::Link(one, two),
        15..=16 => Op::Rename(one, two, How::Plain),
        17 => Op::Rename(one, two, How::NoReplace),
        18..=19 => Op::Rename(one, two, How::Exchange),
        20 => Op::SetNew(one, value),
        21 => Op::SetOld(one, value),
        22 => Op::RemoveXattr(one),
        23 => Op::GetXattr(one),
        24..=25 => Op::Stat(one),
        26 => Op::Readlink(one),
        27 => Op::Append(one, value),
        28 => Op::Read(one),
        29 => Op::List(rng.below(DIRS.len()) as u8),
        30 => Op::Put(rng.below(REGISTERS.len()) as u8, value),
        _ => Op::Get(rng.below(REGISTERS.len()) as u8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::mem::discriminant;

    #[test]
    fn a_seed_draws_every_kind_and_always_the_same() {
        let drawn = workload(7, 4, 200);
        assert_eq!(drawn, workload(7, 4, 200));
        assert_ne!(drawn, workload(8, 4, 200));
        let kinds: HashSet<_> = drawn.iter().flatten().map(discriminant).collect();
        assert_eq!(kinds.len(), 19);
    }
}
