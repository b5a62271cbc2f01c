// SPDX-License-Identifier: GPL-2.0
//! Checks of a patch as text, and of the files it touches.

use super::messages::{self, Message};
use super::tree::{Commit, Tree};
use super::waivers::{self, waived};
use anyhow::{ensure, Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Subjects are cut in many places; checkpatch looks at the body only.
const SUBJECT: usize = 75;

pub fn message(commit: &Commit) -> Result<Vec<Message>> {
    let text = fs::read_to_string(&commit.patch)?;
    Ok(message_flaws(&commit.subject, &text)
        .into_iter()
        .map(|text| Message {
            file: name(&commit.patch),
            line: 0,
            text,
        })
        .collect())
}

fn message_flaws(subject: &str, patch: &str) -> Vec<String> {
    let body = patch.split("\n---\n").next().unwrap_or_default();
    let trailer = |key: &str| body.lines().filter(|l| l.starts_with(key)).count();
    let mut flaws = Vec::new();
    if trailer("Assisted-by: LLM") != 1 {
        flaws.push("wanted: one trailer \"Assisted-by: LLM\"".into());
    }
    if trailer("Signed-off-by:") != 0 {
        flaws.push("Signed-off-by: only the person who sends it may add that".into());
    }
    if subject.len() > SUBJECT {
        flaws.push(format!("the subject has {} characters", subject.len()));
    }
    if !subject.contains(": ") {
        flaws.push("the subject names no subsystem".into());
    }
    flaws
}

/// What counts, and what was waived (with the reason).
pub fn checkpatch(tree: &Tree, commit: &Commit) -> Result<(Vec<Message>, Vec<String>)> {
    let patch = fs::read_to_string(&commit.patch)?;
    let out = Command::new("perl")
        .current_dir(&tree.dir)
        .args([
            "scripts/checkpatch.pl",
            "--strict",
            "--show-types",
            "--terse",
        ])
        // The trailer is a person's to add.
        .args(["--ignore", "MISSING_SIGN_OFF"])
        .arg(&commit.patch)
        .env("LC_ALL", "C")
        .env("PATH", system_first())
        .output()
        .context("cannot run scripts/checkpatch.pl")?;
    let said = String::from_utf8_lossy(&out.stdout);
    let err = String::from_utf8_lossy(&out.stderr);
    let ended = match out.status.code() {
        // Of a clean patch it says nothing.
        Some(0) => true,
        Some(1) => said.contains("lines checked"),
        _ => false,
    };
    ensure!(ended, "checkpatch.pl did not come to its end:\n{said}{err}");
    // It goes on when a helper of its own fails, and says nothing of it in its result.
    ensure!(
        err.trim().is_empty(),
        "checkpatch.pl could not check everything:\n{err}"
    );
    let mut counted = Vec::new();
    let mut reasons = Vec::new();
    for (kind, message) in messages::checkpatch(&said) {
        let context = waivers::Context {
            patch: &patch,
            message: &message,
            maintained: kind == "FILE_PATH_CHANGES" && maintained(tree, &patch)?,
        };
        match waived(&kind, &context) {
            Some(reason) => reasons.push(format!("{kind}: {reason}")),
            None => counted.push(message),
        }
    }
    reasons.dedup();
    Ok((counted, reasons))
}

/// Python's modules came by package, so the system's Python has to be found
/// before any other.
fn system_first() -> std::ffi::OsString {
    let mut path = std::ffi::OsString::from("/usr/bin:/bin:");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    path
}

/// Whether MAINTAINERS knows every file that the patch adds.
fn maintained(tree: &Tree, patch: &str) -> Result<bool> {
    for file in added(patch) {
        // The file need not be there now, the directory it comes into is.
        let mut place = Path::new(&file).parent();
        while let Some(p) = place.filter(|p| !tree.dir.join(p).is_dir()) {
            place = p.parent();
        }
        let place = place.unwrap_or(Path::new("")).display().to_string();
        let said = super::mail::get_maintainer(&tree.dir, &["--no-rolestats", "-f", &place])?;
        // Everything goes to linux-kernel; only somebody's own entry has a person.
        if !said
            .lines()
            .any(|l| l.contains('@') && !l.contains("lists.") && !l.contains("vger."))
        {
            return Ok(false);
        }
    }
    Ok(true)
}

fn added(patch: &str) -> Vec<String> {
    patch
        .split("\ndiff --git ")
        .skip(1)
        .filter(|s| s.contains("\nnew file mode "))
        .filter_map(|s| Some(s.lines().next()?.split_once(" b/")?.1.to_string()))
        .collect()
}

/// Files of this kind that the commit touches and that are still there.
fn touched<'a>(tree: &Tree, commit: &'a Commit, endings: &[&str]) -> Vec<&'a str> {
    let of_kind = |f: &&String| endings.iter().any(|e| f.ends_with(e));
    let files = commit.files.iter().filter(of_kind).map(String::as_str);
    files.filter(|f| tree.dir.join(f).exists()).collect()
}

/// The tree must be that of the commit. `None`: nothing to format.
pub fn rustfmt(tree: &Tree, commit: &Commit) -> Result<Option<Vec<Message>>> {
    let files = touched(tree, commit, &[".rs"]);
    if files.is_empty() {
        return Ok(None);
    }
    let mut found = Vec::new();
    for file in files {
        let config = tree.dir.join(".rustfmt.toml");
        ensure!(config.is_file(), "the tree has no .rustfmt.toml");
        let out = Command::new("rustfmt")
            .current_dir(&tree.dir)
            .args(["--check", "--color", "never", "--config-path"])
            .arg(&config)
            .arg(file)
            .output()
            .context("cannot run rustfmt")?;
        if !out.status.success() {
            let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
            let first: Vec<&str> = text.lines().take(12).collect();
            found.push(Message {
                file: file.to_string(),
                line: 0,
                text: format!("rustfmt would change it:\n{}", first.join("\n")),
            });
        }
    }
    Ok(Some(found))
}

/// New warnings only; the tree must be that of the commit.
pub fn kernel_doc(tree: &Tree, commit: &Commit, scratch: &Path) -> Result<Option<Vec<Message>>> {
    let files = touched(tree, commit, &[".c", ".h"]);
    let files: Vec<&str> = files
        .into_iter()
        .filter(|f| super::tree::is_code(f))
        .collect();
    if files.is_empty() {
        return Ok(None);
    }
    // The same files as they were, under the same names.
    let _ = fs::remove_dir_all(scratch);
    let mut old = Vec::new();
    for f in &files {
        if let Some(bytes) = tree.show(0, f)? {
            let path = scratch.join(f);
            fs::create_dir_all(path.parent().unwrap_or(scratch))?;
            fs::write(path, bytes)?;
            old.push(*f);
        }
    }
    let before = run_kernel_doc(&tree.dir, scratch, &old)?;
    let now = run_kernel_doc(&tree.dir, &tree.dir, &files)?;
    let _ = fs::remove_dir_all(scratch);
    Ok(Some(messages::new(&before, &now)))
}

/// Sphinx reads whole directories; what it says of files that the commit does
/// not touch is not counted. The tree must be that of the commit.
pub fn docs(tree: &Tree, commit: &Commit, out: &Path) -> Result<Option<Vec<Message>>> {
    let files = touched(tree, commit, &[".rst"]);
    let dirs: std::collections::BTreeSet<&str> = files
        .iter()
        .filter_map(|f| f.strip_prefix("Documentation/")?.rsplit_once('/'))
        .map(|(dir, _)| dir)
        .collect();
    if dirs.is_empty() {
        return Ok(None);
    }
    fs::create_dir_all(out)?;
    let dirs: Vec<&str> = dirs.into_iter().collect();
    let made = Command::new("make")
        .current_dir(&tree.dir)
        .arg("htmldocs")
        .arg(format!("SPHINXDIRS={}", dirs.join(" ")))
        // Everything is read again, or it would say nothing the second time.
        .arg("SPHINXOPTS=-E")
        .arg(format!("O={}", out.display()))
        .env("PATH", system_first())
        .env("LC_ALL", "C.UTF-8")
        .env_remove("MAKEFLAGS")
        .output()
        .context("cannot run make htmldocs")?;
    let said = String::from_utf8_lossy(&made.stdout) + String::from_utf8_lossy(&made.stderr);
    ensure!(
        made.status.success(),
        "make htmldocs failed:\n{}",
        super::run::failure(&said)
    );
    for f in &files {
        let page = out.join(f.replacen("Documentation/", "Documentation/output/", 1));
        let page = page.with_extension("html");
        ensure!(
            page.is_file(),
            "make htmldocs made no {}:\n{said}",
            page.display()
        );
    }
    let mut found = messages::sphinx(&said, &tree.dir.display().to_string());
    found.retain(|m| files.contains(&m.file.as_str()));
    Ok(Some(found))
}

fn run_kernel_doc(tree: &Path, dir: &Path, files: &[&str]) -> Result<Vec<Message>> {
    if files.is_empty() {
        return Ok(vec![]);
    }
    let out = Command::new("python3")
        .current_dir(dir)
        .arg(tree.join("scripts/kernel-doc"))
        .args(["-none", "-Wall"])
        .args(files)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .context("cannot run scripts/kernel-doc")?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(
        !said.contains("Traceback"),
        "scripts/kernel-doc failed:\n{said}"
    );
    Ok(messages::kernel_doc(&said, &dir.display().to_string()))
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flaws_of_messages() {
        let good = "Subject: x\n\nText.\n\nAssisted-by: LLM\n---\n Signed-off-by: in a diff\n";
        assert_eq!(message_flaws("fuse: x", good), Vec::<String>::new());
        let bad = "Text.\n\nSigned-off-by: Machine <m@m>\n---\n";
        let long = "x".repeat(80);
        assert_eq!(message_flaws(&long, bad).len(), 4);
    }

    #[test]
    fn added_files() {
        let patch = "m\n---\ndiff --git a/x b/x\nindex 1..2\n--- a/x\n\ndiff --git a/y b/y\nnew file mode 100644\n";
        assert_eq!(added(patch), ["y"]);
    }
}
