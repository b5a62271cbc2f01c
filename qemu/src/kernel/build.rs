// SPDX-License-Identifier: GPL-2.0
//! Compiles a kernel and keeps what it takes to boot it and to read its
//! reports, under a hash of everything that went in.
//!
//! Object directories stay, one a flavor and source, so that a changed patch
//! costs seconds; a flavor without one starts from a copy of its sibling's.
//! One build a source tree at a time.

use super::{
    config, flavor::Flavor, series, source, source::hex, source::Source, tools::Tools, Built,
};
use crate::paths::Paths;
use crate::ui;
use anyhow::{bail, Context, Result};
use nix::fcntl::{Flock, FlockArg};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Raised when the way of building changes in a way the hash does not see.
const FORMAT: u32 = 1;
/// Finished kernels kept of each flavor.
const KEEP: usize = 4;
/// Marks an object directory that a whole build has gone through.
pub const COMPLETE: &str = ".complete";

/// A finished kernel for exactly the present inputs, if there is one and
/// nothing has to be set up to know.
pub fn quick(paths: &Paths, flavor: Flavor) -> Result<Option<Built>> {
    let (Some(source), Ok(tools)) = (source::present(paths, flavor.track()), Tools::find(paths))
    else {
        return Ok(None);
    };
    let hash = input_hash(paths, flavor, &source, &tools)?;
    Ok(finished(paths, flavor, &hash))
}

pub fn build(paths: &Paths, flavor: Flavor) -> Result<Built> {
    let tools = {
        let _lock = lock(paths, "setup")?;
        crate::setup::ensure(crate::setup::Need::Kernel)?;
        Tools::set_up(paths)?
    };
    let _lock = lock(paths, &format!("build{}", flavor.track()))?;
    let source = source::get(paths, flavor.track())?;
    let hash = input_hash(paths, flavor, &source, &tools)?;
    if let Some(built) = finished(paths, flavor, &hash) {
        return Ok(built);
    }
    let start = Instant::now();
    let name = flavor.name();
    let patches = patches(paths, flavor)?;
    let objects = paths.cache_dir("build")?.join(&source.key).join(name);
    let log = paths.cache.join(format!("logs/{name}.log"));
    let _ = fs::remove_file(&log);

    adopt_sibling(&objects, flavor)?;
    let fresh = !objects.join(COMPLETE).exists();
    let effort = if fresh {
        format!("about {} minutes on 2 cores", flavor.minutes())
    } else {
        "only what changed".into()
    };
    ui::step(format!(
        "building the {name} kernel ({} patches, {effort}; log: {})",
        patches.len(),
        log.display()
    ));
    fs::create_dir_all(&objects)?;
    let written = series::apply(&source, &patches)?;
    if written > 0 {
        ui::step(format!("series: {written} files of the tree written"));
    }
    let wanted = wanted(paths, flavor, &source)?;
    let fragment = objects.join("wanted.config");
    fs::write(&fragment, config::render(&wanted))?;
    let mut c = tools.make(&source.tree, &objects, flavor.arch());
    c.env("KCONFIG_ALLCONFIG", &fragment).arg("allnoconfig");
    ui::run_logged(&mut c, &log, &format!("configuring {name}"))?;
    let dot_config = fs::read_to_string(objects.join(".config")).context("make left no .config")?;
    config::verify(&wanted, &dot_config)?;

    let (target, image) = flavor.target();
    drop_boot_image(&objects)?;
    let jobs = std::thread::available_parallelism().map_or(2, |n| n.get());
    let mut c = tools.make(&source.tree, &objects, flavor.arch());
    c.arg(format!("-j{jobs}")).arg(target);
    if !flavor.modules().is_empty() {
        c.arg("modules");
    }
    ui::run_logged(&mut nice(c), &log, &format!("building {name}"))?;
    fs::write(objects.join(COMPLETE), "")?;

    let info = json!({
        "flavor": name, "source": source.id, "patches": patches.len(), "toolchain": tools.id,
        "series": series::hash(&patches)?, "built_seconds": start.elapsed().as_secs(),
    });
    let built = keep(paths, flavor, &hash, &objects, image, &info)?;
    ui::step(format!(
        "{name} kernel ready after {}: {}",
        ui::clock(start.elapsed()),
        built.image.display()
    ));
    Ok(built)
}

/// What every kernel here needs to be of use as a test bed, then the series.
pub fn patches(paths: &Paths, flavor: Flavor) -> Result<Vec<PathBuf>> {
    let mut patches = series::list(&paths.repo.join("qemu/patches/7.3"))?;
    if flavor.series() {
        patches.extend(series::list(&paths.patches())?);
        if flavor.mutants() {
            patches.extend(series::list(&paths.repo.join("qemu/patches/7.3-tests"))?);
        }
    }
    Ok(patches)
}

fn input_hash(paths: &Paths, flavor: Flavor, source: &Source, tools: &Tools) -> Result<String> {
    let mut h = Sha256::new();
    for part in [&FORMAT.to_string(), flavor.name(), &source.id, &tools.id] {
        h.update(part.as_bytes());
        h.update([0]);
    }
    h.update(series::hash(&patches(paths, flavor)?)?);
    for text in fragments(paths, flavor)? {
        h.update(text.as_bytes());
        h.update([0]);
    }
    Ok(hex(&h.finalize())[..12].to_string())
}

fn fragments(paths: &Paths, flavor: Flavor) -> Result<Vec<String>> {
    let mut names = flavor.fragments().to_vec();
    if flavor.series() {
        names.push("series");
    }
    names.extend(flavor.last_fragment());
    names
        .into_iter()
        .map(|n| {
            let p = paths.config(n);
            fs::read_to_string(&p).with_context(|| p.display().to_string())
        })
        .collect()
}

/// The series' own symbols are asked for only if the tree has them: a series
/// under construction may not have come that far.
pub fn wanted(paths: &Paths, flavor: Flavor, source: &Source) -> Result<config::Symbols> {
    let mut wanted = config::merge(&fragments(paths, flavor)?);
    retain_known(&mut wanted, &source.tree);
    Ok(wanted)
}

pub fn retain_known(wanted: &mut config::Symbols, tree: &Path) {
    let kconfig = fs::read_to_string(tree.join("fs/fuse/Kconfig")).unwrap_or_default();
    wanted.retain(|s, _| !s.starts_with("CONFIG_FUSE_RESTART") || defines(&kconfig, s));
}

fn defines(kconfig: &str, symbol: &str) -> bool {
    let name = symbol.trim_start_matches("CONFIG_");
    kconfig
        .lines()
        .any(|l| l.split_whitespace().eq(["config", name]))
}

/// A flavor that was never built starts from its sibling's objects: all but
/// what the series touches is the same.
fn adopt_sibling(objects: &Path, flavor: Flavor) -> Result<()> {
    if objects.join(COMPLETE).exists() {
        return Ok(());
    }
    let Some(donor) = flavor.donor().map(|s| objects.with_file_name(s.name())) else {
        return Ok(());
    };
    if !donor.join(COMPLETE).exists() {
        return Ok(());
    }
    ui::step(format!(
        "starting from the objects of the {} kernel",
        flavor.donor().map_or("", Flavor::name)
    ));
    copy_objects(&donor, objects)
}

/// Objects of another directory, ready for make but not taken for complete.
pub fn copy_objects(donor: &Path, objects: &Path) -> Result<()> {
    let part = objects.with_extension("part");
    let _ = fs::remove_dir_all(&part);
    let _ = fs::remove_dir_all(objects);
    let status = Command::new("cp")
        .args(["-a", "--reflink=auto"])
        .arg(donor)
        .arg(&part)
        .status()?;
    if !status.success() {
        bail!(
            "cannot copy {} to {}: disk full?",
            donor.display(),
            part.display()
        );
    }
    rename_in_commands(&part, donor, objects)?;
    // An interrupted first build must not pass for a complete one.
    fs::remove_file(part.join(COMPLETE))?;
    Ok(fs::rename(&part, objects)?)
}

/// kbuild compiles again what was compiled by another command, and those of
/// Rust objects name the object directory.
fn rename_in_commands(dir: &Path, from: &Path, to: &Path) -> Result<()> {
    let (from, to) = (from.display().to_string(), to.display().to_string());
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            rename_in_commands(&path, Path::new(&from), Path::new(&to))?;
        } else if path.extension().is_some_and(|x| x == "cmd") {
            let text = fs::read_to_string(&path)?;
            // Whole path components only: `stock` is not `stock2`.
            let new = text
                .replace(&format!("{from}/"), &format!("{to}/"))
                .replace(&format!("{from} "), &format!("{to} "));
            if new != text {
                fs::write(&path, new)?;
            }
        }
    }
    Ok(())
}

/// arch/x86/boot is made anew each time, which takes seconds. make(1) goes by
/// times, and after an incremental debug build has left a bzImage that does not
/// boot: a new kernel behind the old setup code.
fn drop_boot_image(objects: &Path) -> Result<()> {
    let dir = objects.join("arch/x86/boot");
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| dir.display().to_string())
        }
        _ => Ok(()),
    }
}

fn result_dir(paths: &Paths, flavor: Flavor, hash: &str) -> PathBuf {
    paths
        .cache
        .join("kernels")
        .join(format!("{}-{hash}", flavor.name()))
}

fn finished(paths: &Paths, flavor: Flavor, hash: &str) -> Option<Built> {
    let dir = result_dir(paths, flavor, hash);
    let image = dir.join("kernel");
    image.is_file().then(|| Built {
        name: flavor.name(),
        hash: hash.into(),
        dir,
        image,
    })
}

fn keep(
    paths: &Paths,
    flavor: Flavor,
    hash: &str,
    objects: &Path,
    image: &str,
    info: &serde_json::Value,
) -> Result<Built> {
    let dir = result_dir(paths, flavor, hash);
    paths.cache_dir("kernels")?;
    let part = dir.with_extension("part");
    let _ = fs::remove_dir_all(&part);
    fs::create_dir_all(&part)?;
    for (from, to) in [
        (image, "kernel"),
        ("System.map", "System.map"),
        (".config", "config"),
        ("vmlinux", "vmlinux"),
    ] {
        let from = objects.join(from);
        fs::copy(&from, part.join(to)).with_context(|| from.display().to_string())?;
    }
    for module in flavor.modules() {
        let from = objects.join(module);
        let name = from.file_name().context("a module without a name")?;
        fs::copy(&from, part.join(name)).with_context(|| from.display().to_string())?;
    }
    fs::write(part.join("info.json"), serde_json::to_vec_pretty(info)?)?;
    let _ = fs::remove_dir_all(&dir);
    fs::rename(&part, &dir)?;
    prune(&paths.cache.join("kernels"), flavor.name(), KEEP);
    finished(paths, flavor, hash).context("the finished kernel vanished")
}

pub fn prune(kernels: &Path, name: &str, keep: usize) {
    let Ok(entries) = fs::read_dir(kernels) else {
        return;
    };
    let mut all: Vec<_> = entries
        .filter_map(|e| {
            let e = e.ok()?;
            let hash = e
                .file_name()
                .to_str()?
                .strip_prefix(name)?
                .strip_prefix('-')?
                .to_string();
            (hash.len() == 12 && hash.bytes().all(|b| b.is_ascii_hexdigit()))
                .then_some((e.metadata().ok()?.modified().ok()?, e.path()))
        })
        .collect();
    all.sort();
    for (_, old) in all.iter().take(all.len().saturating_sub(keep)) {
        let _ = fs::remove_dir_all(old);
    }
}

/// At low priority, and ended with this process: a make(1) that outlives it would
/// go on in a directory that the next run uses.
pub fn nice(c: Command) -> Command {
    let mut n = Command::new("nice");
    n.arg(c.get_program()).args(c.get_args());
    if let Some(dir) = c.get_current_dir() {
        n.current_dir(dir);
    }
    n.env_clear();
    n.envs(c.get_envs().filter_map(|(k, v)| Some((k, v?))));
    let parent = nix::unistd::getpid();
    // SAFETY: prctl(2) and getppid(2) only, both async-signal-safe.
    unsafe {
        n.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGTERM)?;
            // It may have died before that.
            if nix::unistd::getppid() != parent {
                return Err(nix::errno::Errno::ESRCH.into());
            }
            Ok(())
        });
    }
    n
}

pub fn lock(paths: &Paths, name: &str) -> Result<Flock<File>> {
    let path = paths.cache.join(format!("{name}.lock"));
    let open = || {
        File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
    };
    match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
        Ok(l) => Ok(l),
        Err(_) => {
            ui::step(format!("waiting for another {name} to end"));
            Flock::lock(open()?, FlockArg::LockExclusive)
                .map_err(|(_, e)| e)
                .with_context(|| path.display().to_string())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab() -> (tempfile::TempDir, Paths, Source, Tools) {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().join("repo");
        fs::create_dir_all(repo.join("qemu/config")).unwrap();
        for n in ["common", "um", "x86", "checks", "debug", "series"] {
            fs::write(
                repo.join(format!("qemu/config/{n}.config")),
                format!("CONFIG_{}=y\n", n.to_uppercase()),
            )
            .unwrap();
        }
        let paths = Paths {
            repo,
            cache: dir.path().join("cache"),
        };
        fs::create_dir_all(paths.patches()).unwrap();
        let home = dir.path().join("src");
        let source = Source {
            key: "k".into(),
            id: "7.3.4".into(),
            tree: home.join("linux"),
            home,
        };
        (dir, paths, source, Tools::fake("clang 19"))
    }

    #[test]
    fn the_hash_follows_each_input() {
        let (_dir, paths, mut source, tools) = lab();
        let h = |p: &Paths, s: &Source, t: &Tools, f| input_hash(p, f, s, t).unwrap();
        let base = h(&paths, &source, &tools, Flavor::Patched);
        let stock = h(&paths, &source, &tools, Flavor::Stock);
        assert_ne!(base, stock);
        assert_ne!(
            base,
            h(&paths, &source, &Tools::fake("clang 20"), Flavor::Patched)
        );
        fs::write(paths.patches().join("0001-x.patch"), "x").unwrap();
        assert_ne!(base, h(&paths, &source, &tools, Flavor::Patched));
        assert_eq!(
            stock,
            h(&paths, &source, &tools, Flavor::Stock),
            "stock has no series"
        );
        fs::write(paths.config("x86"), "CONFIG_OTHER=y\n").unwrap();
        assert_ne!(stock, h(&paths, &source, &tools, Flavor::Stock));
        let before = h(&paths, &source, &tools, Flavor::Uml);
        source.id = "7.3.5".into();
        assert_ne!(before, h(&paths, &source, &tools, Flavor::Uml));
    }

    #[test]
    fn series_symbols_only_where_the_tree_has_them() {
        let (_dir, paths, source, _) = lab();
        fs::write(paths.config("series"), "CONFIG_FUSE_RESTART=y\n").unwrap();
        let has = |s: &Source| {
            wanted(&paths, Flavor::Patched, s)
                .unwrap()
                .contains_key("CONFIG_FUSE_RESTART")
        };
        assert!(!has(&source));
        fs::create_dir_all(source.tree.join("fs/fuse")).unwrap();
        fs::write(
            source.tree.join("fs/fuse/Kconfig"),
            "config FUSE_RESTART\n\tbool\n",
        )
        .unwrap();
        assert!(has(&source));
        assert!(!wanted(&paths, Flavor::Stock, &source)
            .unwrap()
            .contains_key("CONFIG_FUSE_RESTART"));
        assert!(defines("config  FUSE_RESTART", "CONFIG_FUSE_RESTART"));
        assert!(!defines("config FUSE_RESTART_KUNIT", "CONFIG_FUSE_RESTART"));
    }

    #[test]
    fn an_old_boot_image_is_never_built_upon() {
        let dir = tempfile::tempdir().unwrap();
        let boot = dir.path().join("arch/x86/boot/compressed");
        fs::create_dir_all(&boot).unwrap();
        fs::write(boot.join("vmlinux.bin"), "old").unwrap();
        fs::write(dir.path().join("arch/x86/head.o"), "kept").unwrap();
        drop_boot_image(dir.path()).unwrap();
        assert!(!dir.path().join("arch/x86/boot").exists());
        assert!(dir.path().join("arch/x86/head.o").exists());
        drop_boot_image(dir.path()).unwrap();
    }

    #[test]
    fn a_sibling_gives_its_objects_but_not_its_completeness() {
        let dir = tempfile::tempdir().unwrap();
        let (stock, patched) = (dir.path().join("stock"), dir.path().join("patched"));
        fs::create_dir(&stock).unwrap();
        fs::write(stock.join("a.o"), "o").unwrap();
        let cmd = |d: &Path| format!("OBJTREE={0} rustc -L {0}/rust -L {0}2\n", d.display());
        fs::write(stock.join(".a.o.cmd"), cmd(&stock)).unwrap();
        adopt_sibling(&patched, Flavor::Patched).unwrap();
        assert!(!patched.exists(), "an incomplete donor gives nothing");
        fs::write(stock.join(COMPLETE), "").unwrap();
        adopt_sibling(&patched, Flavor::Patched).unwrap();
        assert!(patched.join("a.o").exists() && !patched.join(COMPLETE).exists());
        let want = cmd(&patched).replace("patched2", "stock2");
        assert_eq!(fs::read_to_string(patched.join(".a.o.cmd")).unwrap(), want);
    }

    #[test]
    fn old_kernels_go_but_not_those_of_others() {
        let dir = tempfile::tempdir().unwrap();
        for n in [
            "uml-000000000001",
            "uml-000000000002",
            "uml-stock-000000000003",
        ] {
            fs::create_dir(dir.path().join(n)).unwrap();
        }
        prune(dir.path(), "uml", 1);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        assert!(dir.path().join("uml-stock-000000000003").exists());
    }

    #[test]
    fn a_make_does_not_outlive_who_started_it() {
        use std::os::unix::process::ExitStatusExt;
        // The signal comes when the thread ends that started it, as when all do.
        let start = || {
            let mut sleep = Command::new("sleep");
            sleep.arg("600");
            nice(sleep).spawn()
        };
        let mut child = std::thread::spawn(start).join().unwrap().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(status.signal(), Some(nix::libc::SIGTERM));
    }
}
