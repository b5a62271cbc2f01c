// SPDX-License-Identifier: GPL-2.0
//! The Rust files inside the patches are generated from `rust-fuse-notify/`, and
//! the kernel's documentation from ours: one source of truth. This compares them, and writes them anew.
//!
//! Each of these files is created whole by one patch, so its content stands in
//! that patch, behind plus signs.

use anyhow::{bail, ensure, Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the files go in the kernel's tree.
const DIR: &str = "fs/fuse/restart/";

/// So does the documentation: there, and here.
const DOC: (&str, &str) = (
    "Documentation/filesystems/fuse/fuse-restart.rst",
    "Documentation/fuse-restart.rst",
);

/// What differs, a line each; empty if nothing does.
pub fn check(repo: &Path, patches: &Path) -> Result<Vec<String>> {
    let mut sources = sources(repo)?;
    let mut wrong = Vec::new();
    for patch in crate::kernel::series::list(patches)? {
        let text = read(&patch)?;
        for (path, file) in created(&text) {
            let name = patch.file_name().unwrap_or_default().to_string_lossy();
            match sources.remove(path) {
                None => wrong.push(format!("{name} creates {path}, which has no source")),
                Some(source) if read(&source)? != file.content() => wrong.push(format!(
                    "{path} in {name} is not {}",
                    source.strip_prefix(repo).unwrap_or(&source).display()
                )),
                Some(_) => {}
            }
        }
    }
    for source in sources.into_values() {
        let source = source.strip_prefix(repo).unwrap_or(&source);
        wrong.push(format!("no patch creates {}", source.display()));
    }
    Ok(wrong)
}

/// Writes the sources into the patches that create them. Returns how many
/// patches changed.
pub fn write(repo: &Path, patches: &Path) -> Result<usize> {
    let sources = sources(repo)?;
    let mut changed = 0;
    for patch in crate::kernel::series::list(patches)? {
        let old = read(&patch)?;
        let mut new = old.clone();
        for (path, file) in created(&old) {
            let source = sources.get(path).with_context(|| {
                format!("{} creates {path}, which has no source", patch.display())
            })?;
            new = new.replacen(file.section, &section(path, &read(source)?)?, 1);
        }
        if new != old {
            let new = restat(&new)?;
            fs::write(&patch, new).with_context(|| patch.display().to_string())?;
            changed += 1;
        }
    }
    let wrong = check(repo, patches)?;
    ensure!(
        wrong.is_empty(),
        "{}\nA file that is new, or gone, has to be put into a patch, or out of it, by hand first",
        wrong.join("\n")
    );
    Ok(changed)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// Path in the kernel's tree to path here.
fn sources(repo: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let krate = repo.join("rust-fuse-notify");
    let mut all = BTreeMap::from([(DOC.0.to_string(), repo.join(DOC.1))]);
    for (from, to) in [("kernel", ""), ("src/proto", "proto/")] {
        let dir = krate.join(from);
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "rs") {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                all.insert(format!("{DIR}{to}{name}"), path.clone());
            }
        }
    }
    Ok(all)
}

struct Created<'a> {
    /// From "diff --git" up to the next one.
    section: &'a str,
}

impl Created<'_> {
    fn content(&self) -> String {
        let mut lines = self.section.split_inclusive('\n');
        // The header ends with the only hunk's.
        lines.by_ref().find(|l| l.starts_with("@@ "));
        lines.filter_map(|l| l.strip_prefix('+')).collect()
    }
}

/// The files of ours that the patch creates.
fn created(patch: &str) -> Vec<(&str, Created<'_>)> {
    let mut starts: Vec<usize> = patch
        .match_indices("\ndiff --git ")
        .map(|(i, _)| i + 1)
        .collect();
    starts.push(patch.len());
    let mut found = Vec::new();
    for range in starts.windows(2) {
        let section = &patch[range[0]..range[1]];
        let first = section.lines().next().unwrap_or_default();
        let Some((_, path)) = first.split_once(" b/") else {
            continue;
        };
        let ours = path == DOC.0 || (path.starts_with(DIR) && path.ends_with(".rs"));
        if ours && section.contains("\nnew file mode ") {
            found.push((path, Created { section }));
        }
    }
    found
}

/// The section that creates a file.
fn section(path: &str, content: &str) -> Result<String> {
    ensure!(
        content.ends_with('\n'),
        "{path} does not end with a newline"
    );
    let hash = git(&["hash-object", "--stdin"], content)?;
    let lines = content.lines().count();
    let mut s = format!(
        "diff --git a/{path} b/{path}\nnew file mode 100644\nindex 000000000..{:.9}\n\
         --- /dev/null\n+++ b/{path}\n@@ -0,0 +1,{lines} @@\n",
        hash.trim()
    );
    for line in content.split_inclusive('\n') {
        s.push('+');
        s.push_str(line);
    }
    Ok(s)
}

/// Renews the list of changed files between "---" and the first diff.
fn restat(patch: &str) -> Result<String> {
    let (message, rest) = patch.split_once("\n---\n").context("no \"---\" line")?;
    let begin = rest.find("diff --git ").context("no diff")?;
    let stat = git(&["apply", "--stat", "--summary"], patch)?;
    Ok(format!("{message}\n---\n{stat}\n{}", &rest[begin..]))
}

fn git(args: &[&str], input: &str) -> Result<String> {
    // Inside a repository git would leave out what lies outside of the directory.
    let mut child = Command::new("git")
        .args(args)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("git")?;
    let mut pipe = child.stdin.take().context("git's input")?;
    let text = input.to_owned();
    let feeder = std::thread::spawn(move || pipe.write_all(text.as_bytes()));
    let out = child.wait_with_output()?;
    let fed = feeder.join();
    if !out.status.success() || !matches!(fed, Ok(Ok(()))) {
        bail!("git {} failed", args.join(" "));
    }
    Ok(String::from_utf8(out.stdout)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let repo = dir.path().to_path_buf();
        let patches = repo.join("patches");
        for d in [
            "Documentation",
            "rust-fuse-notify/kernel",
            "rust-fuse-notify/src/proto",
            "patches",
        ] {
            fs::create_dir_all(repo.join(d)).unwrap();
        }
        fs::write(repo.join("rust-fuse-notify/kernel/a.rs"), "one\n+two\n\n").unwrap();
        fs::write(repo.join("rust-fuse-notify/src/proto/b.rs"), "b\n").unwrap();
        fs::write(repo.join(DOC.1), "doc\n").unwrap();
        let mut patch = String::from("From 0\nSubject: x\n\n---\n old | 1 +\n\n");
        patch += &section("fs/fuse/restart/a.rs", "one\n+two\n\n").unwrap();
        patch += &section("fs/fuse/restart/proto/b.rs", "b\n").unwrap();
        patch += &section(DOC.0, "doc\n").unwrap();
        fs::write(patches.join("0001-x.patch"), patch).unwrap();
        (dir, repo, patches)
    }

    #[test]
    fn what_is_the_same_is_the_same() {
        let (_dir, repo, patches) = repo();
        assert_eq!(check(&repo, &patches).unwrap(), Vec::<String>::new());
        assert_eq!(write(&repo, &patches).unwrap(), 0);
    }

    #[test]
    fn a_changed_source_is_found_and_written() {
        let (_dir, repo, patches) = repo();
        fs::write(repo.join("rust-fuse-notify/kernel/a.rs"), "three\n").unwrap();
        let wrong = check(&repo, &patches).unwrap();
        assert_eq!(
            wrong,
            ["fs/fuse/restart/a.rs in 0001-x.patch is not rust-fuse-notify/kernel/a.rs"]
        );
        assert_eq!(write(&repo, &patches).unwrap(), 1);
        assert_eq!(check(&repo, &patches).unwrap(), Vec::<String>::new());
        let patch = fs::read_to_string(patches.join("0001-x.patch")).unwrap();
        assert!(
            patch.contains("3 files changed") && !patch.contains("old | 1"),
            "{patch}"
        );
    }

    #[test]
    fn files_on_one_side_only_are_found() {
        let (_dir, repo, patches) = repo();
        fs::rename(
            repo.join("rust-fuse-notify/src/proto/b.rs"),
            repo.join("rust-fuse-notify/src/proto/c.rs"),
        )
        .unwrap();
        let wrong = check(&repo, &patches).unwrap();
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert!(write(&repo, &patches).is_err());
    }
}
