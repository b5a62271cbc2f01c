// SPDX-License-Identifier: GPL-2.0
//! `scripts/selftests`: the kernel's own tests in `tools/testing/selftests/filesystems/fuse`, those of the series among
//! them. They are built from the patched tree by their own Makefile, with the headers that tree installs.

use super::tap::{self, Counts};
use super::test::Tally;
use crate::guest::OUT_FILE;
use crate::kernel::flavor::Flavor;
use crate::kernel::{build, series, source, source::hex};
use crate::paths::Paths;
use crate::setup::{self, Need};
use crate::ui;
use crate::vm::{self, BackendName, KernelName};
use anyhow::{bail, ensure, Context, Result};
use clap::Args;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

const DIRECTORY: &str = "tools/testing/selftests/filesystems/fuse";
/// Raised when the way of building changes in a way the hash does not see.
const FORMAT: &str = "1";
/// Builds kept.
const KEEP: usize = 4;
/// Seconds that one program may take.
const LIMIT: u32 = 90;

/// Run the kernel's selftests of fuse, those of the series among them, in a guest
///
/// Builds tools/testing/selftests/filesystems/fuse of the patched tree with the
/// headers of that tree (20 seconds, once for a series), boots a guest and runs
/// each program. A `not ok`, a result that is missing, a program of the series
/// that skips anything, and a complaint of the kernel are failures.
///
/// Examples:
///   scripts/selftests                          # all, in UML with the series
///   scripts/selftests fuse_restart_test -v     # one, with all that it says
///   scripts/selftests --backend qemu --kernel debug
///   scripts/selftests --kernel mutants --append fuse.mutant=revoke_bad fuse_restart_test
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct SelftestsArgs {
    /// Only these programs
    names: Vec<String>,
    #[arg(long, value_enum, default_value = "uml")]
    backend: BackendName,
    #[arg(long, value_enum, default_value = "patched")]
    kernel: KernelName,
    /// Append to the kernel's command line
    #[arg(long, value_name = "WORD")]
    append: Vec<String>,
    /// Show what the programs say, also if nothing is wrong
    #[arg(long, short)]
    verbose: bool,
}

/// Programs that are ready to run.
#[derive(Debug)]
struct Programs {
    dir: PathBuf,
    names: Vec<String>,
    /// Those that the series brings or changes.
    own: BTreeSet<String>,
}

/// What became of one program.
struct Outcome {
    name: String,
    counts: Result<Counts>,
    text: String,
}

pub fn run(paths: &Paths, args: &SelftestsArgs) -> Result<ExitCode> {
    let (outcomes, code) = all(paths, args)?;
    let mut total = Counts::default();
    let mut wrong = code != 0;
    for o in &outcomes {
        let bad = o.counts.is_err() || o.counts.as_ref().is_ok_and(|c| !c.failures.is_empty());
        if bad || args.verbose {
            println!("{}", o.text.trim_end());
        }
        wrong |= bad;
        match &o.counts {
            Ok(c) => {
                println!("{:<24} {}", o.name, show(c));
                total.passed += c.passed;
                total.skipped += c.skipped;
                total.failures.extend_from_slice(&c.failures);
            }
            Err(e) => println!("{:<24} BROKEN: {e:#}", o.name),
        }
    }
    println!("{} programs, {}", outcomes.len(), show(&total));
    if code != 0 {
        println!("the guest ended with status {code}");
    }
    Ok(match wrong || total.passed == 0 {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    })
}

fn show(c: &Counts) -> String {
    format!(
        "{} passed, {} failed, {} skipped",
        c.passed,
        c.failures.len(),
        c.skipped
    )
}

/// The step of `scripts/test`: each program counts its own tests.
pub fn step(paths: &Paths, tally: &mut Tally) {
    let args = SelftestsArgs {
        names: vec![],
        backend: BackendName::Uml,
        kernel: KernelName::Patched,
        append: vec![],
        verbose: false,
    };
    let mut outcomes = vec![];
    tally.check("selftests, uml patched", || {
        let code;
        (outcomes, code) = all(paths, &args)?;
        ensure!(code == 0, "the guest ended with status {code}");
        Ok(())
    });
    for o in outcomes {
        match &o.counts {
            Ok(c) => {
                ui::step(format!("{}: {}", o.name, show(c)));
                if !c.failures.is_empty() {
                    println!("{}", o.text);
                }
                tally.add(&o.name, c.passed, c.failures.len() as u32, c.skipped);
            }
            Err(e) => {
                println!("{}", o.text);
                tally.fail(&o.name, &format!("{e:#}"));
            }
        }
    }
}

fn all(paths: &Paths, args: &SelftestsArgs) -> Result<(Vec<Outcome>, u8)> {
    let mut programs = built(paths)?;
    for name in &args.names {
        ensure!(
            programs.names.contains(name),
            "there is no selftest {name:?}, only {}",
            programs.names.join(", ")
        );
    }
    programs
        .names
        .retain(|n| args.names.is_empty() || args.names.contains(n));
    let (text, code) = guest(paths, args, &programs)?;
    Ok((outcomes(&programs, &text), code))
}

fn guest(paths: &Paths, args: &SelftestsArgs, programs: &Programs) -> Result<(String, u8)> {
    // fusectl_test looks for its server in the current directory.
    let script = format!(
        "cd {} && for t in {}; do echo \"# program $t\"; timeout -k 5 {LIMIT} ./$t; echo \"# status $?\"; done \
         > {OUT_FILE} 2>&1",
        programs.dir.join("bin").display(),
        programs.names.join(" ")
    );
    let file = format!("fuse-restart-selftests-{}.tap", std::process::id());
    let out = std::env::temp_dir().join(file);
    let options = vm::Options {
        backend: args.backend,
        kernel: args.kernel,
        timeout: Duration::from_secs(600),
        out: Some(out.clone()),
        append: args.append.clone(),
        argv: ["sh", "-c", &script].map(str::to_owned).into(),
        ..vm::Options::default()
    };
    let code = vm::run(paths, &options);
    let text = fs::read(&out);
    let _ = fs::remove_file(&out);
    let code = code?;
    let text = text.with_context(|| format!("the selftests left nothing: status {code}"))?;
    Ok((String::from_utf8_lossy(&text).into_owned(), code))
}

fn outcomes(programs: &Programs, text: &str) -> Vec<Outcome> {
    let one = |name: &String| {
        let text = section(text, name).unwrap_or_default();
        let counts = judge(text, programs.own.contains(name));
        Outcome {
            name: name.clone(),
            counts,
            text: text.to_owned(),
        }
    };
    programs.names.iter().map(one).collect()
}

/// What one program wrote, up to its status.
fn section<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let begin = format!("# program {name}\n");
    let rest = &text[text.find(&begin)? + begin.len()..];
    Some(rest.split("# program ").next().unwrap_or(rest))
}

fn judge(text: &str, own: bool) -> Result<Counts> {
    let status = text.lines().last().and_then(|l| {
        let number = l.strip_prefix("# status ")?;
        number.parse::<i32>().ok()
    });
    let status = status.context("it was not run to its end")?;
    if status == 124 || status == 137 {
        bail!("no end after {LIMIT} seconds");
    }
    let counts = tap::parse(text, status)?;
    ensure!(
        !own || counts.skipped == 0,
        "{} skipped: the guest lacks something",
        counts.skipped
    );
    Ok(counts)
}

/// From the cache, or built now.
fn built(paths: &Paths) -> Result<Programs> {
    let patches = build::patches(paths, Flavor::Uml)?;
    let source = source::get(paths, Flavor::Uml.track())?;
    let mut hash = Sha256::new();
    for part in [FORMAT, &source.id, &series::hash(&patches)?] {
        hash.update(part);
        hash.update([0]);
    }
    let key = hex(&hash.finalize())[..12].to_string();
    let home = paths.cache_dir("selftests")?;
    let dir = home.join(format!("fuse-{key}"));
    if let Some(programs) = present(&dir)? {
        return Ok(programs);
    }
    setup::ensure(Need::Kernel)?;
    setup::ensure(Need::Selftests)?;
    // The tree is as the last build of a kernel has left it: it belongs to one at a time.
    let _lock = build::lock(paths, &format!("build{}", Flavor::Uml.track()))?;
    if let Some(programs) = present(&dir)? {
        return Ok(programs);
    }
    ui::step("building the selftests (20 seconds, once)");
    let written = series::apply(&source, &patches)?;
    if written > 0 {
        ui::step(format!("series: {written} files of the tree written"));
    }
    let _ = fs::remove_dir_all(&dir);
    for d in ["bin", "objects"] {
        fs::create_dir_all(dir.join(d))?;
    }
    let log = paths.cache.join("logs/selftests.log");
    let _ = fs::remove_file(&log);
    let mut c = make(&source.tree);
    c.arg("headers_install")
        .arg(format!("O={}", dir.join("objects").display()))
        .arg(format!("INSTALL_HDR_PATH={}", dir.join("usr").display()));
    ui::run_logged(&mut build::nice(c), &log, "make headers_install")?;
    let mut c = selftest_make(&source.tree, &dir);
    c.arg("all");
    ui::run_logged(&mut build::nice(c), &log, "make of the selftests")?;
    let mut c = selftest_make(&source.tree, &dir);
    c.args([
        "-s",
        "--eval=.PHONY: names\nnames: ; @echo $(notdir $(TEST_GEN_PROGS))",
        "names",
    ]);
    let out = c.output().context("cannot run make")?;
    ensure!(out.status.success(), "make names ended with {}", out.status);
    let names = String::from_utf8_lossy(&out.stdout).into_owned();
    fs::write(dir.join("own"), own(&patches)?.join("\n"))?;
    fs::remove_dir_all(dir.join("objects"))?;
    // Last: it says that everything else is there.
    fs::write(dir.join("names"), names)?;
    build::prune(&home, "fuse", KEEP);
    present(&dir)?.context("the selftests vanished")
}

fn present(dir: &Path) -> Result<Option<Programs>> {
    let Ok(names) = fs::read_to_string(dir.join("names")) else {
        return Ok(None);
    };
    let words = |text: String| text.split_whitespace().map(str::to_owned).collect();
    let programs = Programs {
        dir: dir.into(),
        names: words(names),
        own: BTreeSet::from_iter::<Vec<_>>(words(fs::read_to_string(dir.join("own"))?)),
    };
    ensure!(
        !programs.own.is_empty() && programs.own.iter().all(|n| programs.names.contains(n)),
        "{programs:?}: not every selftest of the series was built"
    );
    Ok(Some(programs))
}

/// The programs whose source the series touches.
fn own(patches: &[PathBuf]) -> Result<Vec<String>> {
    let mut own = BTreeSet::new();
    for patch in patches {
        let files = series::touched(&String::from_utf8_lossy(&fs::read(patch)?));
        own.extend(files.iter().filter_map(|f| {
            let name = f.strip_prefix(DIRECTORY)?.strip_prefix('/')?;
            name.strip_suffix("_test.c").map(|n| format!("{n}_test"))
        }));
    }
    Ok(own.into_iter().collect())
}

fn make(dir: &Path) -> Command {
    let mut c = Command::new("make");
    let wanted = |k: &std::ffi::OsString| k == "PATH" || k == "HOME" || k == "TMPDIR";
    c.current_dir(dir)
        .env_clear()
        .envs(std::env::vars_os().filter(|(k, _)| wanted(k)))
        .env("LC_ALL", "C");
    c
}

fn selftest_make(tree: &Path, dir: &Path) -> Command {
    let mut c = make(&tree.join(DIRECTORY));
    let headers = dir.join("usr/include");
    c.arg(format!("OUTPUT={}", dir.join("bin").display()))
        .arg(format!("KHDR_INCLUDES=-isystem {}", headers.display()));
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# program a_test\nTAP version 13\n1..2\nok 1 x\nok 2 y # SKIP no\n# status 0\n# program b_test\n\
        TAP version 13\n1..1\nnot ok 1 z\n# status 1\n# program c_test\n1..1\n";

    fn programs(own: &[&str]) -> Programs {
        Programs {
            dir: "/d".into(),
            names: ["a_test", "b_test", "c_test", "d_test"]
                .map(str::to_owned)
                .into(),
            own: own.iter().map(|n| (*n).to_owned()).collect(),
        }
    }

    #[test]
    fn each_program_has_its_own_result() {
        let all = outcomes(&programs(&[]), TEXT);
        assert_eq!(
            show(all[0].counts.as_ref().unwrap()),
            "1 passed, 0 failed, 1 skipped"
        );
        assert_eq!(all[1].counts.as_ref().unwrap().failures, ["not ok 1 z"]);
        assert!(all[2].counts.is_err(), "the guest went down meanwhile");
        assert!(all[3].counts.is_err(), "it was never started");
    }

    #[test]
    fn a_test_of_the_series_must_not_skip() {
        let all = outcomes(&programs(&["a_test"]), TEXT);
        assert!(all[0].counts.is_err());
    }

    #[test]
    fn a_program_without_end_is_no_success() {
        assert!(judge("1..1\nok 1 x\n# status 124\n", false).is_err());
        assert!(judge("1..1\nok 1 x\n# status 0\n", false).is_ok());
    }

    #[test]
    fn the_series_brings_its_tests() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let patches = series::list(&repo.join("kernel-patches/7.3")).unwrap();
        let wanted = [
            "fuse_bad_inode_test",
            "fuse_notify_kill_test",
            "fuse_restart_test",
        ];
        assert_eq!(own(&patches).unwrap(), wanted);
    }
}
