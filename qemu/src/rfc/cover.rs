// SPDX-License-Identifier: GPL-2.0
//! The cover letter: is what it lists still what there is, and does it speak of
//! all that it has to? Whether it does so well is for its reader.

use super::tree::{git, Tree};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};

/// What is asked for, and a word that cannot be avoided in saying it.
const TOPICS: &[(&str, &str)] = &[
    ("why not outside the kernel", "Why in the kernel"),
    ("why Rust", "Why Rust"),
    ("what is not done yet", "Not done"),
    ("the numbers", "Numbers"),
    ("credit for the idea (Darrick J. Wong)", "Wong"),
    ("credit for the thread (Luis Henriques)", "Henriques"),
    (
        "nodeids that are pointers, lookup counts (Schubert)",
        "Schubert",
    ),
    ("a storm, lazily, identity (Goldstein)", "Goldstein"),
    ("denial of service, s_inodes (Chinner)", "Chinner"),
    ("what can be outside of the kernel (Szeredi)", "Szeredi"),
    ("the fd store (Brauner)", "Brauner"),
    ("semantics (Ts'o)", "Ts'o"),
    ("a trailer", "\nAssisted-by: LLM"),
    (
        "a link to the thread, by its message id",
        "Link: https://lore.kernel.org/",
    ),
];

pub fn path(patches: &Path) -> PathBuf {
    patches.join("0000-cover-letter.patch")
}

/// What is wrong with it, a line each.
pub fn check(tree: &Tree, cover: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(cover).with_context(|| cover.display().to_string())?;
    let range = match tree.commits.last() {
        Some(c) => format!("{}..{}", tree.base, c.id),
        None => return Ok(vec![]),
    };
    let stat = git(&tree.dir, &["diff", "--shortstat", &range])?;
    let subjects: Vec<&str> = tree.commits.iter().map(|c| c.subject.as_str()).collect();
    Ok(flaws(&text, &subjects, stat.trim()))
}

fn flaws(text: &str, subjects: &[&str], stat: &str) -> Vec<String> {
    let mut flaws = Vec::new();
    let n = subjects.len();
    let subject = text.lines().find(|l| l.starts_with("Subject: "));
    if !subject.is_some_and(|s| {
        s.contains(&format!("PATCH 00/{n}]")) || s.contains(&format!("PATCH 0/{n}]"))
    }) {
        flaws.push(format!(
            "its subject is not that of {n} patches: {}",
            subject.unwrap_or("none")
        ));
    }
    let mut rest = text;
    for s in subjects {
        match rest.split_once(&format!("      {s}\n")) {
            Some((_, after)) => rest = after,
            None => flaws.push(format!("its list of patches lacks, or has elsewhere: {s}")),
        }
    }
    if !text.lines().any(|l| l.trim() == stat) {
        let has = text.lines().find(|l| l.contains(" files changed, "));
        flaws.push(format!(
            "its diffstat says \"{}\", the series \"{stat}\"",
            has.unwrap_or("nothing").trim()
        ));
    }
    for (what, word) in TOPICS {
        if !text.contains(word) {
            flaws.push(format!(
                "it does not speak of: {what} (no {:?})",
                word.trim()
            ));
        }
    }
    if text.contains("Signed-off-by:") {
        flaws.push("Signed-off-by: only the person who sends it may add that".into());
    }
    for (i, l) in text.lines().enumerate() {
        let prose = !l.contains("://")
            && !l.contains(" | ")
            && !l.starts_with("      ")
            && !l.starts_with(" create mode");
        if prose && l.chars().count() > 75 {
            flaws.push(format!("line {} is longer than 75 characters", i + 1));
        }
    }
    flaws
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> String {
        let mut text = String::from("Subject: [RFC PATCH 00/2] x\n\n");
        for (_, word) in TOPICS {
            text += word;
            text.push('\n');
        }
        text + "\nteam (2):\n      one\n      two\n\n 3 files changed, 4 insertions(+)\n"
    }

    #[test]
    fn a_cover_letter_that_is_up_to_date() {
        let flaws = flaws(&good(), &["one", "two"], "3 files changed, 4 insertions(+)");
        assert_eq!(flaws, Vec::<String>::new());
    }

    #[test]
    fn what_is_stale_or_missing_is_named() {
        let stat = "3 files changed, 4 insertions(+)";
        let of = |text: &str, subjects: &[&str], stat: &str| flaws(text, subjects, stat).join("\n");
        assert!(of(&good(), &["two", "one"], stat).contains("elsewhere: one"));
        assert!(of(&good(), &["one"], stat).contains("not that of 1 patches"));
        assert!(of(&good(), &["one", "two"], "9 files changed").contains("its diffstat"));
        for (what, word) in TOPICS {
            let without = good().replace(word, "");
            assert!(of(&without, &["one", "two"], stat).contains(what), "{what}");
        }
        let long = good() + &"x".repeat(76);
        assert!(of(&long, &["one", "two"], stat).contains("longer than 75"));
    }
}
