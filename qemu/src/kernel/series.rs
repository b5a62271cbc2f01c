// SPDX-License-Identifier: GPL-2.0
//! Puts the series into the tree and takes it out again, writing only files
//! whose content really changes: their new times are what make(1) goes by, so
//! switching costs the compilation of fs/fuse, not of the kernel.
//!
//! A copy of every file the series has ever touched, as it was, lies beside
//! the tree (`pristine/`; files that did not exist are in `absent.json`).

use super::source::{hex, Source};
use anyhow::{bail, Context, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `*.patch` in order; empty or missing directory: no patches.
pub fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut patches: Vec<PathBuf> = match fs::read_dir(dir) {
        Ok(entries) => entries.filter_map(|e| Some(e.ok()?.path())).collect(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => vec![],
        Err(e) => return Err(e).with_context(|| dir.display().to_string()),
    };
    patches.retain(|p| p.extension().is_some_and(|x| x == "patch") && !is_cover(p));
    patches.sort();
    Ok(patches)
}

fn is_cover(p: &Path) -> bool {
    p.file_name()
        .and_then(|n| n.to_str())
        .is_some_and(|n| n.starts_with("0000-") || n.contains("-0000-"))
}

/// Of the patches' content.
pub fn hash(patches: &[PathBuf]) -> Result<String> {
    let mut h = Sha256::new();
    for p in patches {
        h.update(fs::read(p).with_context(|| p.display().to_string())?);
        h.update([0]);
    }
    Ok(hex(&h.finalize())[..12].to_string())
}

/// Files a patch changes, makes or removes.
pub fn touched(patch: &str) -> BTreeSet<String> {
    let mut files = BTreeSet::new();
    for line in patch.lines() {
        if let Some((a, b)) = line
            .strip_prefix("diff --git a/")
            .and_then(|l| l.split_once(" b/"))
        {
            files.insert(a.to_string());
            files.insert(b.to_string());
        }
    }
    files
}

/// Makes the tree pristine plus exactly these patches. Returns how many files
/// were written.
pub fn apply(source: &Source, patches: &[PathBuf]) -> Result<usize> {
    let store = Store::open(source)?;
    let texts: Vec<String> = patches
        .iter()
        .map(|p| Ok(String::from_utf8_lossy(&fs::read(p)?).into_owned()))
        .collect::<Result<_>>()?;
    let mut files: BTreeSet<String> = texts.iter().flat_map(|t| touched(t)).collect();
    files.extend(store.applied()?);
    store.save_pristine(&files)?;
    // Before anything is written: what may differ from pristine from now on.
    store.set_applied(&files)?;

    let scratch = source.home.join("scratch");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch)?;
    for f in &files {
        if let Some(bytes) = store.pristine(f)? {
            write_below(&scratch, f, &bytes)?;
        }
    }
    for p in patches {
        let out = Command::new("git")
            .args(["apply", "-p1", "--whitespace=nowarn"])
            .arg(p)
            .current_dir(&scratch)
            // The cache may lie inside some repository; this is none of it.
            .env("GIT_CEILING_DIRECTORIES", &source.home)
            .output()
            .context("cannot run git")?;
        if !out.status.success() {
            bail!(
                "{} does not apply to {}:\n{}",
                p.display(),
                source.id,
                String::from_utf8_lossy(&out.stderr)
            );
        }
    }
    let mut written = 0;
    let mut differs = BTreeSet::new();
    for f in &files {
        let want = read_opt(&scratch.join(f))?;
        if want != store.pristine(f)? {
            differs.insert(f.clone());
        }
        if want == read_opt(&source.tree.join(f))? {
            continue;
        }
        written += 1;
        match want {
            Some(bytes) => write_below(&source.tree, f, &bytes)?,
            None => fs::remove_file(source.tree.join(f))?,
        }
    }
    store.set_applied(&differs)?;
    fs::remove_dir_all(&scratch)?;
    Ok(written)
}

fn write_below(root: &Path, file: &str, bytes: &[u8]) -> Result<()> {
    let path = root.join(file);
    if Path::new(file)
        .components()
        .any(|c| !matches!(c, std::path::Component::Normal(_)))
    {
        bail!("a patch names {file}, which is not inside the tree");
    }
    fs::create_dir_all(path.parent().unwrap_or(root))?;
    fs::write(&path, bytes).with_context(|| path.display().to_string())
}

fn read_opt(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(b) => Ok(Some(b)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

struct Store<'a> {
    source: &'a Source,
}

impl<'a> Store<'a> {
    fn open(source: &'a Source) -> Result<Store<'a>> {
        fs::create_dir_all(source.home.join("pristine"))?;
        Ok(Store { source })
    }

    fn set(&self, name: &str) -> Result<BTreeSet<String>> {
        match read_opt(&self.source.home.join(name))? {
            Some(b) => serde_json::from_slice(&b)
                .with_context(|| format!("{}/{name} is damaged", self.source.home.display())),
            None => Ok(BTreeSet::new()),
        }
    }

    fn put(&self, name: &str, set: &BTreeSet<String>) -> Result<()> {
        let path = self.source.home.join(name);
        let part = path.with_extension("part");
        fs::write(&part, serde_json::to_vec(set)?)?;
        Ok(fs::rename(part, path)?)
    }

    fn applied(&self) -> Result<BTreeSet<String>> {
        self.set("applied.json")
    }

    fn set_applied(&self, files: &BTreeSet<String>) -> Result<()> {
        self.put("applied.json", files)
    }

    /// A file in neither place was never touched: the tree has it as it was.
    fn save_pristine(&self, files: &BTreeSet<String>) -> Result<()> {
        let mut absent = self.set("absent.json")?;
        for f in files {
            let copy = self.source.home.join("pristine").join(f);
            if copy.exists() || absent.contains(f) {
                continue;
            }
            match read_opt(&self.source.tree.join(f))? {
                Some(bytes) => write_below(&self.source.home.join("pristine"), f, &bytes)?,
                None => {
                    absent.insert(f.clone());
                }
            }
        }
        self.put("absent.json", &absent)
    }

    fn pristine(&self, f: &str) -> Result<Option<Vec<u8>>> {
        read_opt(&self.source.home.join("pristine").join(f))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "\
From 1 Mon Sep 17 00:00:00 2001
Subject: [PATCH] one

---
diff --git a/fs/fuse/dev.c b/fs/fuse/dev.c
--- a/fs/fuse/dev.c
+++ b/fs/fuse/dev.c
@@ -1,3 +1,3 @@
 a
-b
+B
 c
diff --git a/fs/fuse/new.rs b/fs/fuse/new.rs
new file mode 100644
--- /dev/null
+++ b/fs/fuse/new.rs
@@ -0,0 +1 @@
+rust
-- 
2.47.3
";

    struct Lab {
        dir: tempfile::TempDir,
        source: Source,
    }

    fn lab() -> Lab {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("src");
        let tree = home.join("linux");
        write_below(&tree, "fs/fuse/dev.c", b"a\nb\nc\n").unwrap();
        write_below(&tree, "fs/fuse/other.c", b"x\n").unwrap();
        Lab {
            source: Source {
                key: "k".into(),
                id: "k".into(),
                tree,
                home,
            },
            dir,
        }
    }

    impl Lab {
        fn patch(&self, name: &str, text: &str) -> PathBuf {
            let p = self.dir.path().join(name);
            fs::write(&p, text).unwrap();
            p
        }
        fn read(&self, f: &str) -> Option<String> {
            read_opt(&self.source.tree.join(f))
                .unwrap()
                .map(|b| String::from_utf8(b).unwrap())
        }
    }

    #[test]
    fn in_and_out_again() {
        let lab = lab();
        let one = lab.patch("1.patch", ONE);
        assert_eq!(apply(&lab.source, std::slice::from_ref(&one)).unwrap(), 2);
        assert_eq!(lab.read("fs/fuse/dev.c").unwrap(), "a\nB\nc\n");
        assert_eq!(lab.read("fs/fuse/new.rs").unwrap(), "rust\n");
        assert_eq!(
            apply(&lab.source, std::slice::from_ref(&one)).unwrap(),
            0,
            "nothing to write the second time"
        );
        assert_eq!(apply(&lab.source, &[]).unwrap(), 2);
        assert_eq!(lab.read("fs/fuse/dev.c").unwrap(), "a\nb\nc\n");
        assert_eq!(lab.read("fs/fuse/new.rs"), None);
        assert_eq!(apply(&lab.source, &[one]).unwrap(), 2);
    }

    #[test]
    fn a_new_version_writes_only_what_changed() {
        let lab = lab();
        let one = lab.patch("1.patch", ONE);
        apply(&lab.source, &[one]).unwrap();
        let two = lab.patch("1.patch", &ONE.replace("+rust", "+better"));
        assert_eq!(apply(&lab.source, &[two]).unwrap(), 1);
        assert_eq!(lab.read("fs/fuse/new.rs").unwrap(), "better\n");
    }

    #[test]
    fn a_patch_that_does_not_fit_leaves_the_tree_alone() {
        let lab = lab();
        let bad = lab.patch("1.patch", &ONE.replace("\n-b\n", "\n-nope\n"));
        let e = apply(&lab.source, &[bad]).unwrap_err().to_string();
        assert!(e.contains("1.patch does not apply"), "{e}");
        assert_eq!(lab.read("fs/fuse/dev.c").unwrap(), "a\nb\nc\n");
    }

    #[test]
    fn order_and_hash() {
        let lab = lab();
        let dir = lab.dir.path().join("p");
        assert!(list(&dir).unwrap().is_empty());
        fs::create_dir(&dir).unwrap();
        for n in [
            "0002-b.patch",
            "0001-a.patch",
            "0000-cover-letter.patch",
            "README",
        ] {
            fs::write(dir.join(n), n).unwrap();
        }
        let names: Vec<_> = list(&dir)
            .unwrap()
            .iter()
            .map(|p| p.file_name().unwrap().to_owned())
            .collect();
        assert_eq!(names, ["0001-a.patch", "0002-b.patch"]);
        let before = hash(&list(&dir).unwrap()).unwrap();
        fs::write(dir.join("0001-a.patch"), "other").unwrap();
        assert_ne!(before, hash(&list(&dir).unwrap()).unwrap());
    }

    #[test]
    fn nothing_is_written_outside() {
        let dir = tempfile::tempdir().unwrap();
        assert!(write_below(dir.path(), "../x", b"").is_err());
        assert!(write_below(dir.path(), "/x", b"").is_err());
    }
}
