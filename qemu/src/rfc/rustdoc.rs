// SPDX-License-Identifier: GPL-2.0
//! `make rustdoc` documents the kernel's own crates only, so what is in fs/fuse
//! is documented by the command that compiled it, with another program.

use super::messages;
use super::objects::{Objects, LINT};
use super::run::failure;
use super::store::Record;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::Command;

const SAVED: &str = "fs/fuse/restart/.restart.o.cmd";

/// In the state that the lint directory was compiled for.
pub fn run(objects: &Objects, tree: &Path, whole: bool) -> Result<Record> {
    let dir = objects.dir(LINT);
    let name = tree.display().to_string();
    let mut record = Record::nothing();
    if dir.join(SAVED).exists() {
        let saved = fs::read_to_string(dir.join(SAVED))?;
        let line = command(&saved).with_context(|| format!("{SAVED} is not understood"))?;
        let out = Command::new("sh")
            .arg("-c")
            .arg(line)
            // As the tree's Makefile has it: the saved command has options of the nightly compiler.
            .env("RUSTC_BOOTSTRAP", "1")
            .current_dir(&dir)
            .output()?;
        let said = String::from_utf8_lossy(&out.stderr);
        if !out.status.success() {
            return Ok(Record::broken(failure(&said)));
        }
        record = Record::of(messages::rust(&said, &name));
    }
    if whole {
        let (ok, said) = objects.listen(LINT, &["rustdoc"])?;
        if !ok {
            return Ok(Record::broken(failure(&said)));
        }
        record.nothing = false;
        record.messages.extend(messages::rust(&said, &name));
    }
    Ok(record)
}

/// The saved command of the compiler as one of rustdoc.
fn command(saved: &str) -> Option<String> {
    let line = saved.lines().next()?.split_once(" := ")?.1;
    let line = line.split(';').next()?;
    let mut out = String::new();
    let mut words = line.split_whitespace();
    // Variables, then the compiler (or clippy).
    for w in words.by_ref() {
        if w.contains('=') && !w.starts_with('-') {
            out += w;
            out.push(' ');
        } else {
            out += "/usr/bin/rustdoc --document-private-items --output rustdoc-fuse";
            break;
        }
    }
    while let Some(w) = words.next() {
        match w {
            "--crate-type" | "--out-dir" => drop(words.next()?),
            _ if w.starts_with("--emit=") || w.starts_with("--remap-path") => {}
            _ => {
                out.push(' ');
                out += w;
            }
        }
    }
    out.ends_with(".rs").then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compilers_command_becomes_rustdocs() {
        let saved = "savedcmd_x := OBJTREE=/o RUST_MODFILE=fs/fuse/fuse /usr/bin/clippy-driver --edition=2021 \
            -Dwarnings --crate-type rlib -L ./rust/ --out-dir fs/fuse/ --emit=dep-info=a --emit=obj=b \
            --remap-path-prefix=/t/= --crate-name restart /t/restart.rs; objtool x\n\nsource_x := y\n";
        assert_eq!(
            command(saved).unwrap(),
            "OBJTREE=/o RUST_MODFILE=fs/fuse/fuse /usr/bin/rustdoc --document-private-items --output rustdoc-fuse \
             --edition=2021 -Dwarnings -L ./rust/ --crate-name restart /t/restart.rs"
        );
        assert_eq!(command("nothing"), None);
    }
}
