// SPDX-License-Identifier: GPL-2.0
//! What checkpatch says that is right in general and wrong here, each with its
//! reason. Printed with the result, so that nobody has to take it on trust.

use super::messages::Message;

pub struct Waiver {
    kind: &'static str,
    /// Of the name of the mail, without its number, or of the complaint's text.
    about: fn(&Context) -> bool,
    pub reason: &'static str,
}

/// What a complaint is about.
pub struct Context<'a> {
    /// The patch as text.
    pub patch: &'a str,
    pub message: &'a Message,
    /// Every file that the patch adds is named in MAINTAINERS already.
    pub maintained: bool,
}

impl Context<'_> {
    /// The line complained of.
    fn line(&self) -> &str {
        let n = self.message.line.saturating_sub(1) as usize;
        self.patch.lines().nth(n).unwrap_or_default()
    }

    /// Its file: the last one begun before it.
    fn file(&self) -> &str {
        let n = self.message.line as usize;
        let before = self.patch.lines().take(n);
        before
            .filter_map(|l| l.strip_prefix("+++ b/"))
            .last()
            .unwrap_or_default()
    }
}

pub const WAIVERS: &[Waiver] = &[
    Waiver {
        kind: "FILE_PATH_CHANGES",
        about: |c| c.maintained,
        reason: "every new file lies in a directory that MAINTAINERS has under FUSE FILESYSTEM",
    },
    Waiver {
        kind: "ENOSYS",
        about: |c| {
            c.file()
                .starts_with("tools/testing/selftests/filesystems/fuse/")
        },
        reason: "ENOSYS is how a FUSE server says that it does not know an operation",
    },
    Waiver {
        kind: "VOLATILE",
        about: |c| {
            c.file().starts_with("tools/testing/selftests/")
                && c.line().contains("*(volatile char *)")
        },
        reason: "a test that touches a page of a mapping",
    },
    Waiver {
        kind: "PARENTHESIS_ALIGNMENT",
        about: |c| c.file() == TRACE,
        reason: AS_EVERYWHERE,
    },
    Waiver {
        kind: "OPEN_ENDED_LINE",
        about: |c| c.file() == TRACE,
        reason: AS_EVERYWHERE,
    },
    Waiver {
        kind: "SPACING",
        about: |c| {
            c.file().starts_with("tools/testing/selftests/") && c.line().contains("FIXTURE_DATA(")
        },
        reason: "FIXTURE_DATA(x) of kselftest_harness.h is a type, which checkpatch cannot know",
    },
    Waiver {
        kind: "MACRO_ARG_REUSE",
        about: |c| {
            c.file().starts_with("tools/testing/selftests/")
                && c.line().contains("#define wait_for(cond)")
        },
        reason: "a macro that waits for a condition evaluates it again and again",
    },
    Waiver {
        kind: "UNKNOWN_COMMIT_ID",
        about: |c| LINUX.iter().any(|known| c.line().contains(known)),
        reason: "the tree has no history; the id and its title are those of Linux",
    },
];

/// Commits of Linux that the series names, compared with Linux's own history.
const LINUX: &[&str] = &[
    "760eac73f9f6 (\"fuse: Introduce a new notification type for resend pending requests\")",
    "b1fe686a765e (\"fuse: don't unhash root\")",
];

const TRACE: &str = "fs/fuse/fuse_trace.h";
const AS_EVERYWHERE: &str = "trace events are laid out as everywhere in the kernel";

/// Why a complaint does not count, if it does not.
pub fn waived(kind: &str, context: &Context) -> Option<&'static str> {
    let mut of_kind = WAIVERS.iter().filter(|w| w.kind == kind);
    of_kind.find(|w| (w.about)(context)).map(|w| w.reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCH: &str = "\
+++ b/tools/testing/selftests/filesystems/fuse/x.c
+	reply(-ENOSYS);
+	*(volatile char *)p;
+++ b/fs/fuse/dev.c
+	return -ENOSYS;
+++ b/fs/fuse/fuse_trace.h
+	TP_STRUCT__entry(
+++ b/tools/testing/selftests/filesystems/fuse/y.c
+static int f(FIXTURE_DATA(restart) *self)
+	a *b;
Fixes: b1fe686a765e (\"fuse: don't unhash root\")
Fixes: b1fe686a765e (\"fuse: do unhash root\")
";

    fn ask(kind: &str, line: u32, maintained: bool) -> bool {
        let message = Message {
            file: "p".into(),
            line,
            text: String::new(),
        };
        let context = Context {
            patch: PATCH,
            message: &message,
            maintained,
        };
        waived(kind, &context).is_some()
    }

    #[test]
    fn a_waiver_is_for_its_place_only() {
        assert!(ask("ENOSYS", 2, false));
        assert!(!ask("ENOSYS", 5, false), "the kernel itself");
        assert!(ask("VOLATILE", 3, false) && !ask("VOLATILE", 2, false));
        assert!(ask("FILE_PATH_CHANGES", 1, true) && !ask("FILE_PATH_CHANGES", 1, false));
        assert!(!ask("LONG_LINE", 2, true));
        assert!(ask("OPEN_ENDED_LINE", 7, false) && !ask("OPEN_ENDED_LINE", 5, false));
        assert!(ask("SPACING", 9, false) && !ask("SPACING", 10, false));
        assert!(ask("UNKNOWN_COMMIT_ID", 11, false) && !ask("UNKNOWN_COMMIT_ID", 12, false));
    }
}
