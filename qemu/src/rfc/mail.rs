// SPDX-License-Identifier: GPL-2.0
//! Who would get it, and what mail would be made of it. Nothing here can send:
//! git is told only to rehearse, has nobody's configuration, and the program
//! that it would hand the mail to is false(1).

use super::tree::{command, Tree};
use anyhow::{ensure, Context, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A reserved domain: it cannot exist.
pub const SENDER: &str = "Whoever Sends It <sender@example.invalid>";

/// Lists that are meant to see the series whatever files it touches.
const LISTS: &[&str] = &["linux-fsdevel@vger.kernel.org"];

/// Address to the roles in which it was named.
pub type Recipients = BTreeMap<String, String>;

pub fn get_maintainer(tree: &Path, args: &[&str]) -> Result<String> {
    let out = Command::new("perl")
        .current_dir(tree)
        .args(["scripts/get_maintainer.pl", "--no-git", "--no-git-fallback"])
        .args(args)
        .env("LC_ALL", "C")
        .output()
        .context("cannot run scripts/get_maintainer.pl")?;
    ensure!(
        out.status.success(),
        "get_maintainer.pl: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

pub fn recipients(tree: &Tree) -> Result<Recipients> {
    let patches: Vec<String> = tree
        .commits
        .iter()
        .map(|c| c.patch.display().to_string())
        .collect();
    let mut args = vec!["--no-fixes"];
    args.extend(patches.iter().map(String::as_str));
    let mut found = parse_recipients(&get_maintainer(&tree.dir, &args)?);
    for list in LISTS {
        found
            .entry(list.to_string())
            .or_insert_with(|| "open list: where this was discussed".into());
    }
    Ok(found)
}

/// `Name <address> (role:SUBSYSTEM)` or `address (role)`.
fn parse_recipients(text: &str) -> Recipients {
    text.lines()
        .filter(|l| l.contains('@'))
        .map(|l| match l.split_once(" (") {
            Some((who, role)) => (who.trim(), role.trim_end_matches(')')),
            None => (l.trim(), ""),
        })
        .map(|(who, role)| (who.to_string(), role.to_string()))
        .collect()
}

/// Rehearses the mailing of the cover letter and all patches; gives git's words.
pub fn rehearse(tree: &Tree, cover: &Path, recipients: &Recipients) -> Result<Rehearsal> {
    let mut mails = vec![cover.to_path_buf()];
    mails.extend(tree.commits.iter().map(|c| c.patch.clone()));
    let out = rehearsal(&tree.outgoing, recipients, &mails).output()?;
    let text = String::from_utf8_lossy(&out.stdout) + String::from_utf8_lossy(&out.stderr);
    ensure!(
        out.status.success(),
        "git send-email --dry-run failed:\n{text}"
    );
    let rehearsal = parse_rehearsal(&text);
    ensure!(
        rehearsal.mails == mails.len(),
        "git would have made {} mails of {} files:\n{text}",
        rehearsal.mails,
        mails.len()
    );
    Ok(rehearsal)
}

fn rehearsal(dir: &Path, recipients: &Recipients, mails: &[PathBuf]) -> Command {
    let mut c = command(dir);
    // The user's ~/.gitconfig may name his provider; HOME is not it.
    c.env("HOME", dir)
        .env_remove("XDG_CONFIG_HOME")
        .args(["send-email", "--dry-run"])
        .args([
            "--sendmail-cmd=false",
            "--confirm=never",
            "--suppress-cc=all",
        ])
        .args(["--thread", "--no-chain-reply-to", "--8bit-encoding=UTF-8"])
        .args(["--no-format-patch", "--no-validate"])
        .arg(format!("--from={SENDER}"));
    for (who, role) in recipients {
        let list = role.contains("list");
        c.arg(format!("--{}={who}", if list { "cc" } else { "to" }));
    }
    c.args(mails);
    c
}

#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Rehearsal {
    pub mails: usize,
    pub subjects: Vec<String>,
}

fn parse_rehearsal(text: &str) -> Rehearsal {
    Rehearsal {
        mails: text.lines().filter(|l| l.starts_with("Dry-OK")).count()
            + text.lines().filter(|l| l.starts_with("Dry-Sent")).count(),
        subjects: text
            .lines()
            .filter_map(|l| l.strip_prefix("Subject: "))
            .map(String::from)
            .collect(),
    }
}

/// What no program may do.
pub fn what_is_left(dir: &Path) -> String {
    format!(
        "Nothing was sent, and nothing here can send. What is left is for a person:\n\
         \x20 1. Read every patch in {} and the cover letter; be ready to defend each line.\n\
         \x20 2. Apply them to the tree you mean to send them for (Documentation/submitting.md), run this again there.\n\
         \x20 3. Add your Signed-off-by: git rebase --exec 'git commit --amend --no-edit --reset-author --signoff' BASE\n\
         \x20 4. Complete the cover letter (numbers, links), git format-patch --rfc --cover-letter, look at every mail.\n\
         \x20 5. git send-email to the recipients above, with --dry-run first.",
        dir.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipients_keep_their_roles() {
        let r = parse_recipients(
            "A B <a@b.c> (supporter:FUSE FILESYSTEM)\nl@lists.linux.dev (open list:FUSE)\nnoise\n",
        );
        assert_eq!(r.len(), 2);
        assert_eq!(r["A B <a@b.c>"], "supporter:FUSE FILESYSTEM");
    }

    #[test]
    fn it_can_only_rehearse() {
        let to = parse_recipients("A <a@b.c> (maintainer:X)\nl@lists.linux.dev (open list:X)\n");
        let c = rehearsal(Path::new("/tmp"), &to, &["/tmp/0001-x.patch".into()]);
        let args: Vec<_> = c.get_args().map(|a| a.to_string_lossy()).collect();
        assert_eq!(
            args[..3],
            ["send-email", "--dry-run", "--sendmail-cmd=false"]
        );
        assert!(args.iter().any(|a| a == "--to=A <a@b.c>"));
        assert!(args.iter().any(|a| a == "--cc=l@lists.linux.dev"));
        let env: BTreeMap<_, _> = c.get_envs().collect();
        let value = |k: &str| env[std::ffi::OsStr::new(k)].unwrap().to_str().unwrap();
        assert_eq!(value("GIT_CONFIG_GLOBAL"), "/dev/null");
        assert_eq!(value("HOME"), "/tmp");
    }

    #[test]
    fn rehearsals_are_counted() {
        let r = parse_rehearsal("Dry-OK. Log says:\nSubject: a\n\nDry-OK. Log says:\nSubject: b\n");
        assert_eq!((r.mails, r.subjects.len()), (2, 2));
    }
}
