// SPDX-License-Identifier: GPL-2.0
//! How much memory the kernel holds for itself, as exactly as it tells.
//!
//! `/proc/meminfo` is a sum of per-processor counters that are folded in now and then; up to 125 pages a processor may
//! be missing. So they are folded in by hand before every look (`vm.stat_refresh`).

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

/// What cannot be given back on demand; bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Kernel {
    /// SUnreclaim + KernelStack + PageTables + Percpu + VmallocUsed.
    pub total: u64,
    pub slab_unreclaimable: u64,
    /// The slabs of `struct fuse_req`; `None` where /proc/slabinfo does not list them.
    pub fuse_requests: Option<u64>,
}

impl Kernel {
    pub fn now() -> Result<Kernel> {
        // Missing without CONFIG_SMP, and then not needed.
        let _ = fs::write("/proc/sys/vm/stat_refresh", "1");
        let meminfo = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
        let slabinfo = fs::read_to_string("/proc/slabinfo").unwrap_or_default();
        Ok(parse(&meminfo, &slabinfo))
    }
}

fn parse(meminfo: &str, slabinfo: &str) -> Kernel {
    let get = |key: &str| {
        let line = meminfo
            .lines()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    };
    let total = [
        "SUnreclaim",
        "KernelStack",
        "PageTables",
        "Percpu",
        "VmallocUsed",
    ]
    .iter()
    .map(|k| get(k))
    .sum();
    Kernel {
        total,
        slab_unreclaimable: get("SUnreclaim"),
        fuse_requests: slab(slabinfo, "fuse_request"),
    }
}

/// Objects times their size: `name active total size ...`.
fn slab(slabinfo: &str, name: &str) -> Option<u64> {
    let line = slabinfo
        .lines()
        .find(|l| l.split_whitespace().next() == Some(name))?;
    let mut words = line.split_whitespace().skip(2);
    let total: u64 = words.next()?.parse().ok()?;
    let size: u64 = words.next()?.parse().ok()?;
    Some(total * size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_proc_are_understood() {
        let meminfo = "MemTotal:  100 kB\nSlab: 9 kB\nSUnreclaim:      10 kB\nKernelStack: 2 kB\nPageTables: 3 kB\n";
        let slabinfo = "slabinfo - version: 2.1\n# name <active_objs> <num_objs> <objsize>\nfuse_request 4 26 152 26 1 : tunables\n";
        let kernel = parse(meminfo, slabinfo);
        assert_eq!(
            kernel,
            Kernel {
                total: 15 << 10,
                slab_unreclaimable: 10 << 10,
                fuse_requests: Some(26 * 152)
            }
        );
        assert_eq!(parse("", "").fuse_requests, None);
    }
}
