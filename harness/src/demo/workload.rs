// SPDX-License-Identifier: GPL-2.0
//! The commands of the workload. Ordinary programs, none of which knows anything of restarts.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{bail, Context, Result};

use super::watchdog::Watchdog;

/// One command, as the report shows it.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Step {
    pub name: String,
    pub ok: bool,
    pub seconds: f64,
    /// What it said, if it failed.
    pub detail: String,
}

/// The tree's content as `sha256sum` sees it, and its structure (type, mode, size, link target) as `find` does.
const HASH: &str = "find . -path ./.git -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum && \
                    find . -path ./.git -prune -o ! -path . -printf '%y %m %P %l\\n' | LC_ALL=C sort";

pub struct Workload<'a> {
    pub dog: &'a Watchdog,
    /// Where the tree comes from.
    pub source: PathBuf,
    /// Where it goes, on the mount.
    pub tree: PathBuf,
    /// Outside the mount, for what the commands say.
    pub scratch: PathBuf,
    pub steps: Vec<Step>,
}

impl Workload<'_> {
    /// Copies, commits, checks. False once a command has failed.
    pub fn run(&mut self) -> Result<bool> {
        let copy = format!(
            "tar -C {} -cf - . | tar -C {} -xpf -",
            quote(&self.source),
            quote(&self.tree)
        );
        let above = self.scratch.clone();
        let tree = self.tree.clone();
        let reference = self.hash(&self.source.clone(), "hash of the source")?;
        Ok(reference
            && self.shell("mkdir", &above, &format!("mkdir {}", quote(&tree)))?
            && self.shell("tar", &above, &copy)?
            && self.shell("git init", &tree, "git init --quiet .")?
            && self.shell("git add", &tree, "git add --all --force .")?
            && self.shell(
                "git commit",
                &tree,
                "git commit --quiet --message 'The whole tree'",
            )?
            && self.check()?)
    }

    /// Reads everything back.
    pub fn check(&mut self) -> Result<bool> {
        let tree = self.tree.clone();
        Ok(self.hash(&tree, "read back by hash")?
            && self.shell("git fsck", &tree, "git fsck --strict --full 2>&1")?
            && self.shell("git status", &tree, "test -z \"$(git status --porcelain)\"")?)
    }

    /// Hashes a tree; the first one is what the others are compared with.
    fn hash(&mut self, dir: &Path, name: &str) -> Result<bool> {
        let reference = self.scratch.join("reference.sha256");
        let output = if reference.exists() {
            self.scratch.join("readback.sha256")
        } else {
            reference.clone()
        };
        let ok = self.shell(name, dir, &format!("{{ {HASH}; }} > {}", quote(&output)))?;
        if ok && output != reference {
            let difference = first_difference(
                &fs::read_to_string(&reference)?,
                &fs::read_to_string(&output)?,
            );
            if let (Some(difference), Some(step)) = (difference, self.steps.last_mut()) {
                step.ok = false;
                step.detail = format!("the tree differs from its source: {difference}");
                return Ok(false);
            }
        }
        Ok(ok)
    }

    fn shell(&mut self, name: &str, dir: &Path, script: &str) -> Result<bool> {
        let said = self.scratch.join("said");
        let start = Instant::now();
        let log = File::create(&said)?;
        let mut command = Command::new("bash");
        command
            .args(["-o", "pipefail", "-c", script])
            .current_dir(dir);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        // A repository that depends on nobody's configuration, and no work in the background.
        let person = [
            ("GIT_AUTHOR_NAME", "demo"),
            ("GIT_AUTHOR_EMAIL", "demo@localhost"),
        ];
        let committer = [
            ("GIT_COMMITTER_NAME", "demo"),
            ("GIT_COMMITTER_EMAIL", "demo@localhost"),
        ];
        command
            .envs(person)
            .envs(committer)
            .env("HOME", &self.scratch)
            .env("GIT_CONFIG_NOSYSTEM", "1");
        command.env("GIT_CONFIG_COUNT", "2");
        command
            .env("GIT_CONFIG_KEY_0", "gc.auto")
            .env("GIT_CONFIG_VALUE_0", "0");
        command
            .env("GIT_CONFIG_KEY_1", "core.compression")
            .env("GIT_CONFIG_VALUE_1", "1");
        command.process_group(0);
        let mut child = command.spawn().context("starting bash")?;
        self.dog.command(Some(child.id() as i32));
        let status = child.wait()?;
        let in_time = self.dog.command(None);
        let mut text = String::new();
        let _ = File::open(&said)?.take(2000).read_to_string(&mut text);
        if !in_time {
            // Ended by the cut, so its failure says nothing.
            println!("  {name:<20} cut short");
            bail!("{}", self.dog.why_cut().unwrap_or_default());
        }
        let ok = status.success();
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "  {name:<20} {} {seconds:6.1} s",
            if ok { "ok    " } else { "FAILED" }
        );
        let detail = if ok {
            String::new()
        } else {
            format!("{status}: {}", text.trim())
        };
        self.steps.push(Step {
            name: name.to_owned(),
            ok,
            seconds,
            detail,
        });
        Ok(ok)
    }
}

fn quote(path: &Path) -> String {
    let text = path.to_string_lossy();
    format!("'{}'", text.replace('\'', "'\\''"))
}

fn first_difference(a: &str, b: &str) -> Option<String> {
    let (mut left, mut right) = (a.lines(), b.lines());
    loop {
        match (left.next(), right.next()) {
            (None, None) => return None,
            (x, y) if x == y => {}
            (x, y) => {
                return Some(format!(
                    "expected {:?}, found {:?}",
                    x.unwrap_or("nothing"),
                    y.unwrap_or("nothing")
                ))
            }
        }
    }
}

/// The programs that the workload needs.
pub fn check_programs() -> Result<()> {
    let missing: Vec<_> = ["bash", "tar", "git", "find", "sort", "xargs", "sha256sum"]
        .into_iter()
        .filter(|p| !in_path(OsStr::new(p)))
        .collect();
    if !missing.is_empty() {
        bail!(
            "the workload needs {}; install it and try again",
            missing.join(", ")
        );
    }
    Ok(())
}

fn in_path(program: &OsStr) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn trees(dir: &Path) -> (PathBuf, PathBuf) {
        let source = dir.join("it's a source");
        fs::create_dir_all(source.join("sub")).unwrap();
        fs::write(source.join("a file"), "content").unwrap();
        fs::write(source.join("sub/.gitignore"), "*\n").unwrap();
        (source, dir.join("tree"))
    }

    #[test]
    fn it_runs_on_any_file_system_and_sees_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let (source, tree) = trees(dir.path());
        let scratch = dir.path().join("scratch");
        fs::create_dir(&scratch).unwrap();
        let dog = Watchdog::start(Duration::from_secs(100), "/no/such/mount".into());
        let mut workload = Workload {
            dog: &dog,
            source,
            tree: tree.clone(),
            scratch,
            steps: Vec::new(),
        };
        assert!(workload.run().unwrap(), "{:?}", workload.steps);
        assert!(workload.check().unwrap());

        fs::write(tree.join("a file"), "CONTENT").unwrap();
        assert!(!workload.check().unwrap(), "a changed byte");
        assert!(workload.steps.last().unwrap().detail.contains("differs"));
        fs::write(tree.join("a file"), "content").unwrap();
        assert!(workload.check().unwrap());

        fs::create_dir(tree.join("empty")).unwrap();
        assert!(!workload.check().unwrap(), "a directory too many");
        fs::remove_dir(tree.join("empty")).unwrap();

        let objects = tree.join(".git/objects");
        let pack = fs::read_dir(&objects)
            .unwrap()
            .flatten()
            .find(|d| d.file_name().len() == 2)
            .unwrap();
        let object = fs::read_dir(pack.path())
            .unwrap()
            .flatten()
            .next()
            .unwrap()
            .path();
        fs::remove_file(object).unwrap();
        assert!(!workload.check().unwrap(), "a lost object");
        assert_eq!(workload.steps.last().unwrap().name, "git fsck");
    }
}
