// SPDX-License-Identifier: GPL-2.0
//! The kernel's source: Debian's `linux-source-7.3`, by a private apt
//! configuration that leaves the system's alone, or whatever
//! `FUSE_RESTART_LINUX` names (a tree or a tarball).

use crate::paths::Paths;
use crate::ui;
use anyhow::{bail, Context, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

pub const PACKAGE: &str = "linux-source-7.3";
const SUITE: &str = "trixie-backports";

/// A tree in the cache that we may patch in place.
#[derive(Clone, Debug)]
pub struct Source {
    /// Directory in the cache: names the object directories too.
    pub key: String,
    /// Changes whenever the content does.
    pub id: String,
    pub tree: PathBuf,
    /// Holds the tree, the pristine copies and the object directories.
    pub home: PathBuf,
}

/// Unpacked and ready; downloads on first use. Each `track` has a tree of its
/// own, so that a long build does not keep the short ones waiting.
pub fn get(paths: &Paths, track: &str) -> Result<Source> {
    if let Some(source) = present(paths, track) {
        return Ok(source);
    }
    let _lock = super::build::lock(paths, "source")?;
    match std::env::var_os("FUSE_RESTART_LINUX") {
        Some(user) if !user.is_empty() => from_user(paths, Path::new(&user), track),
        _ => {
            let deb = match newest_deb(&paths.cache_dir("downloads")?) {
                Some(deb) => deb,
                None => download(paths)?,
            };
            from_deb(paths, &deb, track)
        }
    }
}

/// Only if nothing has to be fetched or unpacked.
pub fn present(paths: &Paths, track: &str) -> Option<Source> {
    match std::env::var_os("FUSE_RESTART_LINUX") {
        Some(user) if !user.is_empty() => from_user(paths, Path::new(&user), track).ok(),
        _ => {
            let id = deb_version(&newest_deb(&paths.cache.join("downloads"))?)?;
            unpacked(paths, &format!("{id}{track}"), &id)
        }
    }
}

fn unpacked(paths: &Paths, key: &str, id: &str) -> Option<Source> {
    let home = paths.cache.join("src").join(key);
    let tree = fs::read_dir(&home)
        .ok()?
        .filter_map(|e| Some(e.ok()?.path()))
        .find(|p| p.join("Kbuild").is_file() && p.join("fs/fuse").is_dir())?;
    Some(Source {
        key: key.into(),
        id: id.into(),
        tree,
        home,
    })
}

fn newest_deb(dir: &Path) -> Option<PathBuf> {
    let mut debs: Vec<(std::time::SystemTime, PathBuf)> = fs::read_dir(dir)
        .ok()?
        .filter_map(|e| {
            let e = e.ok()?;
            deb_version(&e.path())?;
            Some((e.metadata().ok()?.modified().ok()?, e.path()))
        })
        .collect();
    debs.sort();
    debs.pop().map(|(_, p)| p)
}

/// `linux-source-7.3_VERSION_all.deb`; apt writes `:` as `%3a`.
fn deb_version(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?.strip_suffix("_all.deb")?;
    let version = name.strip_prefix(PACKAGE)?.strip_prefix('_')?;
    Some(version.replace("%3a", "-"))
}

fn download(paths: &Paths) -> Result<PathBuf> {
    let mirror = debian_mirror().with_context(|| {
        format!(
            "cannot find a Debian mirror in this machine's apt sources. Get {PACKAGE} (suite {SUITE}) or any Linux 7.3 \
             source another way and name the tree or tarball in FUSE_RESTART_LINUX"
        )
    })?;
    ui::step(format!(
        "fetching {PACKAGE} of {SUITE} (167 MB) from the mirror of this machine's apt sources"
    ));
    let apt = paths.cache_dir("apt")?;
    for d in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(apt.join(d))?;
    }
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let list = apt.join("sources.list");
    fs::write(
        &list,
        format!("deb [signed-by={keyring}] {mirror} {SUITE} main\n"),
    )?;
    let options = [
        format!("Dir::Etc::sourcelist={}", list.display()),
        "Dir::Etc::sourceparts=-".into(),
        format!("Dir::State::lists={}", apt.join("lists").display()),
        format!("Dir::Cache={}", apt.join("cache").display()),
        // A private directory is not readable to the user that apt drops to.
        "APT::Sandbox::User=root".into(),
    ];
    let log = paths.cache.join("logs/source.log");
    let downloads = paths.cache_dir("downloads")?;
    for what in [["update", ""], ["download", PACKAGE]] {
        let mut c = Command::new("apt-get");
        c.current_dir(&downloads)
            .args(options.iter().flat_map(|o| ["-o", o]));
        c.args(what.iter().filter(|w| !w.is_empty()));
        ui::run_logged(&mut c, &log, &format!("apt-get {}", what.join(" "))).with_context(|| {
            format!("{PACKAGE} cannot be had from {SUITE}; name a Linux 7.3 tree or tarball in FUSE_RESTART_LINUX instead")
        })?;
    }
    newest_deb(&downloads).with_context(|| {
        format!(
            "apt-get download left no {PACKAGE} in {}",
            downloads.display()
        )
    })
}

/// The first origin "Debian" in the machine's apt sources that is no security archive.
fn debian_mirror() -> Option<String> {
    let out = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(ORIGIN) $(LABEL)",
            "Created-By: Packages",
        ])
        .output()
        .ok()?;
    pick_mirror(&String::from_utf8_lossy(&out.stdout))
}

/// Origin and label are only known after an `apt-get update`: the path of the
/// archive speaks for itself before.
fn pick_mirror(targets: &str) -> Option<String> {
    let uris = || {
        targets
            .lines()
            .filter_map(|l| Some((l.split(' ').next()?, l)))
    };
    uris()
        .find(|(_, l)| l.ends_with(" Debian Debian"))
        .or_else(|| uris().find(|(u, _)| u.trim_end_matches('/').ends_with("/debian")))
        .map(|(u, _)| u.to_string())
}

fn from_deb(paths: &Paths, deb: &Path, track: &str) -> Result<Source> {
    let id =
        deb_version(deb).with_context(|| format!("{} is no {PACKAGE} package", deb.display()))?;
    let key = format!("{id}{track}");
    if let Some(s) = unpacked(paths, &key, &id) {
        return Ok(s);
    }
    ui::step(format!("unpacking {PACKAGE} {key} (about 20 s)"));
    let home = paths.cache_dir("src")?.join(&key);
    let part = fresh(&home.with_file_name(format!("{key}.part")))?;
    let log = paths.cache.join("logs/source.log");
    let deb_out = part.join("deb");
    ui::run_logged(
        Command::new("dpkg-deb").arg("-x").arg(deb).arg(&deb_out),
        &log,
        "dpkg-deb -x",
    )?;
    let tar = deb_out.join("usr/src").join(format!("{PACKAGE}.tar.xz"));
    ui::run_logged(
        Command::new("tar")
            .arg("-xf")
            .arg(&tar)
            .arg("-C")
            .arg(&part),
        &log,
        "tar -x",
    )?;
    fs::remove_dir_all(&deb_out)?;
    fs::rename(&part, &home)?;
    unpacked(paths, &key, &id)
        .with_context(|| format!("{} does not contain a kernel tree", deb.display()))
}

fn from_user(paths: &Paths, user: &Path, track: &str) -> Result<Source> {
    let meta =
        fs::metadata(user).with_context(|| format!("FUSE_RESTART_LINUX={}", user.display()))?;
    let user = user.canonicalize()?;
    let log = paths.cache.join("logs/source.log");
    if meta.is_file() {
        let id = format!("tarball-{}", stamp_hash(&user, &meta));
        let key = format!("{id}{track}");
        if let Some(s) = unpacked(paths, &key, &id) {
            return Ok(s);
        }
        ui::step(format!("unpacking {}", user.display()));
        let home = paths.cache_dir("src")?.join(&key);
        let part = fresh(&home.with_file_name(format!("{key}.part")))?;
        ui::run_logged(
            Command::new("tar")
                .arg("-xf")
                .arg(&user)
                .arg("-C")
                .arg(&part),
            &log,
            "tar -x",
        )?;
        fs::rename(&part, &home)?;
        return unpacked(paths, &key, &id)
            .with_context(|| format!("{} does not contain a kernel tree", user.display()));
    }
    if !user.join("fs/fuse").is_dir() || !user.join("Kbuild").is_file() {
        bail!(
            "FUSE_RESTART_LINUX={} is no kernel tree (no Kbuild, no fs/fuse)",
            user.display()
        );
    }
    let key = format!(
        "tree-{}",
        &hex(&Sha256::digest(user.to_string_lossy().as_bytes()))[..12]
    );
    let id = format!("{key}-{}", tree_fingerprint(&user)?);
    let key = format!("{key}{track}");
    let home = paths.cache_dir("src")?.join(&key);
    let seen = home.join("fingerprint");
    if fs::read_to_string(&seen).unwrap_or_default() != id {
        ui::step(format!("copying the tree {} (by content)", user.display()));
        let tree = home.join("linux");
        fs::create_dir_all(&tree)?;
        // By content and without times: a file that changes gets the present
        // time, so that make never takes an object for newer than it.
        let mut c = Command::new("rsync");
        c.args([
            "-rlp",
            "--checksum",
            "--delete",
            "--exclude=/.git",
            "--exclude=*.o",
            "--exclude=*.cmd",
        ])
        .arg(format!("{}/", user.display()))
        .arg(format!("{}/", tree.display()));
        ui::run_logged(&mut c, &log, "rsync")?;
        for state in ["pristine", "absent.json", "applied.json"] {
            let p = home.join(state);
            let _ = fs::remove_dir_all(&p);
            let _ = fs::remove_file(&p);
        }
        fs::write(&seen, &id)?;
    }
    unpacked(paths, &key, &id).with_context(|| format!("{} is no kernel tree", user.display()))
}

fn fresh(dir: &Path) -> Result<PathBuf> {
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir)?;
    Ok(dir.to_path_buf())
}

fn stamp_hash(path: &Path, m: &fs::Metadata) -> String {
    let text = format!(
        "{} {} {}.{}",
        path.display(),
        m.size(),
        m.mtime(),
        m.mtime_nsec()
    );
    hex(&Sha256::digest(text.as_bytes()))[..12].to_string()
}

/// Names, sizes and times of all files: cheap, and changes with every edit.
fn tree_fingerprint(tree: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let mut todo = vec![tree.to_path_buf()];
    while let Some(dir) = todo.pop() {
        let mut entries: Vec<_> = fs::read_dir(&dir)?.collect::<Result<_, _>>()?;
        entries.sort_by_key(|e| e.file_name());
        for e in entries {
            let path = e.path();
            if path == tree.join(".git") {
                continue;
            }
            let m = fs::symlink_metadata(&path)?;
            if m.is_dir() {
                todo.push(path);
            } else {
                hash.update(stamp_hash(path.strip_prefix(tree).unwrap_or(&path), &m));
            }
        }
    }
    Ok(hex(&hash.finalize())[..12].to_string())
}

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_come_from_file_names() {
        let v = |n: &str| deb_version(Path::new(n));
        assert_eq!(
            v("/d/linux-source-7.3_7.3.4-1~bpo13+1_all.deb").unwrap(),
            "7.3.4-1~bpo13+1"
        );
        assert_eq!(v("linux-source-7.3_1%3a7.3-1_all.deb").unwrap(), "1-7.3-1");
        assert_eq!(v("linux-source-7.30_7.30-1_all.deb"), None);
        assert_eq!(v("linux-source-7.3_7.3.4_all.deb.part"), None);
    }

    #[test]
    fn the_mirror_is_the_main_archive() {
        let updated = "http://m/debian-security/ Debian Debian-Security\nhttp://m/x/ Node Node\nhttp://m/deb/ Debian Debian\n";
        assert_eq!(pick_mirror(updated).unwrap(), "http://m/deb/");
        let fresh = "http://m/debian-security/  \nhttp://m/debian/  \n";
        assert_eq!(pick_mirror(fresh).unwrap(), "http://m/debian/");
        assert_eq!(pick_mirror("http://m/ubuntu/ Ubuntu Ubuntu\n"), None);
        assert_eq!(pick_mirror(""), None);
    }

    #[test]
    fn a_fingerprint_sees_every_edit() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("fs")).unwrap();
        fs::write(dir.path().join("fs/a.c"), "1").unwrap();
        let before = tree_fingerprint(dir.path()).unwrap();
        assert_eq!(before, tree_fingerprint(dir.path()).unwrap());
        fs::write(dir.path().join("fs/a.c"), "22").unwrap();
        let edited = tree_fingerprint(dir.path()).unwrap();
        assert_ne!(before, edited);
        fs::write(dir.path().join("fs/b.c"), "").unwrap();
        assert_ne!(edited, tree_fingerprint(dir.path()).unwrap());
    }
}
