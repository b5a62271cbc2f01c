// SPDX-License-Identifier: GPL-2.0
//! The shortest workload that still shows a difference, found by leaving things out and running again.

use super::op::Workload;

/// Leaves out processes, then ever smaller runs of operations, for as long as `shows` says that it still shows.
/// At most `tries` questions are asked.
pub fn shortest(
    workload: &Workload,
    tries: usize,
    mut shows: impl FnMut(&Workload) -> bool,
) -> Workload {
    let mut best = workload.clone();
    let mut left = tries;
    let mut ask = |candidate: &Workload| {
        left = left.saturating_sub(1);
        left > 0 && shows(candidate)
    };
    let mut at = 0;
    while best.procs.len() > 1 && at < best.procs.len() {
        let mut candidate = best.clone();
        candidate.procs.remove(at);
        if ask(&candidate) {
            best = candidate;
        } else {
            at += 1;
        }
    }
    for proc in 0..best.procs.len() {
        let mut size = best.procs[proc].ops.len() / 2;
        while size > 0 {
            let mut from = best.procs[proc].ops.len();
            // From the end: what comes last rarely matters.
            while from > 0 {
                let start = from.saturating_sub(size);
                let mut candidate = best.clone();
                candidate.procs[proc].ops.drain(start..from);
                if ask(&candidate) {
                    best = candidate;
                }
                from = start;
            }
            size /= 2;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::super::op::{Op, Proc};
    use super::*;

    fn of(lens: &[usize]) -> Workload {
        let ops = |id: usize, n| {
            (0..n)
                .map(|at| Op::Fsync((id * 50 + at) as u8, false))
                .collect()
        };
        let procs = lens.iter().enumerate().map(|(id, n)| Proc {
            id,
            uid: 0,
            many: false,
            ops: ops(id, *n),
        });
        Workload {
            procs: procs.collect(),
        }
    }

    #[test]
    fn what_matters_is_left() {
        let needed = [Op::Fsync(53, false), Op::Fsync(61, false)];
        let shows = |w: &Workload| {
            let ops: Vec<_> = w.procs.iter().flat_map(|p| &p.ops).collect();
            needed.iter().all(|op| ops.contains(&op))
        };
        let best = shortest(&of(&[20, 20, 20]), 1000, shows);
        assert_eq!(best.procs.len(), 1);
        assert_eq!(best.procs[0].ops, needed);
    }

    #[test]
    fn it_does_not_ask_for_ever() {
        let mut asked = 0;
        let best = shortest(&of(&[40, 40]), 10, |_| {
            asked += 1;
            false
        });
        assert_eq!(best, of(&[40, 40]));
        assert!(asked <= 10);
    }
}
