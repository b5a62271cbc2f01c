// SPDX-License-Identifier: GPL-2.0
//! Installs Debian packages that are missing, and nothing when none is. On
//! another system it says exactly what is missing and leaves it at that.

use crate::ui;
use anyhow::{bail, Context, Result};
use std::path::Path;
use std::process::Command;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// To build kernels.
    Kernel,
    /// To boot them by QEMU.
    Qemu,
    /// What tests and demo use inside a guest.
    Guest,
    /// To build the selftests of fuse that the kernel has.
    Selftests,
    /// To check the series as it would be mailed.
    Rfc,
}

/// A Debian package, and how to see on any system whether its content is there.
struct Package {
    need: Need,
    name: &'static str,
    /// A program in PATH, a file if it begins with a slash, a command of git's
    /// or a module of Python's if it has two words.
    probe: &'static str,
}

const fn package(need: Need, name: &'static str, probe: &'static str) -> Package {
    Package { need, name, probe }
}

const PACKAGES: &[Package] = &[
    package(Need::Kernel, "make", "make"),
    package(Need::Kernel, "gcc", "gcc"),
    package(Need::Kernel, "libc6-dev", "/usr/include/stdio.h"),
    package(Need::Kernel, "binutils", "ar"),
    package(Need::Kernel, "clang-19", "clang-19"),
    package(Need::Kernel, "lld-19", "ld.lld-19"),
    package(Need::Kernel, "llvm-19", "llvm-objcopy-19"),
    package(
        Need::Kernel,
        "libclang-19-dev",
        "/usr/lib/llvm-19/lib/libclang.so",
    ),
    package(Need::Kernel, "rustc-web", "/usr/bin/rustc"),
    package(Need::Kernel, "rust-web-src", "/usr/lib/rustlib/src"),
    package(Need::Kernel, "flex", "flex"),
    package(Need::Kernel, "bison", "bison"),
    package(Need::Kernel, "bc", "bc"),
    package(Need::Kernel, "libelf-dev", "/usr/include/libelf.h"),
    package(Need::Kernel, "libssl-dev", "/usr/include/openssl/ssl.h"),
    package(Need::Kernel, "cpio", "cpio"),
    package(Need::Kernel, "kmod", "depmod"),
    package(Need::Kernel, "rsync", "rsync"),
    package(Need::Kernel, "xz-utils", "xz"),
    package(Need::Kernel, "zstd", "zstd"),
    package(Need::Kernel, "perl", "perl"),
    package(Need::Kernel, "python3", "python3"),
    package(Need::Kernel, "git", "git"),
    package(Need::Qemu, "qemu-system-x86", "qemu-system-x86_64"),
    package(Need::Guest, "attr", "setfattr"),
    package(Need::Guest, "acl", "setfacl"),
    package(Need::Guest, "e2fsprogs", "mkfs.ext4"),
    package(Need::Guest, "util-linux", "unshare"),
    package(Need::Guest, "mount", "mount"),
    package(Need::Guest, "procps", "ps"),
    package(Need::Guest, "tar", "tar"),
    package(Need::Guest, "sqlite3", "sqlite3"),
    package(Need::Guest, "systemd", "/lib/systemd/systemd"),
    package(Need::Selftests, "pkgconf", "pkg-config"),
    package(Need::Selftests, "libfuse-dev", "/usr/include/fuse/fuse.h"),
    package(Need::Rfc, "sparse", "sparse"),
    package(Need::Rfc, "rust-web-clippy", "/usr/bin/clippy-driver"),
    package(Need::Rfc, "git-email", "git send-email"),
    // scripts/spdxcheck.py, which checkpatch.pl runs on new files.
    package(Need::Rfc, "python3-ply", "python3 ply"),
    package(Need::Rfc, "python3-git", "python3 git"),
    package(Need::Rfc, "python3-sphinx", "sphinx-build"),
    package(Need::Rfc, "python3-yaml", "python3 yaml"),
];

/// Sees to it that everything for `need` is installed.
pub fn ensure(need: Need) -> Result<()> {
    let debian = Path::new("/etc/debian_version").exists() && in_path("apt-get");
    let wanted = PACKAGES.iter().filter(|p| p.need == need);
    let missing: Vec<&Package> = if debian {
        let names: Vec<&str> = wanted.clone().map(|p| p.name).collect();
        let have = installed(&names)?;
        wanted
            .filter(|p| !have.iter().any(|h| h == p.name))
            .collect()
    } else {
        wanted.filter(|p| !is_there(p.probe)).collect()
    };
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|p| p.name).collect();
    if !debian {
        bail!("{}", advice(&missing));
    }
    install(&names)
}

pub fn need_qemu() -> Result<()> {
    // Asking dpkg takes a moment; the program itself is the quick answer.
    if in_path(crate::vm::qemu::QEMU) {
        return Ok(());
    }
    ensure(Need::Qemu)
}

fn advice(missing: &[&Package]) -> String {
    let lines: Vec<String> = missing
        .iter()
        .map(|p| format!("  {} (Debian: {})", p.probe, p.name))
        .collect();
    format!("this is not Debian, so nothing is installed. Missing, to be installed your system's way:\n{}", lines.join("\n"))
}

fn install(names: &[&str]) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("packages are missing and only root can install them. Run as root:\n  apt-get install -y --no-install-recommends {}", names.join(" "));
    }
    ui::step(format!(
        "installing {} Debian packages (some minutes at most): {}",
        names.len(),
        names.join(" ")
    ));
    let log = std::env::temp_dir().join(format!("fuse-restart-apt-{}.log", std::process::id()));
    let apt = |args: &[&str]| {
        let mut c = Command::new("apt-get");
        c.args(args).env("DEBIAN_FRONTEND", "noninteractive");
        ui::run_logged(&mut c, &log, &format!("apt-get {}", args[0]))
    };
    apt(&["update"])?;
    let mut args = vec!["install", "-y", "--no-install-recommends"];
    args.extend(names);
    apt(&args)?;
    let _ = std::fs::remove_file(log);
    Ok(())
}

fn installed(names: &[&str]) -> Result<Vec<String>> {
    let out = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${Status}\n"])
        .args(names)
        .output()
        .context("cannot run dpkg-query")?;
    Ok(parse_dpkg(&String::from_utf8_lossy(&out.stdout)))
}

fn parse_dpkg(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|l| l.strip_suffix(" install ok installed"))
        .map(String::from)
        .collect()
}

fn is_there(probe: &str) -> bool {
    match probe.split_once(' ') {
        Some(("git", command)) => {
            let program = format!("git-{command}");
            let dir = output("git", &["--exec-path"]).unwrap_or_default();
            in_path(&program) || Path::new(dir.trim()).join(&program).is_file()
        }
        Some((python, module)) => output(python, &["-c", &format!("import {module}")]).is_some(),
        None if probe.starts_with('/') => Path::new(probe).exists(),
        None => in_path(probe),
    }
}

fn output(program: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    out.status.success().then_some(text)
}

pub fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|d| d.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removed_packages_are_not_installed() {
        let text = "make install ok installed\nbc deinstall ok config-files\nflex unknown ok not-installed\n";
        assert_eq!(parse_dpkg(text), ["make"]);
    }

    #[test]
    fn advice_names_program_and_package() {
        let p = package(Need::Kernel, "llvm-19", "llvm-objcopy-19");
        let text = advice(&[&p]);
        assert!(text.contains("llvm-objcopy-19 (Debian: llvm-19)"), "{text}");
    }

    #[test]
    fn probes_look_where_they_say() {
        assert!(is_there("sh") && is_there("/proc/self/exe"));
        assert!(!is_there("no-such-program-1") && !is_there("/no/such/file"));
        assert!(is_there("git commit") && !is_there("git no-such-command"));
        assert!(is_there("python3 json") && !is_there("python3 no_such_module"));
    }
}
