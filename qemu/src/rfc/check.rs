// SPDX-License-Identifier: GPL-2.0
//! Which checks there are, and which of them are due for which commit.

use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Check {
    Message,
    Checkpatch,
    Rustfmt,
    KernelDoc,
    Docs,
    Builtin,
    Module,
    Off,
    NoRust,
    Bare,
    Warnings,
    Clippy,
    Rustdoc,
    Sparse,
    Boot,
}

/// In the order in which they are run: what is cheap first, what shares an
/// object directory side by side.
pub const ALL: &[Check] = &[
    Check::Message,
    Check::Checkpatch,
    Check::Rustfmt,
    Check::KernelDoc,
    Check::Docs,
    Check::Builtin,
    Check::Module,
    Check::Off,
    Check::NoRust,
    Check::Bare,
    Check::Warnings,
    Check::Clippy,
    Check::Rustdoc,
    Check::Sparse,
    Check::Boot,
];

impl Check {
    /// At most eight letters: a column of the table.
    pub fn name(self) -> &'static str {
        match self {
            Check::Message => "message",
            Check::Checkpatch => "checkpat",
            Check::Rustfmt => "rustfmt",
            Check::KernelDoc => "kdoc",
            Check::Docs => "docs",
            Check::Builtin => "builtin",
            Check::Module => "module",
            Check::Off => "off",
            Check::NoRust => "no-rust",
            Check::Bare => "bare",
            Check::Warnings => "W=1",
            Check::Clippy => "clippy",
            Check::Rustdoc => "rustdoc",
            Check::Sparse => "sparse",
            Check::Boot => "boot",
        }
    }

    pub fn about(self) -> &'static str {
        match self {
            Check::Message => "the message has Assisted-by and no Signed-off-by (a person adds it), the subject is short",
            Check::Checkpatch => "scripts/checkpatch.pl --strict",
            Check::Rustfmt => "rustfmt --check with the tree's .rustfmt.toml, of the Rust files it touches",
            Check::KernelDoc => "scripts/kernel-doc -none -Wall of the files it touches: no new warning",
            Check::Docs => "make htmldocs of the directories whose documents it touches: no new warning",
            Check::Builtin => "fs/fuse/ built in, CONFIG_FUSE_RESTART=y; every symbol it wants exists",
            Check::Module => "fuse.ko, cuse.ko, virtiofs.ko with CONFIG_FUSE_RESTART=y, modpost included",
            Check::Off => "the modules with CONFIG_FUSE_RESTART=n",
            Check::NoRust => "built in, CONFIG_RUST=n",
            Check::Bare => "built in, CONFIG_FUSE_RESTART=y, everything else of fuse and SYSCTL off",
            Check::Warnings => "make W=1 fs/fuse/: no new warning",
            Check::Clippy => "make CLIPPY=1 fs/fuse/: no new warning",
            Check::Rustdoc => "rustdoc of fs/fuse/restart, private items too, and at the last patch `make rustdoc`: no new warning",
            Check::Sparse => "make C=2 fs/fuse/: no new warning",
            Check::Boot => "UML boots, a mount works, its server is killed and replaced (--boot)",
        }
    }

    /// About a patch as text, not about the tree that it makes.
    pub fn of_text(self) -> bool {
        matches!(self, Check::Message | Check::Checkpatch)
    }

    /// Only for the files that the patch touches.
    pub fn of_files(self) -> bool {
        matches!(self, Check::Rustfmt | Check::KernelDoc | Check::Docs)
    }

    /// On two cores, before anything was measured.
    pub fn guess(self) -> Duration {
        Duration::from_secs(match self {
            Check::Message => 0,
            Check::Checkpatch | Check::Rustfmt | Check::KernelDoc | Check::Docs => 1,
            Check::Builtin | Check::Module | Check::Off | Check::NoRust | Check::Bare => 25,
            Check::Warnings => 35,
            Check::Clippy => 1,
            Check::Rustdoc => 4,
            Check::Sparse => 25,
            Check::Boot => 60,
        })
    }
}

/// What the user asked for.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    pub quick: bool,
    pub boot: bool,
    /// Numbers of patches; empty: all.
    pub patches: Vec<usize>,
    pub only: Vec<Check>,
}

/// Patch and check, in the order of work. With `quick` the trees of all but the
/// last patch are left out; reading a patch costs nothing.
pub fn plan(wish: &Wish, series: usize) -> Vec<(usize, Check)> {
    let mut plan = Vec::new();
    for patch in 1..=series {
        if !wish.patches.is_empty() && !wish.patches.contains(&patch) {
            continue;
        }
        for &check in ALL {
            let asked = if wish.only.is_empty() {
                check != Check::Boot || wish.boot
            } else {
                wish.only.contains(&check) || (check == Check::Boot && wish.boot)
            };
            let due = !wish.quick || patch == series || check.of_text();
            if asked && due {
                plan.push((patch, check));
            }
        }
    }
    plan
}

/// What is left, from what each check took so far.
pub fn estimate(left: &[(usize, Check)], taken: &[(Check, Duration)]) -> Duration {
    left.iter()
        .map(|(_, check)| {
            let of_it: Vec<Duration> = taken
                .iter()
                .filter(|(c, _)| c == check)
                .map(|(_, d)| *d)
                .collect();
            match of_it.len() {
                0 => check.guess(),
                n => of_it.iter().sum::<Duration>() / n as u32,
            }
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_everything() {
        let plan = plan(&Wish::default(), 3);
        assert_eq!(plan.len(), 3 * (ALL.len() - 1));
        assert!(plan.iter().all(|(_, c)| *c != Check::Boot));
        assert_eq!(plan[0], (1, Check::Message));
        let boot = Wish {
            boot: true,
            ..Wish::default()
        };
        assert_eq!(super::plan(&boot, 3).len(), 3 * ALL.len());
    }

    #[test]
    fn quick_reads_all_and_builds_the_last() {
        let wish = Wish {
            quick: true,
            ..Wish::default()
        };
        let plan = plan(&wish, 14);
        assert!(plan.contains(&(1, Check::Checkpatch)));
        assert!(!plan.contains(&(13, Check::Builtin)));
        assert!(plan.contains(&(14, Check::Builtin)) && plan.contains(&(14, Check::Rustfmt)));
    }

    #[test]
    fn one_patch_one_check() {
        let wish = Wish {
            patches: vec![2],
            only: vec![Check::Sparse],
            ..Wish::default()
        };
        assert_eq!(plan(&wish, 3), [(2, Check::Sparse)]);
        let none = Wish {
            patches: vec![9],
            ..Wish::default()
        };
        assert_eq!(plan(&none, 3), []);
    }

    #[test]
    fn estimates_learn() {
        let left = [(1, Check::Builtin), (2, Check::Builtin), (2, Check::Sparse)];
        let s = Duration::from_secs;
        assert_eq!(estimate(&left, &[]), s(75));
        let taken = [
            (Check::Builtin, s(4)),
            (Check::Builtin, s(6)),
            (Check::Off, s(100)),
        ];
        assert_eq!(estimate(&left, &taken), s(35));
    }

    #[test]
    fn columns_are_narrow_and_all_checks_are_listed() {
        use clap::ValueEnum;
        assert_eq!(ALL, Check::value_variants());
        assert!(ALL
            .iter()
            .all(|c| c.name().len() <= 8 && !c.about().is_empty()));
    }
}
