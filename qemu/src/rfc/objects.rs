// SPDX-License-Identifier: GPL-2.0
//! Object directories, one a configuration. The first one is prepared (host
//! tools, headers, Rust's core library, minutes), the others begin as its copies.

use super::tree::Tree;
use crate::kernel::source::Source;
use crate::kernel::{build, config, tools::Tools};
use crate::paths::Paths;
use crate::ui;
use anyhow::{bail, Context, Result};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A configuration that the series has to compile in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    pub name: &'static str,
    /// What differs from qemu/config/rfc.config.
    config: &'static str,
}

const EVERYTHING: &str =
    "CONFIG_RUST=y\nCONFIG_FUSE_FS=y\nCONFIG_CUSE=y\nCONFIG_VIRTIO_FS=y\nCONFIG_FUSE_DAX=y\n\
    CONFIG_FUSE_PASSTHROUGH=y\nCONFIG_FUSE_IO_URING=y\nCONFIG_FUSE_RESTART=y\n";

pub const BUILTIN: Variant = Variant {
    name: "builtin",
    config: EVERYTHING,
};
pub const MODULE: Variant = Variant {
    name: "module",
    config:
        "CONFIG_RUST=y\nCONFIG_FUSE_FS=m\nCONFIG_CUSE=m\nCONFIG_VIRTIO_FS=m\nCONFIG_FUSE_DAX=y\n\
        CONFIG_FUSE_PASSTHROUGH=y\nCONFIG_FUSE_IO_URING=y\nCONFIG_FUSE_RESTART=y\n",
};
pub const OFF: Variant = Variant {
    name: "off",
    config:
        "CONFIG_RUST=y\nCONFIG_FUSE_FS=m\nCONFIG_CUSE=m\nCONFIG_VIRTIO_FS=m\nCONFIG_FUSE_DAX=y\n\
        CONFIG_FUSE_PASSTHROUGH=y\nCONFIG_FUSE_IO_URING=y\n# CONFIG_FUSE_RESTART is not set\n",
};
pub const NO_RUST: Variant = Variant {
    name: "no-rust",
    config:
        "# CONFIG_RUST is not set\n# CONFIG_RUST_OVERFLOW_CHECKS is not set\nCONFIG_FUSE_FS=y\nCONFIG_CUSE=y\n\
        CONFIG_VIRTIO_FS=y\nCONFIG_FUSE_DAX=y\n\
        CONFIG_FUSE_PASSTHROUGH=y\nCONFIG_FUSE_IO_URING=y\n",
};
pub const BARE: Variant = Variant {
    name: "bare",
    config: "CONFIG_RUST=y\nCONFIG_FUSE_FS=y\n# CONFIG_CUSE is not set\n# CONFIG_VIRTIO_FS is not set\n\
        # CONFIG_FUSE_PASSTHROUGH is not set\n# CONFIG_FUSE_IO_URING is not set\n# CONFIG_SYSCTL is not set\n\
        CONFIG_FUSE_RESTART=y\n",
};
/// Compiled with W=1 and by clippy.
pub const LINT: Variant = Variant {
    name: "lint",
    config: EVERYTHING,
};

pub struct Objects<'a> {
    paths: &'a Paths,
    source: &'a Source,
    tools: &'a Tools,
    root: PathBuf,
}

impl<'a> Objects<'a> {
    pub fn new(paths: &'a Paths, source: &'a Source, tools: &'a Tools) -> Result<Objects<'a>> {
        let root = paths.cache_dir("build")?.join(&source.key);
        fs::create_dir_all(&root)?;
        Ok(Objects {
            paths,
            source,
            tools,
            root,
        })
    }

    pub fn dir(&self, v: Variant) -> PathBuf {
        self.root.join(v.name)
    }

    pub fn log(&self, v: Variant) -> PathBuf {
        self.paths.cache.join(format!("logs/rfc-{}.log", v.name))
    }

    /// Fragment, as text: part of the key of each result.
    pub fn config(&self, v: Variant) -> Result<String> {
        let path = self.paths.config("rfc");
        let base = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(config::render(&config::merge(&[base, v.config.into()])))
    }

    /// A directory that is ready for `make fs/fuse/`, configured for the tree as
    /// it is now.
    pub fn ready(&self, v: Variant) -> Result<PathBuf> {
        let dir = self.dir(v);
        if !dir.join(build::COMPLETE).exists() {
            let donor = self.dir(BUILTIN);
            if v != BUILTIN && donor.join(build::COMPLETE).exists() {
                build::copy_objects(&donor, &dir)?;
                let _ = fs::remove_file(dir.join(".configured"));
            }
            fs::create_dir_all(&dir)?;
            self.configure(v, &dir)?;
            ui::step(format!("preparing objects for {} (minutes, once)", v.name));
            self.make(v, &["prepare"])?;
            fs::write(dir.join(build::COMPLETE), "")?;
        } else {
            self.configure(v, &dir)?;
        }
        Ok(dir)
    }

    fn configure(&self, v: Variant, dir: &Path) -> Result<()> {
        let mut wanted = config::parse(&self.config(v)?);
        build::retain_known(&mut wanted, &self.source.tree);
        let fragment = dir.join("wanted.config");
        let text = config::render(&wanted);
        // Nothing else that a patch may touch decides what is configured.
        let kconfig = fs::read_to_string(self.source.tree.join("fs/fuse/Kconfig"))?;
        let (mark, state) = (dir.join(".configured"), format!("{text}\n{kconfig}"));
        if fs::read_to_string(&mark).is_ok_and(|old| old == state) {
            return Ok(());
        }
        let _ = fs::remove_file(&mark);
        fs::write(&fragment, &text)?;
        let mut c = self.tools.make(&self.source.tree, dir, "x86_64");
        c.env("KCONFIG_ALLCONFIG", &fragment).arg("allnoconfig");
        ui::run_logged(&mut c, &self.log(v), &format!("configuring {}", v.name))?;
        let got = fs::read_to_string(dir.join(".config")).context("make left no .config")?;
        config::verify(&wanted, &got)?;
        Ok(fs::write(mark, state)?)
    }

    pub fn command(&self, v: Variant, args: &[&str]) -> Command {
        let mut c = self.tools.make(&self.source.tree, &self.dir(v), "x86_64");
        let jobs = std::thread::available_parallelism().map_or(2, |n| n.get());
        c.arg(format!("-j{jobs}")).args(args);
        build::nice(c)
    }

    pub fn make(&self, v: Variant, args: &[&str]) -> Result<()> {
        let what = format!("make {} ({})", args.join(" "), v.name);
        ui::run_logged(&mut self.command(v, args), &self.log(v), &what)
    }

    /// Runs make and gives all it said; whether it succeeded is for the caller.
    pub fn listen(&self, v: Variant, args: &[&str]) -> Result<(bool, String)> {
        let out = self.command(v, args).output().context("cannot run make")?;
        let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        fs::write(self.log(v), text.as_bytes())?;
        Ok((out.status.success(), text.into_owned()))
    }

    /// So that each file is compiled again and says again what is wrong with it.
    pub fn forget(&self, v: Variant) -> Result<()> {
        let dir = self.dir(v).join("fs/fuse");
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| dir.display().to_string())
            }
            _ => Ok(()),
        }
    }

    /// A whole kernel with the modules, once: its symbols are what modules and
    /// built-in objects are linked against.
    pub fn whole(&self, tree: &Tree) -> Result<PathBuf> {
        let mark = self.dir(MODULE).join(".whole");
        self.ready(BUILTIN)?;
        let dir = self.ready(MODULE)?;
        if fs::read_to_string(&mark).ok().as_deref() != Some(&tree.base) {
            ui::step("building the kernel that modules are linked against (about 4 minutes, once)");
            self.make(MODULE, &["vmlinux", "modules"])?;
            fs::write(mark, &tree.base)?;
        }
        Ok(dir)
    }

    /// What `fs/fuse/built-in.a` would miss at the final link.
    pub fn unresolved(&self, v: Variant, whole: &Path) -> Result<Vec<String>> {
        let dir = self.dir(v);
        let mut defined = names(&whole.join("vmlinux"), Symbols::Defined)?;
        let archive = dir.join("fs/fuse/built-in.a");
        defined.extend(names(&archive, Symbols::Defined)?);
        // Rust's are compiled anew when the bindings change.
        if let Ok(entries) = fs::read_dir(dir.join("rust")) {
            for e in entries {
                let path = e?.path();
                if path.extension().is_some_and(|x| x == "o") {
                    defined.extend(names(&path, Symbols::Defined)?);
                }
            }
        }
        let wanted = names(&archive, Symbols::Undefined)?;
        if wanted.is_empty() {
            bail!("{} asks for no symbol at all", archive.display());
        }
        Ok(wanted.difference(&defined).cloned().collect())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Symbols {
    Defined,
    Undefined,
}

fn names(file: &Path, which: Symbols) -> Result<BTreeSet<String>> {
    let out = Command::new("llvm-nm-19")
        .args(["--extern-only", "--format=posix", "--quiet"])
        .arg(file)
        .output()
        .context("cannot run llvm-nm-19")?;
    if !out.status.success() {
        bail!(
            "llvm-nm-19 {}: {}",
            file.display(),
            String::from_utf8_lossy(&out.stderr)
        );
    }
    Ok(parse_nm(&String::from_utf8_lossy(&out.stdout), which))
}

/// `name type [value size]`; weak references may stay unresolved.
fn parse_nm(text: &str, which: Symbols) -> BTreeSet<String> {
    text.lines()
        .filter_map(|l| {
            let mut words = l.split_whitespace();
            let (name, kind) = (words.next()?, words.next()?);
            let wanted = match kind {
                "U" => which == Symbols::Undefined,
                "w" | "v" => false,
                _ if kind.len() == 1 => which == Symbols::Defined,
                _ => false,
            };
            wanted.then(|| name.to_string())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_read() {
        let text = "a.a[x.o]:\nfuse_x T 0 10\nkmalloc U\nmaybe w\n_RNv D 0 8\n\n";
        let set = |w| parse_nm(text, w).into_iter().collect::<Vec<_>>();
        assert_eq!(set(Symbols::Defined), ["_RNv", "fuse_x"]);
        assert_eq!(set(Symbols::Undefined), ["kmalloc"]);
    }

    #[test]
    fn variants_differ_in_what_they_are_for() {
        let get = |v: Variant, s: &str| config::parse(v.config).get(s).cloned().flatten();
        let on = Some("y".to_string());
        for v in [BUILTIN, MODULE, OFF, NO_RUST] {
            for s in [
                "CONFIG_FUSE_DAX",
                "CONFIG_FUSE_IO_URING",
                "CONFIG_FUSE_PASSTHROUGH",
            ] {
                assert_eq!(get(v, s), on, "{} {s}", v.name);
            }
        }
        assert_eq!(get(BUILTIN, "CONFIG_FUSE_RESTART"), on);
        assert_eq!(get(MODULE, "CONFIG_FUSE_RESTART"), on);
        assert_eq!(get(MODULE, "CONFIG_FUSE_FS").as_deref(), Some("m"));
        assert_eq!(get(OFF, "CONFIG_FUSE_RESTART"), None);
        assert_eq!(get(NO_RUST, "CONFIG_RUST"), None);
        assert_eq!(get(BARE, "CONFIG_FUSE_RESTART"), on);
        assert_eq!(LINT.config, BUILTIN.config);
    }
}
