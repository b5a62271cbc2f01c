// SPDX-License-Identifier: GPL-2.0
//! What is left when everybody has ended and the server is idle: nothing.
//!
//! A planned restart tells. The kernel shows every inode that it has and how often it was looked up, and the new server
//! says what of its state was not so (`passthrough/recover.rs`). The kernel may cache files for as long as it likes,
//! but these are known to both. So all of it is zero, with one exception, see [`excused`].

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{ensure, Context, Result};

use super::dim::Dim;
use crate::crash_points::Seen;

/// `passthrough/graveyard.rs`; it is there for as long as the mount is.
const GRAVEYARD: &str = ".fuse-restart-graveyard";

/// What follows each number in the server's line, and what the number is of.
const SAID: [(&str, &str); 6] = [
    (
        " nodes are not known to the kernel any more",
        "nodes that the kernel does not know",
    ),
    (
        " were looked up another number of times",
        "lookup counts that are not the kernel's",
    ),
    (
        OUTCOMES,
        "outcomes in the journal of requests that were answered",
    ),
    (" graves had no node", "graves of files that nobody knows"),
    (
        " handles had none either",
        "handles of files that nobody knows",
    ),
    (
        " handles are in the table",
        "handles although nothing is open",
    ),
];
const OUTCOMES: &str = " outcomes are not owed any more";

/// What there is although there should be nothing.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Rest(Vec<String>);

impl Rest {
    /// Reads what a server said; of several recoveries the last counts.
    ///
    /// # Errors
    /// It did not say all of it.
    pub fn parse(said: &str, excused: u64) -> Result<Rest> {
        let line = said
            .lines()
            .rev()
            .find(|line| line.contains(SAID[0].0))
            .context("the server did not say what it has that the kernel has not")?;
        let mut rest = Rest::default();
        for (phrase, what) in SAID {
            let number = line
                .split_once(phrase)
                .and_then(|(before, _)| before.rsplit(' ').next()?.parse::<u64>().ok());
            let number = number
                .with_context(|| format!("the server did not say how many{phrase}: {line}"))?;
            if phrase == OUTCOMES && number > 0 && excused > 0 {
                if number > excused {
                    rest.0
                        .push(format!("{number} {what} (deaths can have left {excused})"));
                }
            } else if number > 0 {
                rest.0.push(format!("{number} {what}"));
            }
        }
        Ok(rest)
    }

    /// Adds the graves that are left in a backing directory. A file that is cached, and has lost its last name, was
    /// forgotten when it was closed.
    pub fn look_for_graves(&mut self, back: &Path) -> Result<()> {
        let yard = back.join(GRAVEYARD);
        let entries = fs::read_dir(&yard);
        let entries = entries.with_context(|| format!("no graveyard at {}", yard.display()))?;
        let mut graves = Vec::new();
        for entry in entries {
            let entry = entry?;
            let (name, meta) = (entry.file_name(), entry.metadata()?);
            let kind = if meta.is_dir() { "directory" } else { "file" };
            let name = name.to_string_lossy();
            graves.push(format!("{name} (a {kind}, {} links)", meta.nlink()));
        }
        if !graves.is_empty() {
            graves.sort();
            self.0
                .push(format!("{} graves: {}", graves.len(), graves.join(", ")));
        }
        Ok(())
    }

    /// What is wrong, on a line of its own.
    pub fn problem(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| format!("    at rest there are {}", self.0.join("; ")))
    }

    /// # Errors
    /// If there is anything.
    pub fn ensure_nothing(&self) -> Result<()> {
        let problem = self.problem();
        ensure!(problem.is_none(), problem.unwrap_or_default());
        Ok(())
    }
}

/// How many outcomes deaths can have left in the journal for good.
///
/// Between its answer and the moment at which the journal forgets it, an outcome is not owed any more. The next recovery
/// drops it, unless it cannot know: the kernel's report has only the *lowest* request that is owed, and another thread
/// can have died with one that is older. It stays, in nobody's way, until the next recovery, which is the one at rest.
/// With one thread there is none that is older.
pub fn excused(dim: &Dim, seen: &[Seen]) -> u64 {
    if dim.threads == 1 {
        return 0;
    }
    let of = |seen: &Seen| {
        let answered = seen.name.ends_with(".answered");
        // Where another thread was when its last point was this one, nobody knows.
        seen.beside + if answered { seen.killed } else { 0 }
    };
    seen.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `tracing` prints it.
    fn line(numbers: [u64; 6]) -> String {
        let [nodes, lookups, outcomes, graves, orphans, handles] = numbers;
        format!(
            "2026-11-30T00:00:00.000000Z  INFO fuse_restart::serve::passthrough::recover: {nodes} \
             nodes are not known to the kernel any more, {lookups} were looked up another number \
             of times, {outcomes} outcomes are not owed any more, {graves} graves had no node, \
             {orphans} handles had none either, {handles} handles are in the table\n"
        )
    }

    #[test]
    fn each_number_is_read_and_told_of() {
        assert_eq!(Rest::parse(&line([0; 6]), 0).unwrap().problem(), None);
        for (n, (_, what)) in SAID.iter().enumerate() {
            let mut numbers = [0; 6];
            numbers[n] = 30 + n as u64;
            let rest = Rest::parse(&line(numbers), 0).unwrap();
            assert_eq!(rest.0, [format!("{} {what}", 30 + n)]);
            assert!(rest.ensure_nothing().is_err());
        }
        assert_eq!(Rest::parse(&line([1; 6]), 0).unwrap().0.len(), 6);
    }

    #[test]
    fn the_last_recovery_counts() {
        let said = line([1, 2, 3, 4, 5, 6]) + "something else\n" + &line([0; 6]);
        assert_eq!(Rest::parse(&said, 0).unwrap(), Rest::default());
        let said = line([0; 6]) + &line([0, 2, 0, 0, 0, 0]);
        assert_eq!(Rest::parse(&said, 0).unwrap().0.len(), 1);
    }

    #[test]
    fn what_is_not_said_is_not_taken_for_nothing() {
        assert!(Rest::parse("", 0).is_err());
        let whole = line([0; 6]);
        for (phrase, _) in SAID {
            assert!(
                Rest::parse(&whole.replace(phrase, ""), 0).is_err(),
                "{phrase}"
            );
        }
    }

    #[test]
    fn only_outcomes_are_excused_and_no_more_of_them_than_can_be() {
        let outcomes = |n, excused| Rest::parse(&line([0, 0, n, 0, 0, 0]), excused).unwrap();
        assert_eq!(outcomes(2, 2).problem(), None);
        assert!(outcomes(3, 2).problem().is_some() && outcomes(1, 0).problem().is_some());
        assert_eq!(Rest::parse(&line([2; 6]), 9).unwrap().0.len(), 5);

        let seen = |name: &str, killed, beside| Seen {
            name: name.into(),
            reached: 9,
            left: 0,
            killed,
            since_death: 0,
            beside,
        };
        let seen = [
            seen("mkdir.answered", 1, 0),
            seen("mkdir.mkdirat", 1, 0),
            seen("link.reply", 0, 2),
        ];
        assert_eq!(excused(&Dim::find("t4-wt").unwrap(), &seen), 3);
        assert_eq!(excused(&Dim::find("t1-wb").unwrap(), &seen), 0);
        assert_eq!(excused(&Dim::find("c4-wb").unwrap(), &[]), 0);
    }

    #[test]
    fn graves_are_named() {
        let back = tempfile::tempdir().unwrap();
        let mut rest = Rest::default();
        assert!(rest.look_for_graves(back.path()).is_err());
        let yard = back.path().join(GRAVEYARD);
        fs::create_dir(&yard).unwrap();
        rest.look_for_graves(back.path()).unwrap();
        assert_eq!(rest, Rest::default());
        fs::write(yard.join("n000000000000000c"), b"x").unwrap();
        rest.look_for_graves(back.path()).unwrap();
        let problem = rest.problem().unwrap();
        assert!(
            problem.contains("1 graves: n000000000000000c (a file, 1 links)"),
            "{problem}"
        );
    }
}
