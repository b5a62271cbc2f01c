// SPDX-License-Identifier: GPL-2.0
//! Reads what compilers and checkers say, and tells what is new in it: today's
//! tree is not free of warnings either, and line numbers move.

use std::collections::BTreeMap;

/// Something a tool complained of.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// Path in the tree.
    pub file: String,
    pub line: u32,
    pub text: String,
}

impl Message {
    /// The same complaint elsewhere in the file is the same one.
    fn key(&self) -> (&str, String) {
        // A warning may itself name a line, or guess what was meant.
        let text = self.text.split(" (did you mean").next().unwrap_or_default();
        let text = text
            .split_whitespace()
            .map(|w| {
                if w.contains(".c:") || w.contains(".h:") {
                    ""
                } else {
                    w
                }
            })
            .collect::<Vec<_>>()
            .join(" ");
        (&self.file, text)
    }
}

impl std::fmt::Display for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file, self.text),
            n => write!(f, "{}:{n}: {}", self.file, self.text),
        }
    }
}

/// What is in `now` more often than in `before`.
pub fn new(before: &[Message], now: &[Message]) -> Vec<Message> {
    let mut known: BTreeMap<(&str, String), usize> = BTreeMap::new();
    for m in before {
        *known.entry(m.key()).or_default() += 1;
    }
    now.iter()
        .filter(|m| match known.get_mut(&m.key()) {
            Some(n) if *n > 0 => {
                *n -= 1;
                false
            }
            _ => true,
        })
        .cloned()
        .collect()
}

/// clang, sparse, objtool: `file:line[:column]: warning: text`.
pub fn compiler(log: &str, tree: &str) -> Vec<Message> {
    let mut found: Vec<Message> = log.lines().filter_map(|l| compiler_line(l, tree)).collect();
    // A header is compiled with each file that includes it.
    dedup(&mut found);
    found
}

fn compiler_line(line: &str, tree: &str) -> Option<Message> {
    let (place, text) = [": warning: ", ": error: ", ": fatal error: "]
        .iter()
        .find_map(|sep| line.split_once(sep))?;
    let kind = &line[place.len() + 2..line.len() - text.len()];
    let mut parts = place.split(':');
    let file = parts.next()?;
    let number = parts.next().and_then(|n| n.parse().ok()).unwrap_or(0);
    Some(Message {
        file: relative(file, tree),
        line: number,
        text: format!("{kind}{text}"),
    })
}

/// rustc, clippy, rustdoc, in their long form: a headline, then ` --> place`.
pub fn rust(log: &str, tree: &str) -> Vec<Message> {
    let mut found = Vec::new();
    let mut headline: Option<&str> = None;
    for line in log.lines() {
        let is_head = ["warning: ", "error: ", "error["]
            .iter()
            .any(|p| line.starts_with(p));
        if is_head {
            // One that names no place is a summary, or a matter of its own.
            found.extend(headline.take().and_then(placeless));
            headline = Some(line);
        } else if let (Some(place), Some(head)) = (line.trim_start().strip_prefix("--> "), headline)
        {
            let mut parts = place.split(':');
            found.push(Message {
                file: relative(parts.next().unwrap_or_default(), tree),
                line: parts.next().and_then(|n| n.parse().ok()).unwrap_or(0),
                text: head.to_string(),
            });
            headline = None;
        }
    }
    found.extend(headline.and_then(placeless));
    dedup(&mut found);
    found
}

fn placeless(head: &str) -> Option<Message> {
    let summary = head.contains(" emitted") || head.contains("aborting due to");
    (!summary).then(|| Message {
        file: "rust".into(),
        line: 0,
        text: head.to_string(),
    })
}

/// `Warning: file:line text`.
pub fn kernel_doc(log: &str, tree: &str) -> Vec<Message> {
    log.lines()
        .filter_map(|l| {
            let rest = ["Warning: ", "WARNING: ", "Error: ", "ERROR: "]
                .iter()
                .find_map(|p| l.strip_prefix(p))?;
            let (place, text) = rest.split_once(' ').unwrap_or((rest, ""));
            let (file, line) = place.split_once(':').unwrap_or((place, "0"));
            Some(Message {
                file: relative(file, tree),
                line: line.trim_end_matches(':').parse().unwrap_or(0),
                text: text.to_string(),
            })
        })
        .collect()
}

/// `file:line: WARNING: text`.
pub fn sphinx(log: &str, tree: &str) -> Vec<Message> {
    let mut found: Vec<Message> = log
        .lines()
        .filter_map(|l| {
            let (place, text) = [": WARNING: ", ": ERROR: ", ": CRITICAL: "]
                .iter()
                .find_map(|s| l.split_once(s))?;
            let (file, line) = place.rsplit_once(':').unwrap_or((place, ""));
            Some(Message {
                file: relative(file, tree),
                line: line.parse().unwrap_or(0),
                text: text.to_string(),
            })
        })
        .collect();
    dedup(&mut found);
    found
}

/// `TYPE` of each complaint of `checkpatch.pl --show-types --terse`:
/// `patch:line: WARNING:TYPE: text`.
pub fn checkpatch(log: &str) -> Vec<(String, Message)> {
    log.lines()
        .filter_map(|l| {
            let (place, rest) = [": ERROR:", ": WARNING:", ": CHECK:"]
                .iter()
                .find_map(|s| l.split_once(s))?;
            let (kind, text) = rest.split_once(": ").unwrap_or((rest, ""));
            let (file, line) = place.rsplit_once(':').unwrap_or((place, "0"));
            let name = file.rsplit('/').next().unwrap_or(file);
            Some((
                kind.to_string(),
                Message {
                    file: name.to_string(),
                    line: line.parse().unwrap_or(0),
                    text: format!("{kind}: {text}"),
                },
            ))
        })
        .collect()
}

fn dedup(found: &mut Vec<Message>) {
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|m| seen.insert((m.file.clone(), m.line, m.text.clone())));
}

/// As the tree calls it: tools name files from where they happen to run.
fn relative(file: &str, tree: &str) -> String {
    let file = file.strip_prefix(tree).unwrap_or(file);
    let file = file.trim_start_matches('/');
    let mut rest = file;
    while let Some(r) = rest.strip_prefix("../").or_else(|| rest.strip_prefix("./")) {
        rest = r;
    }
    rest.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn m(file: &str, line: u32, text: &str) -> Message {
        Message {
            file: file.into(),
            line,
            text: text.into(),
        }
    }

    #[test]
    fn what_moved_is_not_new_but_what_came_twice_is() {
        let before = [m("a.c", 10, "warning: x"), m("a.c", 20, "warning: y")];
        let now = [
            m("a.c", 15, "warning: x"),
            m("a.c", 99, "warning: x"),
            m("b.c", 10, "warning: x"),
        ];
        assert_eq!(new(&before, &now), now[1..]);
        let guess = [m("a.c", 1, "no 'x' (did you mean 'y', 'z')")];
        assert_eq!(new(&[m("a.c", 1, "no 'x' (did you mean 'y')")], &guess), []);
        assert_eq!(new(&before, &before), []);
        assert_eq!(new(&[], &before), before);
    }

    #[test]
    fn compilers() {
        let log = "\
  CC      fs/fuse/dev.o
../fs/fuse/dev.c:12:3: warning: unused variable 'x' [-Wunused-variable]
   12 |   int x;
/t/linux/fs/fuse/dir.c:7:1: error: expected ';'
/t/linux/include/linux/fs.h:7:1: warning: in a header
/t/linux/include/linux/fs.h:7:1: warning: in a header
fs/fuse/fuse.o: warning: objtool: f() falls through
1 warning generated.
";
        assert_eq!(
            compiler(log, "/t/linux"),
            [
                m(
                    "fs/fuse/dev.c",
                    12,
                    "warning: unused variable 'x' [-Wunused-variable]"
                ),
                m("fs/fuse/dir.c", 7, "error: expected ';'"),
                m("include/linux/fs.h", 7, "warning: in a header"),
                m("fs/fuse/fuse.o", 0, "warning: objtool: f() falls through"),
            ]
        );
    }

    #[test]
    fn rust_headlines_find_their_places() {
        let log = "\
warning: this `if` can be collapsed
  --> fs/fuse/restart/engine.rs:10:5
   |
10 |     if a {
warning: unused
   --> /t/linux/rust/kernel/x.rs:1:1
error[E0425]: cannot find value `y` in this scope
 --> fs/fuse/restart/conn.rs:3:4
error: no place at all
warning: 3 warnings emitted

error: aborting due to 1 previous error
";
        assert_eq!(
            rust(log, "/t/linux"),
            [
                m(
                    "fs/fuse/restart/engine.rs",
                    10,
                    "warning: this `if` can be collapsed"
                ),
                m("rust/kernel/x.rs", 1, "warning: unused"),
                m(
                    "fs/fuse/restart/conn.rs",
                    3,
                    "error[E0425]: cannot find value `y` in this scope"
                ),
                m("rust", 0, "error: no place at all"),
            ]
        );
    }

    #[test]
    fn kernel_doc_and_checkpatch() {
        assert_eq!(
            kernel_doc(
                "Warning: ./fs/fuse/dev.c:3 No description found for return value of 'f'\nother\n",
                "/t"
            ),
            [m(
                "fs/fuse/dev.c",
                3,
                "No description found for return value of 'f'"
            )]
        );
        assert_eq!(
            sphinx("WARNING: dot(1) not found\n/t/Documentation/a.rst:40: WARNING: Title underline too short.\n", "/t"),
            [m("Documentation/a.rst", 40, "Title underline too short.")]
        );
        let (kind, found) = checkpatch(
            "/o/0004-x.patch:24: WARNING:COMMIT_LOG_LONG_LINE: Prefer a maximum\ntotal: 0 errors\n",
        )
        .remove(0);
        assert_eq!(kind, "COMMIT_LOG_LONG_LINE");
        assert_eq!(
            found,
            m("0004-x.patch", 24, "COMMIT_LOG_LONG_LINE: Prefer a maximum")
        );
    }
}
