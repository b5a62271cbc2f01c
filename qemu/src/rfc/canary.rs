// SPDX-License-Identifier: GPL-2.0
//! A check that finds nothing may be a check that cannot find anything: another
//! version of a tool, a flag that is ignored, a message of a form that is not
//! read. `--canary` puts a commit on top of the series that each of them must
//! object to.

use super::tree::{command, git};
use anyhow::{ensure, Context, Result};
use std::fs;
use std::path::Path;

/// Undefined symbol: each build, and the boot. A variable that is set and never
/// used: W=1. A pointer to user space that is followed: sparse. A parameter that
/// is not described: kernel-doc. No blank before the parenthesis: checkpatch.
const C: &str = "
int fuse_canary_missing(int n);

/**
 * fuse_canary() - Not one check may let this pass
 * @nothing: there is no such parameter
 */
int fuse_canary(const int __user *user);
int fuse_canary(const int __user *user)
{
	int set;

	if(user)
		set = 1;

	return fuse_canary_missing(*user);
}
";

/// A comparison with true: clippy. A link that leads nowhere: rustdoc. Its
/// layout: rustfmt.
const RUST: &str = "
/// See [`NoSuchThing`].
pub(crate) fn canary( yes :bool)->bool { if yes == true { return false; }
    true }
";

/// A title that is longer than its line: Sphinx.
const DOC: &str = "
A title for the canary
======
";

const MESSAGE: &str = "canary\n\nSigned-off-by: Nobody <nobody@localhost>\n";

const FILES: [(&str, &str); 3] = [
    ("fs/fuse/dev.c", C),
    ("fs/fuse/restart/restart.rs", RUST),
    ("Documentation/filesystems/fuse/fuse-restart.rst", DOC),
];

/// Commits it in a worktree that has the series; gives the commit.
pub fn commit(am: &Path) -> Result<String> {
    for (file, text) in FILES {
        let path = am.join(file);
        let old = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        fs::write(&path, old + text)?;
    }
    let out = command(am)
        .args(["commit", "-q", "--no-verify", "-a", "-m", MESSAGE])
        // The same canary is the same commit.
        .env("GIT_AUTHOR_DATE", "2026-11-22T00:00:00Z")
        .env("GIT_COMMITTER_DATE", "2026-11-22T00:00:00Z")
        .output()?;
    ensure!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(git(am, &["rev-parse", "HEAD"])?.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_put_behind_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        for (f, _) in FILES {
            let path = dir.path().join(f);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "before\n").unwrap();
        }
        git(dir.path(), &["init", "-q"]).unwrap();
        git(dir.path(), &["add", "."]).unwrap();
        git(dir.path(), &["commit", "-q", "-m", "x"]).unwrap();
        let id = commit(dir.path()).unwrap();
        let shown = git(dir.path(), &["show", &format!("{id}:fs/fuse/dev.c")]).unwrap();
        assert!(shown.starts_with("before\n") && shown.contains("fuse_canary_missing"));
    }
}
