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
}

impl Flavor {
    pub fn name(self) -> &'static str {
        match self {
            Flavor::Uml => "uml",
            Flavor::UmlStock => "uml-stock",
            Flavor::Patched => "patched",
            Flavor::Stock => "stock",
            Flavor::Debug => "debug",
        }
    }

    /// Value of `ARCH=`.
    pub fn arch(self) -> &'static str {
        match self {
            Flavor::Uml | Flavor::UmlStock => "um",
            _ => "x86_64",
        }
    }

    /// Names of `qemu/config/*.config`, later ones winning.
    pub fn fragments(self) -> &'static [&'static str] {
        match self {
            Flavor::Uml | Flavor::UmlStock => &["common", "um", "checks"],
            Flavor::Patched | Flavor::Stock => &["common", "x86"],
            Flavor::Debug => &["common", "x86", "checks", "debug"],
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
            Flavor::Debug => None,
        }
    }

    /// Which source tree: see [`super::source::get`].
    pub fn track(self) -> &'static str {
        match self {
            Flavor::Debug => "-debug",
            _ => "",
        }
    }

    /// Minutes from nothing on two cores, for the message before.
    pub fn minutes(self) -> u32 {
        match self {
            Flavor::Uml | Flavor::UmlStock => 7,
            Flavor::Patched | Flavor::Stock => 9,
            Flavor::Debug => 14,
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
