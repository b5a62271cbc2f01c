// SPDX-License-Identifier: GPL-2.0
//! The kernels of this project.

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Flavor {
    /// User-mode Linux with the series and the light checkers.
    Uml,
    /// The same without the series.
    UmlStock,
    /// x86-64 with the series.
    Patched,
    /// x86-64 without the series.
    Stock,
    /// x86-64 with the series, KASAN, lockdep, kmemleak.
    Debug,
    /// `Uml`, and tasks can be stopped at named points, and every hunk of the
    /// series taken out at run time: see `scripts/mutants --help`.
    Mutants,
    /// The same of `Debug`.
    DebugMutants,
    /// `Patched` with fuse as a module (UML cannot load modules with Rust in them).
    Module,
    /// The same of `Debug`.
    DebugModule,
}

impl Flavor {
    pub fn name(self) -> &'static str {
        match self {
            Flavor::Uml => "uml",
            Flavor::UmlStock => "uml-stock",
            Flavor::Patched => "patched",
            Flavor::Stock => "stock",
            Flavor::Debug => "debug",
            Flavor::Mutants => "mutants",
            Flavor::DebugMutants => "debug-mutants",
            Flavor::Module => "module",
            Flavor::DebugModule => "debug-module",
        }
    }

    /// Value of `ARCH=`.
    pub fn arch(self) -> &'static str {
        match self {
            Flavor::Uml | Flavor::UmlStock | Flavor::Mutants => "um",
            _ => "x86_64",
        }
    }

    /// Names of `qemu/config/*.config`, later ones winning.
    pub fn fragments(self) -> &'static [&'static str] {
        match self {
            Flavor::Uml | Flavor::UmlStock => &["common", "um", "checks"],
            Flavor::Patched | Flavor::Stock | Flavor::Module => &["common", "x86"],
            Flavor::Debug | Flavor::DebugModule => &["common", "x86", "checks", "debug"],
            Flavor::Mutants => &["common", "um", "checks", "mutants"],
            Flavor::DebugMutants => &["common", "x86", "checks", "debug", "mutants"],
        }
    }

    /// Whether `qemu/patches/7.3-tests` is applied: not in kernels that are
    /// measured, nor in those that say whether the series as it is works.
    pub fn mutants(self) -> bool {
        matches!(self, Flavor::Mutants | Flavor::DebugMutants)
    }

    /// Names of `qemu/config/*.config` that win over all others.
    pub fn last_fragment(self) -> Option<&'static str> {
        matches!(self, Flavor::Module | Flavor::DebugModule).then_some("module")
    }

    /// Modules that are made and kept beside the kernel.
    pub fn modules(self) -> &'static [&'static str] {
        match self {
            Flavor::Module | Flavor::DebugModule => &["fs/fuse/fuse.ko"],
            _ => &[],
        }
    }

    pub fn series(self) -> bool {
        !matches!(self, Flavor::Stock | Flavor::UmlStock)
    }

    /// Make's target, and the file it makes.
    pub fn target(self) -> (&'static str, &'static str) {
        match self.arch() {
            "um" => ("linux", "linux"),
            _ => ("bzImage", "arch/x86/boot/bzImage"),
        }
    }

    /// Whose objects can be taken over: same configuration but for the series.
    pub fn sibling(self) -> Option<Flavor> {
        match self {
            Flavor::Uml => Some(Flavor::UmlStock),
            Flavor::UmlStock => Some(Flavor::Uml),
            Flavor::Patched => Some(Flavor::Stock),
            Flavor::Stock => Some(Flavor::Patched),
            Flavor::Debug
            | Flavor::Mutants
            | Flavor::DebugMutants
            | Flavor::Module
            | Flavor::DebugModule => None,
        }
    }

    /// Whose objects are a good start: most of them stay as they are.
    pub fn donor(self) -> Option<Flavor> {
        match self {
            Flavor::Mutants => Some(Flavor::Uml),
            Flavor::DebugMutants | Flavor::DebugModule => Some(Flavor::Debug),
            Flavor::Module => Some(Flavor::Patched),
            other => other.sibling(),
        }
    }

    /// Which source tree: see [`super::source::get`].
    pub fn track(self) -> &'static str {
        match self {
            Flavor::Debug | Flavor::DebugMutants | Flavor::DebugModule => "-debug",
            _ => "",
        }
    }

    /// Minutes from nothing on two cores, for the message before.
    pub fn minutes(self) -> u32 {
        match self {
            Flavor::Uml | Flavor::UmlStock | Flavor::Mutants => 7,
            Flavor::Patched | Flavor::Stock | Flavor::Module => 9,
            Flavor::Debug | Flavor::DebugMutants | Flavor::DebugModule => 14,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_differ_in_the_series_only() {
        for f in <Flavor as clap::ValueEnum>::value_variants()
            .iter()
            .copied()
        {
            if let Some(s) = f.sibling() {
                assert_eq!((f.arch(), f.fragments()), (s.arch(), s.fragments()));
                assert_ne!(f.series(), s.series());
                assert_eq!(s.sibling(), Some(f));
            }
        }
    }
}
