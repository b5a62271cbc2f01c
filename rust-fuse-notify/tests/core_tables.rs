// SPDX-License-Identifier: GPL-2.0
//! The tables that KUnit runs in the kernel, run on the host.

use rust_fuse_notify::proto::tables;

#[test]
fn every_table_holds() {
    for (name, result) in [
        ("verdicts", tables::verdicts()),
        ("demands", tables::demands()),
        ("phases", tables::phases()),
        ("request_ids", tables::request_ids()),
        ("slots", tables::slots()),
    ] {
        assert_eq!(result, Ok(()), "{name}: the row that does not hold");
    }
}
