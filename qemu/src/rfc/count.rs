// SPDX-License-Identifier: GPL-2.0
//! Lines of C and of Rust in the series, and where its `unsafe` is. Counted in
//! the files of the series' last commit, so that anybody can count again.

use super::tree::{git, Tree};
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// What kind of file: lines added and removed.
    pub lines: BTreeMap<&'static str, (u64, u64)>,
    /// Path of each Rust file: lines of code, `unsafe` blocks, functions and
    /// implementations.
    pub rust: BTreeMap<String, Rust>,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rust {
    pub code: usize,
    pub blocks: usize,
    pub functions: usize,
    pub impls: usize,
}

const CORE: &str = "fs/fuse/restart/proto/";
/// The safe abstractions, and the entry points from C: the only files that may
/// have `unsafe`. The engine uses them, the core knows nothing of the kernel.
const RING: &[&str] = &["conn.rs", "flight.rs", "inode.rs", "restart.rs"];

pub fn count(tree: &Tree) -> Result<Counts> {
    let last = tree.commits.len();
    let range = format!("{}..{}", tree.base, tree.id(last)?);
    let mut counts = Counts {
        lines: numstat(&git(&tree.dir, &["diff", "--numstat", &range])?),
        ..Counts::default()
    };
    for file in tree.code() {
        if !file.ends_with(".rs") {
            continue;
        }
        if let Some(text) = tree.show(last, file)? {
            let text = String::from_utf8_lossy(&text);
            counts.rust.insert(file.to_string(), of_rust(&text));
        }
    }
    Ok(counts)
}

fn kind(file: &str) -> &'static str {
    match file {
        f if f.starts_with("tools/testing/") => "selftests",
        f if f.starts_with("Documentation/") => "documentation",
        f if f.starts_with(CORE) => "Rust, pure core",
        f if f.ends_with(".rs") => "Rust, engine and abstractions",
        f if f.ends_with(".c") || f.ends_with(".h") => "C",
        _ => "other",
    }
}

fn numstat(text: &str) -> BTreeMap<&'static str, (u64, u64)> {
    let mut sum: BTreeMap<&'static str, (u64, u64)> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split('\t');
        let (Some(add), Some(del), Some(file)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let entry = sum.entry(kind(file)).or_default();
        entry.0 += add.parse().unwrap_or(0);
        entry.1 += del.parse().unwrap_or(0);
    }
    sum
}

/// Comments are not code, and what they say is not `unsafe`.
fn of_rust(text: &str) -> Rust {
    let mut n = Rust::default();
    for line in text.lines() {
        let code = line.split("//").next().unwrap_or_default().trim();
        if code.is_empty() {
            continue;
        }
        n.code += 1;
        for (i, _) in code.match_indices("unsafe") {
            // Longer words that contain it are followed by none of these.
            match code[i + "unsafe".len()..].trim_start() {
                r if r.starts_with("impl") => n.impls += 1,
                r if r.starts_with("fn") || r.starts_with("extern") => n.functions += 1,
                r if r.starts_with('{') => n.blocks += 1,
                _ => {}
            }
        }
    }
    n
}

impl Counts {
    /// Files with `unsafe` of any kind that must not have any.
    pub fn misplaced(&self) -> Vec<&str> {
        let ring = |f: &str| {
            f.strip_prefix("fs/fuse/restart/")
                .is_some_and(|name| RING.contains(&name))
        };
        let has = |n: &Rust| n.blocks + n.functions + n.impls > 0;
        let bad = self.rust.iter().filter(|(f, n)| !ring(f) && has(n));
        bad.map(|(f, _)| f.as_str()).collect()
    }

    pub fn table(&self) -> String {
        let mut out = String::from("lines of the series                 added  removed\n");
        for (kind, (add, del)) in &self.lines {
            out += &format!("  {kind:<32} {add:>6}  {del:>7}\n");
        }
        out += "Rust                                  code  unsafe {}  unsafe fn  unsafe impl\n";
        let mut sum = Rust::default();
        for (file, n) in &self.rust {
            let name = file.strip_prefix("fs/fuse/").unwrap_or(file);
            out += &line(name, n);
            sum.code += n.code;
            sum.blocks += n.blocks;
            sum.functions += n.functions;
            sum.impls += n.impls;
        }
        out + &line("together", &sum)
    }
}

fn line(name: &str, n: &Rust) -> String {
    format!(
        "  {name:<34} {:>6}  {:>9}  {:>9}  {:>11}\n",
        n.code, n.blocks, n.functions, n.impls
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_counted() {
        let text = "// unsafe { in a comment }\n\nunsafe impl Send for X {}\n    let x = unsafe { f() }; // unsafe {\n\
            unsafe extern \"C\" fn g() {}\n#![deny(unsafe_op_in_unsafe_fn)]\nunsafe fn h() {\n";
        assert_eq!(
            of_rust(text),
            Rust {
                code: 5,
                blocks: 1,
                functions: 2,
                impls: 1
            }
        );
    }

    #[test]
    fn kinds_add_up() {
        let n = numstat("10\t2\tfs/fuse/dev.c\n5\t0\tinclude/uapi/linux/fuse.h\n7\t0\tfs/fuse/restart/proto/wire.rs\n\
            8\t0\tfs/fuse/restart/engine.rs\n9\t0\ttools/testing/selftests/x.c\n1\t0\tDocumentation/x.rst\n2\t0\tfs/fuse/Kconfig\n");
        assert_eq!(n["C"], (15, 2));
        assert_eq!(n["Rust, pure core"], (7, 0));
        assert_eq!(n.len(), 6);
    }

    #[test]
    fn unsafe_outside_of_its_ring_is_seen() {
        let mut c = Counts::default();
        c.rust
            .insert(format!("{CORE}ids.rs"), of_rust("let x = 1;\n"));
        c.rust
            .insert("fs/fuse/restart/conn.rs".into(), of_rust("unsafe { x }\n"));
        assert!(c.misplaced().is_empty());
        for file in ["fs/fuse/restart/engine.rs", "fs/fuse/restart/proto/conn.rs"] {
            c.rust.insert(file.into(), of_rust("unsafe { x }\n"));
            assert_eq!(c.misplaced(), [file]);
            c.rust.remove(file);
        }
    }
}
