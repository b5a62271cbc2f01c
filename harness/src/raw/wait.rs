// SPDX-License-Identifier: GPL-2.0
//! Waiting for a condition, never for luck.

use std::time::{Duration, Instant};

use anyhow::{bail, Result};

/// Looks at `condition` until it holds; an error that says for what if it does not within `limit`.
///
/// For conditions that nothing can wake us up for (files of procfs and fusectl); descriptors are polled instead.
pub fn wait_for(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(50);
    loop {
        if condition()? {
            return Ok(());
        }
        if start.elapsed() >= limit {
            bail!("waited {:.1} s in vain for {what}", limit.as_secs_f64());
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(5));
    }
}

/// A small reproducible generator (splitmix64): a seed printed is a run that can be repeated.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_never_holds_ends_in_an_error() {
        let e = wait_for("godot", Duration::from_millis(5), || Ok(false)).unwrap_err();
        assert!(e.to_string().contains("godot"));
        let mut n = 0;
        wait_for("three", Duration::from_secs(5), || {
            n += 1;
            Ok(n == 3)
        })
        .unwrap();
    }

    #[test]
    fn the_same_seed_shuffles_the_same_way() {
        let (mut a, mut b): (Vec<u32>, Vec<u32>) = ((0..100).collect(), (0..100).collect());
        Rng(7).shuffle(&mut a);
        Rng(7).shuffle(&mut b);
        assert_eq!(a, b);
        b.sort_unstable();
        assert_ne!(a, b);
        assert_eq!(b, (0..100).collect::<Vec<_>>());
    }
}
