// SPDX-License-Identifier: GPL-2.0
//! Runs one check on one commit. What compilers say is recorded for a state of
//! the code, the pristine one included, and the verdict is the difference.

use super::check::Check;
use super::messages::{self, Message};
use super::objects::{Objects, Variant, BARE, BUILTIN, LINT, MODULE, NO_RUST, OFF};
use super::store::{Record, Store};
use super::tree::Tree;
use super::{boot, rustdoc, text};
use crate::kernel::source::Source;
use crate::kernel::tools::Tools;
use crate::paths::Paths;
use anyhow::Result;
use std::fs;
use std::path::Path;
use std::time::Instant;

/// The kernel has outgrown Debian's sparse in places; without these it gives up
/// at the first header and reports nothing.
const SPARSE: &str = "CHECK=sparse -D__typeof_unqual__=__typeof__";
const LINTING: [&str; 3] = ["W=1", "CLIPPY=1", "CLIPPY_DRIVER=/usr/bin/clippy-driver"];

pub struct Runner<'a> {
    pub paths: &'a Paths,
    pub source: &'a Source,
    pub tree: &'a Tree,
    pub tools: &'a Tools,
    pub objects: Objects<'a>,
    pub store: Store,
    /// Versions of what checks: part of each key.
    pub versions: String,
    /// State of the code that the lint directory has been compiled for.
    linted: Option<String>,
}

/// Of one check on one commit.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Passed,
    Failed,
    Nothing,
}

#[derive(Clone, Debug, serde::Serialize)]
pub struct Outcome {
    pub patch: usize,
    pub check: &'static str,
    pub verdict: Verdict,
    pub findings: Vec<String>,
    pub notes: Vec<String>,
    pub seconds: f64,
    /// Known from an earlier run, or from a patch that changes no code.
    pub cached: bool,
}

impl<'a> Runner<'a> {
    pub fn new(
        paths: &'a Paths,
        source: &'a Source,
        tree: &'a Tree,
        tools: &'a Tools,
        store: Store,
        versions: String,
    ) -> Result<Runner<'a>> {
        Ok(Runner {
            paths,
            source,
            tree,
            tools,
            objects: Objects::new(paths, source, tools)?,
            store,
            versions,
            linted: None,
        })
    }

    /// Before the option exists, modules without it are just modules.
    fn same(&self, patch: usize, check: Check) -> Result<Check> {
        let kconfig = self
            .tree
            .show(patch, "fs/fuse/Kconfig")?
            .unwrap_or_default();
        let has = String::from_utf8_lossy(&kconfig).contains("config FUSE_RESTART\n");
        Ok(match check {
            Check::Off if !has => Check::Module,
            c => c,
        })
    }

    /// Whether the answer is known already.
    pub fn known(&self, patch: usize, check: Check) -> Result<bool> {
        let check = self.same(patch, check)?;
        Ok(self.store.get(check, &self.key(patch, check)?).is_some())
    }

    pub fn check(&mut self, patch: usize, check: Check) -> Result<Outcome> {
        let start = Instant::now();
        let cached = self.known(patch, check)?;
        let now = self.record(patch, check)?;
        let findings: Vec<String> = match &now.broken {
            Some(why) => vec![why.clone()],
            // Only if there is something to compare: another state of the
            // code may cost a compilation of all of the kernel's Rust.
            None if compares(check) && !now.messages.is_empty() => {
                let before = self.record(0, check)?;
                let new = messages::new(&before.messages, &now.messages);
                new.iter().map(Message::to_string).collect()
            }
            None => now.messages.iter().map(Message::to_string).collect(),
        };
        let seconds = if cached {
            now.millis as f64 / 1000.0
        } else {
            start.elapsed().as_secs_f64()
        };
        Ok(Outcome {
            patch,
            check: check.name(),
            verdict: match (findings.is_empty(), now.nothing) {
                (false, _) => Verdict::Failed,
                (true, true) => Verdict::Nothing,
                (true, false) => Verdict::Passed,
            },
            findings,
            notes: now.notes,
            seconds,
            cached,
        })
    }

    fn key(&self, patch: usize, check: Check) -> Result<String> {
        let what = if check.of_text() {
            fs::read_to_string(&self.tree.commits[patch - 1].patch)?
        } else if check.of_files() {
            self.tree.id(patch)?.to_string()
        } else {
            self.tree.code_hash(patch)?
        };
        let config = match variant(check) {
            Some(v) => self.objects.config(v)?,
            None if check == Check::Boot => boot::key(self.paths)?,
            None => String::new(),
        };
        // At the end of the series one thing more is looked at.
        let last = check == Check::Rustdoc && self.is_end(patch);
        Ok(format!(
            "{} {} {what} {config} {last}",
            self.tree.base, self.versions
        ))
    }

    fn is_end(&self, patch: usize) -> bool {
        patch == 0 || patch == self.tree.commits.len()
    }

    fn record(&mut self, patch: usize, check: Check) -> Result<Record> {
        let check = self.same(patch, check)?;
        let key = self.key(patch, check)?;
        if let Some(r) = self.store.get(check, &key) {
            return Ok(r);
        }
        let start = Instant::now();
        let mut r = self.execute(patch, check)?;
        r.millis = start.elapsed().as_millis() as u64;
        self.store.put(check, &key, &r)?;
        Ok(r)
    }

    fn execute(&mut self, patch: usize, check: Check) -> Result<Record> {
        if !check.of_text() {
            self.tree.checkout(patch)?;
        }
        let commit = patch.checked_sub(1).map(|i| &self.tree.commits[i]);
        match (check, commit) {
            (Check::Message, Some(c)) => Ok(Record::of(text::message(c)?)),
            (Check::Checkpatch, Some(c)) => {
                let (found, notes) = text::checkpatch(self.tree, c)?;
                Ok(Record {
                    notes,
                    ..Record::of(found)
                })
            }
            (Check::Rustfmt, Some(c)) => Ok(some(text::rustfmt(self.tree, c)?)),
            (Check::KernelDoc, Some(c)) => {
                let scratch = self.source.home.join("scratch");
                Ok(some(text::kernel_doc(self.tree, c, &scratch)?))
            }
            (Check::Docs, Some(c)) => {
                let out = self.paths.cache_dir("build")?.join(&self.source.key);
                Ok(some(text::docs(self.tree, c, &out.join("docs"))?))
            }
            (c, None) if c.of_text() || c.of_files() => Ok(Record::nothing()),
            (Check::Builtin, _) => self.builtin(BUILTIN),
            (Check::NoRust, _) => self.builtin(NO_RUST),
            (Check::Bare, _) => self.builtin(BARE),
            (Check::Module, _) => self.modules(MODULE),
            (Check::Off, _) => self.modules(OFF),
            (Check::Warnings | Check::Clippy, _) => self.lint(patch, check),
            (Check::Rustdoc, _) => {
                if let Some(r) = self.linted(patch)? {
                    return Ok(r);
                }
                rustdoc::run(&self.objects, &self.tree.dir, self.is_end(patch))
            }
            (Check::Sparse, _) => self.sparse(patch),
            (Check::Boot, _) => boot::run(self.paths, self.source, self.tools, patch),
            (c, None) => anyhow::bail!("{} is about a patch", c.name()),
        }
    }

    /// `make fs/fuse/`, and are all symbols to be had?
    fn builtin(&self, v: Variant) -> Result<Record> {
        self.objects.ready(v)?;
        let whole = self.objects.whole(self.tree)?;
        let (ok, said) = self.objects.listen(v, &["fs/fuse/"])?;
        if !ok {
            return Ok(Record::broken(failure(&said)));
        }
        let missing = self.objects.unresolved(v, &whole)?;
        let mut found = self.of_fuse(&said);
        found.extend(missing.into_iter().map(|s| Message {
            file: "fs/fuse/built-in.a".into(),
            line: 0,
            text: format!("undefined symbol {s}"),
        }));
        Ok(Record::of(found))
    }

    fn modules(&self, v: Variant) -> Result<Record> {
        let whole = self.objects.whole(self.tree)?;
        let dir = self.objects.ready(v)?;
        if v != MODULE {
            // What modpost resolves symbols by.
            let (from, to) = (whole.join("vmlinux.o"), dir.join("vmlinux.o"));
            let _ = fs::remove_file(&to);
            std::os::unix::fs::symlink(from, to)?;
        }
        let kos = ["fs/fuse/fuse.ko", "fs/fuse/cuse.ko", "fs/fuse/virtiofs.ko"];
        let (mut ok, mut said) = self.objects.listen(v, &kos)?;
        // Other bindings make other Rust symbols, in the kernel as well.
        if !ok && said.contains("undefined!") && v == MODULE {
            self.objects.make(v, &["vmlinux", "modules"])?;
            (ok, said) = self.objects.listen(v, &kos)?;
        }
        if !ok {
            return Ok(Record::broken(failure(&said)));
        }
        Ok(Record::of(self.of_fuse(&said)))
    }

    /// Warnings about files of fuse: others are not ours, and not seen again
    /// until something else is compiled.
    fn of_fuse(&self, said: &str) -> Vec<Message> {
        let tree = self.tree.dir.display().to_string();
        let mut found = messages::compiler(said, &tree);
        found.extend(messages::rust(said, &tree));
        found.retain(|m| m.file.contains("fs/fuse") || m.file.contains("uapi/linux/fuse.h"));
        found
    }

    /// Compiles for the linters unless that was just done. A record: it failed.
    fn linted(&mut self, patch: usize) -> Result<Option<Record>> {
        let state = self.tree.code_hash(patch)?;
        if self.linted.as_ref() == Some(&state) {
            return Ok(None);
        }
        for check in [Check::Warnings, Check::Clippy] {
            let r = self.lint(patch, check)?;
            if r.broken.is_some() {
                return Ok(Some(r));
            }
        }
        Ok(None)
    }

    /// One compilation says what both checks want to know.
    fn lint(&mut self, patch: usize, wanted: Check) -> Result<Record> {
        let state = self.tree.code_hash(patch)?;
        let log = self.objects.log(LINT);
        if self.linted.as_ref() != Some(&state) {
            self.linted = None;
            self.objects.ready(LINT)?;
            self.objects.forget(LINT)?;
            let (ok, said) = self.objects.listen(LINT, &lint_args(&["fs/fuse/"]))?;
            if !ok {
                return Ok(Record::broken(failure(&said)));
            }
            fs::write(log.with_extension("W1"), said)?;
            self.linted = Some(state);
        }
        let said = fs::read_to_string(log.with_extension("W1"))?;
        let tree = self.tree.dir.display().to_string();
        Ok(match wanted {
            Check::Clippy if !self.has_rust() => Record::nothing(),
            Check::Clippy => Record::of(messages::rust(&said, &tree)),
            _ => Record::of(messages::compiler(&said, &tree)),
        })
    }

    fn has_rust(&self) -> bool {
        let object = "fs/fuse/restart/restart.o";
        self.objects.dir(LINT).join(object).exists()
    }

    fn sparse(&mut self, patch: usize) -> Result<Record> {
        if let Some(r) = self.linted(patch)? {
            return Ok(r);
        }
        // Nothing is left to compile, so only sparse speaks.
        let (ok, said) = self
            .objects
            .listen(LINT, &lint_args(&["C=2", SPARSE, "fs/fuse/"]))?;
        if !ok {
            return Ok(Record::broken(failure(&said)));
        }
        if !said.contains("CHECK   fs/fuse/dev.c") && !said.contains("fs/fuse/dev.c") {
            return Ok(Record::broken(format!(
                "sparse did not run:\n{}",
                end(&said)
            )));
        }
        let tree = self.tree.dir.display().to_string();
        let mut found = messages::compiler(&said, &tree);
        found.retain(|m| {
            let file = fs::read_to_string(self.tree.dir.join(&m.file)).unwrap_or_default();
            let line = m
                .line
                .checked_sub(1)
                .and_then(|n| file.lines().nth(n as usize));
            !is_module_info(&m.text, line.unwrap_or_default())
        });
        Ok(Record::of(found))
    }
}

/// Debian's sparse does not know that `__builtin_strlen()` of a string is constant, and so complains of every
/// parameter of a module, in any file.
fn is_module_info(text: &str, line: &str) -> bool {
    text.contains("bad constant expression")
        && ["module_param", "MODULE_"]
            .iter()
            .any(|w| line.starts_with(w))
}

fn lint_args<'a>(more: &[&'a str]) -> Vec<&'a str> {
    LINTING
        .iter()
        .copied()
        .chain(more.iter().copied())
        .collect()
}

fn some(found: Option<Vec<Message>>) -> Record {
    found.map_or_else(Record::nothing, Record::of)
}

/// Whose messages are compared with those of the pristine tree.
fn compares(check: Check) -> bool {
    !check.of_text() && !check.of_files() && check != Check::Boot
}

fn variant(check: Check) -> Option<Variant> {
    Some(match check {
        Check::Builtin => BUILTIN,
        Check::Module => MODULE,
        Check::Off => OFF,
        Check::NoRust => NO_RUST,
        Check::Bare => BARE,
        Check::Warnings | Check::Clippy | Check::Rustdoc | Check::Sparse => LINT,
        _ => return None,
    })
}

/// The lines that say what is wrong, else the end.
pub fn failure(said: &str) -> String {
    let wrong = |l: &&str| l.contains("error:") || l.contains("ERROR:") || l.starts_with("error[");
    let lines: Vec<&str> = said.lines().filter(wrong).take(10).collect();
    if lines.is_empty() {
        return end(said);
    }
    lines.join("\n")
}

fn end(said: &str) -> String {
    let lines: Vec<&str> = said.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// First lines of `--version` of everything that has an opinion.
pub fn versions(tree: &Path) -> String {
    let mut all = String::new();
    for tool in [
        "sparse",
        "/usr/bin/clippy-driver",
        "/usr/bin/rustdoc",
        "rustfmt",
    ] {
        let out = std::process::Command::new(tool).arg("--version").output();
        all += &out.map_or_else(
            |e| e.to_string(),
            |o| String::from_utf8_lossy(&o.stdout).into_owned(),
        );
    }
    all + &tree.display().to_string() + SPARSE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_what_is_wrong_in_it() {
        let said = "  CC a\na.c:1:1: error: x\nmake: *** [a] Error 1\n";
        assert_eq!(failure(said), "a.c:1:1: error: x");
        assert_eq!(failure("one\ntwo"), "one\ntwo");
    }

    #[test]
    fn sparse_and_parameters_of_modules() {
        let said = "error: bad constant expression";
        assert!(is_module_info(said, "module_param(x, uint, 0644);"));
        assert!(is_module_info(said, "MODULE_PARM_DESC(x,"));
        assert!(!is_module_info(said, "static_assert(x == 1);"));
        assert!(!is_module_info(
            "warning: x",
            "module_param(x, uint, 0644);"
        ));
    }

    #[test]
    fn linters_share_a_directory() {
        assert_eq!(variant(Check::Sparse), variant(Check::Warnings));
        assert_ne!(variant(Check::Off), variant(Check::Module));
        assert!(variant(Check::Message).is_none());
        assert!(compares(Check::Sparse) && !compares(Check::KernelDoc));
    }
}
