// SPDX-License-Identifier: GPL-2.0
//! A git tree of the pristine source, in the cache, and the series on top of it
//! by `git am`, as a maintainer would.
//!
//! The patches are applied in a second worktree that has only the files they
//! touch. The first one, which is compiled, is moved from commit to commit by
//! `git checkout`: that writes what differs and nothing else, so make(1) compiles
//! what differs and nothing else.

use crate::kernel::source::{hex, Source};
use crate::paths::Paths;
use crate::{kernel, ui};
use anyhow::{bail, ensure, Context, Result};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which source the repository was made of; written last.
const MADE_OF: &str = "rfc-source";
const TAG: &str = "pristine";

pub struct Tree {
    /// The one that is compiled.
    pub dir: PathBuf,
    /// Commit of the pristine source.
    pub base: String,
    pub commits: Vec<Commit>,
    /// Patches as they would be mailed.
    pub outgoing: PathBuf,
}

pub struct Commit {
    /// From 1; 0 is the pristine source.
    pub number: usize,
    pub id: String,
    pub subject: String,
    /// In [`Tree::outgoing`].
    pub patch: PathBuf,
    pub files: Vec<String>,
}

impl Tree {
    /// Makes the repository if there is none, applies the patches, exports them.
    /// With `canary` a commit that no check may let pass comes last.
    pub fn set_up(paths: &Paths, source: &Source, canary: bool) -> Result<Tree> {
        let dir = source.tree.clone();
        if fs::read_to_string(dir.join(".git").join(MADE_OF)).ok() != Some(source.id.clone()) {
            make_repository(&dir, &source.id)?;
        }
        // Left by a run that was interrupted; the index may be locked as well.
        let _ = fs::remove_file(dir.join(".git/index.lock"));
        git(&dir, &["checkout", "-q", "-f", "HEAD"])?;
        git(&dir, &["clean", "-fdq"])?;
        let base = git(&dir, &["rev-parse", &format!("{TAG}^{{commit}}")])?;
        let base = base.trim().to_string();

        let patches = kernel::series::list(&paths.patches())?;
        ensure!(
            !patches.is_empty(),
            "no patches in {}",
            paths.patches().display()
        );
        let am = source.home.join("am");
        let mut head = apply(&dir, &am, &base, &patches)?;
        if canary {
            head = super::canary::commit(&am)?;
        }
        let outgoing = source.home.join("outgoing");
        let commits = export(&dir, &base, &head, &outgoing)?;
        ensure!(
            commits.len() == patches.len() + usize::from(canary),
            "{} patches made {} commits",
            patches.len(),
            commits.len()
        );
        Ok(Tree {
            dir,
            base,
            commits,
            outgoing,
        })
    }

    /// The compiled tree becomes that of a commit (0: the pristine one).
    pub fn checkout(&self, number: usize) -> Result<()> {
        git(&self.dir, &["checkout", "-q", "--detach", self.id(number)?]).map(drop)
    }

    pub fn id(&self, number: usize) -> Result<&str> {
        match number {
            0 => Ok(&self.base),
            n => match self.commits.get(n - 1) {
                Some(c) => Ok(&c.id),
                None => bail!(
                    "there is no patch {n}: the series has {}",
                    self.commits.len()
                ),
            },
        }
    }

    /// All files that any commit touches and that are compiled into anything.
    pub fn code(&self) -> BTreeSet<&str> {
        let all = self.commits.iter().flat_map(|c| &c.files);
        all.map(String::as_str).filter(|f| is_code(f)).collect()
    }

    /// Of the content of all code at a commit: what is built is a function of it.
    pub fn code_hash(&self, number: usize) -> Result<String> {
        let code = self.code();
        let mut args = vec!["ls-tree", "-r", "--full-tree", self.id(number)?, "--"];
        args.extend(&code);
        let mut h = Sha256::new();
        h.update(git(
            &self.dir,
            &["rev-parse", &format!("{}^{{tree}}", self.base)],
        )?);
        h.update(git(&self.dir, &args)?);
        Ok(hex(&h.finalize())[..16].to_string())
    }

    /// As a file was at a commit, if it was there.
    pub fn show(&self, number: usize, file: &str) -> Result<Option<Vec<u8>>> {
        let name = format!("{}:{file}", self.id(number)?);
        let out = command(&self.dir).args(["show", &name]).output()?;
        Ok(out.status.success().then_some(out.stdout))
    }
}

pub fn is_code(file: &str) -> bool {
    !["Documentation/", "tools/", "MAINTAINERS"]
        .iter()
        .any(|p| file.starts_with(p))
}

fn make_repository(dir: &Path, id: &str) -> Result<()> {
    ui::step("making a git tree of the pristine source (about a minute)");
    let _ = fs::remove_file(dir.join(".git/index.lock"));
    git(dir, &["init", "-q"])?;
    for (key, value) in [
        ("core.autocrlf", "false"),
        ("gc.auto", "0"),
        ("advice.detachedHead", "false"),
    ] {
        git(dir, &["config", key, value])?;
    }
    // What the kernel's .gitignore names is part of it if it is in the package.
    git(dir, &["add", "-A", "-f", "."])?;
    let message = format!("Linux, {id}");
    git(dir, &["commit", "-q", "--allow-empty", "-m", &message])?;
    git(dir, &["tag", "-f", TAG])?;
    Ok(fs::write(dir.join(".git").join(MADE_OF), id)?)
}

/// `git am` of all patches; gives the last commit.
fn apply(dir: &Path, am: &Path, base: &str, patches: &[PathBuf]) -> Result<String> {
    let mut touched = BTreeSet::new();
    for p in patches {
        touched.extend(kernel::series::touched(&fs::read_to_string(p)?));
    }
    if !am.join(".git").exists() {
        let _ = fs::remove_dir_all(am);
        git(dir, &["worktree", "prune"])?;
        let path = am.display().to_string();
        git(
            dir,
            &[
                "worktree",
                "add",
                "-q",
                "--no-checkout",
                "--detach",
                &path,
                base,
            ],
        )?;
    }
    let _ = command(am).args(["am", "--abort"]).output();
    let mut sparse = vec!["sparse-checkout", "set", "--no-cone"];
    let rooted: Vec<String> = touched.iter().map(|f| format!("/{f}")).collect();
    sparse.extend(rooted.iter().map(String::as_str));
    git(am, &sparse)?;
    git(am, &["reset", "-q", "--hard", base])?;
    let mut c = command(am);
    // Trailing blanks and the like are errors. The same patches make the same commits.
    c.args(["-c", "apply.whitespace=error-all", "am", "-q"])
        .arg("--committer-date-is-author-date")
        .args(patches);
    let out = c.output()?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
        let _ = command(am).args(["am", "--abort"]).output();
        bail!("`git am` to the pristine tree failed:\n{said}");
    }
    Ok(git(am, &["rev-parse", "HEAD"])?.trim().to_string())
}

/// Writes the mails, without the cover letter.
fn export(dir: &Path, base: &str, head: &str, outgoing: &Path) -> Result<Vec<Commit>> {
    let _ = fs::remove_dir_all(outgoing);
    fs::create_dir_all(outgoing)?;
    let range = format!("{base}..{head}");
    let out = outgoing.display().to_string();
    git(
        dir,
        &[
            "format-patch",
            "-q",
            "--rfc",
            "-n",
            "--zero-commit",
            "--no-signature",
            "-o",
            &out,
            &range,
        ],
    )?;
    let patches = kernel::series::list(outgoing)?;
    let log = git(dir, &["log", "--reverse", "--format=%H %s", &range])?;
    log.lines()
        .zip(patches)
        .enumerate()
        .map(|(i, (line, patch))| {
            let (id, subject) = line.split_once(' ').context("git log")?;
            let files = git(
                dir,
                &["diff-tree", "--no-commit-id", "--name-only", "-r", id],
            )?;
            Ok(Commit {
                number: i + 1,
                id: id.to_string(),
                subject: subject.to_string(),
                patch,
                files: files.lines().map(String::from).collect(),
            })
        })
        .collect()
}

/// git with nobody's configuration: neither the user's identity nor his hooks,
/// signing keys or mail servers.
pub fn command(dir: &Path) -> Command {
    let mut c = Command::new("git");
    c.current_dir(dir)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("LC_ALL", "C");
    for (role, name) in [("AUTHOR", "nobody"), ("COMMITTER", "nobody")] {
        c.env(format!("GIT_{role}_NAME"), name)
            .env(format!("GIT_{role}_EMAIL"), "nobody@localhost");
    }
    for name in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"] {
        c.env_remove(name);
    }
    c
}

pub fn git(dir: &Path, args: &[&str]) -> Result<String> {
    let out = command(dir).args(args).output().context("cannot run git")?;
    if !out.status.success() {
        bail!(
            "git {} in {} failed: {}",
            args.first().unwrap_or(&""),
            dir.display(),
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A source of two files and a series of two patches, the second of which
    /// adds a document.
    fn lab(second: &str) -> (tempfile::TempDir, Paths, Source) {
        let tmp = tempfile::tempdir().unwrap();
        let home = tmp.path().join("src");
        let tree = home.join("linux");
        fs::create_dir_all(tree.join("fs/fuse")).unwrap();
        fs::write(tree.join("fs/fuse/dev.c"), "a\nb\nc\n").unwrap();
        fs::write(tree.join("Makefile"), "x\n").unwrap();
        let repo = tmp.path().join("repo");
        let paths = Paths {
            repo,
            cache: tmp.path().join("cache"),
        };
        fs::create_dir_all(paths.patches()).unwrap();
        let head = "From 1 Mon Sep 17 00:00:00 2001\nFrom: A <a@b>\nDate: Sun, 22 Nov 2026 00:00:00 +0000\n";
        let one = format!(
            "{head}Subject: [PATCH 1/2] one\n\nText.\n---\n\ndiff --git a/fs/fuse/dev.c b/fs/fuse/dev.c\n\
             --- a/fs/fuse/dev.c\n+++ b/fs/fuse/dev.c\n@@ -1,3 +1,3 @@\n a\n-b\n+B\n c\n"
        );
        let two = format!(
            "{head}Subject: [PATCH 2/2] two\n\nText.\n---\n\ndiff --git a/Documentation/x.rst b/Documentation/x.rst\n\
             new file mode 100644\n--- /dev/null\n+++ b/Documentation/x.rst\n@@ -0,0 +1 @@\n+{second}\n"
        );
        fs::write(paths.patches().join("0001-one.patch"), one).unwrap();
        fs::write(paths.patches().join("0002-two.patch"), two).unwrap();
        let source = Source {
            key: "k".into(),
            id: "7.3".into(),
            tree,
            home,
        };
        (tmp, paths, source)
    }

    #[test]
    fn patches_become_commits_and_mails() {
        let (_tmp, paths, source) = lab("text");
        let tree = Tree::set_up(&paths, &source, false).unwrap();
        let subjects: Vec<_> = tree.commits.iter().map(|c| c.subject.as_str()).collect();
        assert_eq!(subjects, ["one", "two"]);
        assert_eq!(tree.commits[1].files, ["Documentation/x.rst"]);
        let mail = fs::read_to_string(&tree.commits[0].patch).unwrap();
        assert!(mail.contains("Subject: [RFC PATCH 1/2] one"), "{mail}");
        let dev = source.tree.join("fs/fuse/dev.c");
        assert_eq!(fs::read_to_string(&dev).unwrap(), "a\nb\nc\n");
        tree.checkout(1).unwrap();
        assert_eq!(fs::read_to_string(&dev).unwrap(), "a\nB\nc\n");
        assert_eq!(
            tree.show(0, "fs/fuse/dev.c").unwrap().unwrap(),
            b"a\nb\nc\n"
        );
        assert_eq!(tree.show(1, "Documentation/x.rst").unwrap(), None);
        assert!(tree.checkout(3).is_err());
        // Again, with something left by a run that was killed.
        fs::write(&dev, "rubbish").unwrap();
        fs::write(source.tree.join("rubbish"), "").unwrap();
        let again = Tree::set_up(&paths, &source, false).unwrap();
        assert_eq!(again.commits[1].id, tree.commits[1].id);
        assert_eq!(fs::read_to_string(&dev).unwrap(), "a\nB\nc\n");
        assert!(!source.tree.join("rubbish").exists());
    }

    #[test]
    fn documents_do_not_change_what_is_built() {
        let (_tmp, paths, source) = lab("text");
        let tree = Tree::set_up(&paths, &source, false).unwrap();
        assert_eq!(
            tree.code().into_iter().collect::<Vec<_>>(),
            ["fs/fuse/dev.c"]
        );
        let hash = |n| tree.code_hash(n).unwrap();
        assert_ne!(hash(0), hash(1));
        assert_eq!(hash(1), hash(2));
    }

    #[test]
    fn a_patch_that_leaves_blanks_is_refused() {
        let (_tmp, paths, source) = lab("text ");
        let e = Tree::set_up(&paths, &source, false)
            .err()
            .unwrap()
            .to_string();
        assert!(e.contains("trailing whitespace"), "{e}");
    }

    #[test]
    fn a_patch_that_does_not_apply_is_named() {
        let (_tmp, paths, source) = lab("text");
        fs::write(source.tree.join("fs/fuse/dev.c"), "other\n").unwrap();
        let e = Tree::set_up(&paths, &source, false)
            .err()
            .unwrap()
            .to_string();
        assert!(e.contains("fs/fuse/dev.c"), "{e}");
    }
}
