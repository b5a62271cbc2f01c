// SPDX-License-Identifier: GPL-2.0
//! Kernel configuration: fragments merged over allnoconfig, and then a look
//! whether every symbol that was asked for really is what was asked for.
//! Kconfig drops a symbol whose dependencies are missing without a word.

use anyhow::{bail, Result};
use std::collections::BTreeMap;

/// Symbol to value; `None` is "is not set".
pub type Symbols = BTreeMap<String, Option<String>>;

/// Reads a fragment or a `.config`.
pub fn parse(text: &str) -> Symbols {
    let mut symbols = Symbols::new();
    for line in text.lines().map(str::trim) {
        if let Some(off) = line
            .strip_prefix("# ")
            .and_then(|l| l.strip_suffix(" is not set"))
        {
            symbols.insert(off.to_string(), None);
        } else if let Some((symbol, value)) = line.split_once('=') {
            if symbol.starts_with("CONFIG_") {
                let value = (value != "n").then(|| value.to_string());
                symbols.insert(symbol.to_string(), value);
            }
        }
    }
    symbols
}

/// Later fragments win.
pub fn merge(fragments: &[String]) -> Symbols {
    fragments.iter().flat_map(|f| parse(f)).collect()
}

/// As a file for `KCONFIG_ALLCONFIG`.
pub fn render(symbols: &Symbols) -> String {
    symbols
        .iter()
        .map(|(s, v)| match v {
            Some(v) => format!("{s}={v}\n"),
            None => format!("# {s} is not set\n"),
        })
        .collect()
}

/// Fails with all symbols that are not as wanted.
pub fn verify(wanted: &Symbols, config: &str) -> Result<()> {
    let got = parse(config);
    let wrong: Vec<String> = wanted
        .iter()
        .filter(|(s, v)| got.get(*s).unwrap_or(&None) != *v)
        .map(|(s, v)| {
            let show = |v: Option<&String>| v.cloned().unwrap_or_else(|| "not set".into());
            let is = match got.get(s) {
                Some(v) => show(v.as_ref()),
                None => "unknown to Kconfig or without its dependencies".into(),
            };
            format!("  {s}: wanted {}, is {is}", show(v.as_ref()))
        })
        .collect();
    if !wrong.is_empty() {
        bail!(
            "the kernel's configuration is not what qemu/config/*.config asks for:\n{}\n\
             Add what these symbols depend on, or take them out.",
            wrong.join("\n")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_fragments_win() {
        let m = merge(&[
            "CONFIG_A=y\nCONFIG_B=y\n".into(),
            "# CONFIG_A is not set\nCONFIG_C=\"x=y\"\n# a comment\n".into(),
        ]);
        assert_eq!(m["CONFIG_A"], None);
        assert_eq!(m["CONFIG_C"].as_deref(), Some("\"x=y\""));
        assert_eq!(
            render(&m),
            "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=\"x=y\"\n"
        );
    }

    #[test]
    fn a_dropped_symbol_is_an_error_that_names_it() {
        let wanted = parse("CONFIG_A=y\nCONFIG_B=y\nCONFIG_N=8\n# CONFIG_OFF is not set\n# CONFIG_GONE is not set\n");
        let good = "CONFIG_A=y\nCONFIG_B=y\nCONFIG_N=8\n# CONFIG_OFF is not set\nCONFIG_MORE=y\n";
        verify(&wanted, good).unwrap();
        let bad = "CONFIG_A=m\nCONFIG_N=8\nCONFIG_OFF=y\n";
        let e = verify(&wanted, bad).unwrap_err().to_string();
        assert!(e.contains("CONFIG_A: wanted y, is m"), "{e}");
        assert!(e.contains("CONFIG_B: wanted y, is unknown"), "{e}");
        assert!(e.contains("CONFIG_OFF: wanted not set, is y"), "{e}");
        assert!(!e.contains("CONFIG_N"), "{e}");
    }

    #[test]
    fn n_is_not_set() {
        verify(&parse("CONFIG_A=n\n"), "# CONFIG_A is not set\n").unwrap();
    }
}
