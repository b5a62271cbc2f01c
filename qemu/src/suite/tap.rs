// SPDX-License-Identifier: GPL-2.0
//! What a kernel selftest says: TAP as `kselftest.h` and `kselftest_harness.h` write it.

use anyhow::{bail, ensure, Context, Result};

/// The exit status of a test that was skipped as a whole (`KSFT_SKIP`).
const SKIPPED: i32 = 4;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub passed: u32,
    pub skipped: u32,
    /// The lines that begin with `not ok`.
    pub failures: Vec<String>,
}

/// Reads what one program wrote, which ended with `status`. An error is a program that did not tell all of its story:
/// results are missing, or contradict its status.
pub fn parse(text: &str, status: i32) -> Result<Counts> {
    let mut counts = Counts::default();
    let mut plan = None;
    for line in text.lines() {
        let rest = if let Some(rest) = line.strip_prefix("ok ") {
            rest
        } else if line.starts_with("not ok ") {
            counts.failures.push(line.to_owned());
            continue;
        } else if let Some(numbers) = line.strip_prefix("1..") {
            ensure!(plan.is_none(), "a second plan: {line}");
            let number = numbers.split(' ').next().unwrap_or_default();
            let n: u32 = number.parse().with_context(|| line.to_owned())?;
            if n == 0 {
                counts.skipped += 1;
            }
            plan = Some(n.max(counts.skipped));
            continue;
        } else if line.starts_with("Bail out!") {
            bail!("{line}");
        } else {
            continue;
        };
        match rest.split_once("# ") {
            Some((_, how)) if how.starts_with("SKIP") => counts.skipped += 1,
            _ => counts.passed += 1,
        }
    }
    let failed = counts.failures.len() as u32;
    let plan = plan.with_context(|| format!("no plan (1..N), status {status}"))?;
    let told = counts.passed + counts.skipped + failed;
    ensure!(
        told == plan,
        "{told} results of {plan} planned, status {status}"
    );
    match status {
        0 => ensure!(failed == 0, "status 0 with {failed} failures"),
        SKIPPED => ensure!(counts.passed + failed == 0, "skipped, and {told} results"),
        _ => ensure!(failed > 0, "status {status} without a failure"),
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "TAP version 13\n1..3\n# Starting 3 tests from 1 test cases.\n#  RUN           f.a ...\n\
        #            OK  f.a\nok 1 f.a\n#      SKIP      no not ok here\nok 2 f.b # SKIP no not ok here\nok 3 f.c # XFAIL late\n\
        # PASSED: 3 / 3 tests passed.\n# Totals: pass:2 fail:0 xfail:0 xpass:0 skip:1 error:0\n";

    #[test]
    fn results_are_counted_and_comments_are_not() {
        let counts = parse(GOOD, 0).unwrap();
        assert_eq!((counts.passed, counts.skipped), (2, 1));
        assert_eq!(counts.failures, Vec::<String>::new());
    }

    #[test]
    fn not_ok_is_a_failure_with_its_line() {
        let text = GOOD.replace("ok 1 f.a", "not ok 1 f.a # SKIP not really");
        let counts = parse(&text, 1).unwrap();
        assert_eq!((counts.passed, counts.skipped), (1, 1));
        assert_eq!(counts.failures, ["not ok 1 f.a # SKIP not really"]);
        assert!(parse(&text, 0).is_err(), "a program that hides its failure");
    }

    #[test]
    fn half_a_story_is_none() {
        let cut = GOOD.split("ok 3").next().unwrap();
        assert!(parse(cut, 0).is_err());
        assert!(parse(cut, 134).is_err());
        assert!(parse(GOOD, 139).is_err(), "it died after the last result");
        assert!(parse("", 0).is_err());
        assert!(parse("ok 1 a\n", 0).is_err(), "no plan");
        assert!(parse("1..1\nok 1 a\n1..1\n", 0).is_err());
        assert!(parse("1..1\nBail out! no memory\nok 1 a\n", 0).is_err());
        assert!(parse("1..2\nok 1 a\n", 0).is_err());
        assert!(parse("1..1\nok 1 a\nok 2 b\n", 0).is_err());
    }

    #[test]
    fn skipped_as_a_whole() {
        let counts = parse("TAP version 13\n1..0 # SKIP no fuse\n", 4).unwrap();
        assert_eq!((counts.passed, counts.skipped), (0, 1));
        assert!(parse("1..1\nok 1 a\n", 4).is_err());
    }
}
