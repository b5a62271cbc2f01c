// SPDX-License-Identifier: GPL-2.0
//! What is said of the examples. That they survive SIGKILL is tested with a keeper, in the harness.

/// Lines that only one of the two has, by their longest common subsequence.
fn changed(before: &str, after: &str) -> usize {
    let (a, b): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
    let mut common = vec![0_usize; b.len() + 1];
    for line in &a {
        let mut diagonal = 0;
        for (j, other) in b.iter().enumerate() {
            let here = if line == other {
                diagonal + 1
            } else {
                common[j].max(common[j + 1])
            };
            diagonal = std::mem::replace(&mut common[j + 1], here);
        }
    }
    a.len().max(b.len()) - common[b.len()]
}

#[test]
fn lines_that_differ_are_counted() {
    assert_eq!(changed("a\nb\nc", "a\nb\nc"), 0);
    assert_eq!(changed("a\nb\nc", "a\nx\nc\ny"), 2);
}

/// As a diff has it: a line that became another one counts once.
#[test]
fn a_server_is_made_restartable_in_under_30_lines() {
    let before = include_str!("../examples/hello_plain.rs");
    let after = include_str!("../examples/hello.rs");
    let code = |text: &str| {
        let lines = text.lines().map(str::trim);
        let code = lines.filter(|l| !l.is_empty() && !l.starts_with("//"));
        code.map(str::to_owned).collect::<Vec<_>>().join("\n")
    };
    let changed = changed(&code(before), &code(after));
    assert!((1..30).contains(&changed), "{changed} lines");
}
