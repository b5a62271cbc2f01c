// SPDX-License-Identifier: GPL-2.0
//! Does a kernel with the series up to here boot, and is a mount of any use?
//! User-mode Linux, with lockdep and the like, and the objects of the patch
//! before.

use super::run::failure;
use super::store::Record;
use crate::kernel::source::Source;
use crate::kernel::tools::Tools;
use crate::kernel::{build, config, flavor::Flavor, series, Built};
use crate::paths::Paths;
use crate::vm::{self, runner, uml::Uml, KernelName};
use crate::{suite, ui};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const FLAVOR: Flavor = Flavor::Uml;

/// A tree of files in, a server killed, everything still there, and out. Up to
/// the engine the keeper has only RESEND, which is enough for this.
const SMOKE: &str = r#"set -e
mkdir /tmp/back /tmp/mnt
"$0" keep --mountpoint /tmp/mnt -- "$0" serve passthrough /tmp/back &
keeper=$!
i=0
until grep -q ' /tmp/mnt fuse' /proc/mounts && mkdir /tmp/mnt/d 2>/dev/null; do
	i=$((i + 1)); test $i -lt 300; sleep 0.1
done
cp -a "$1"/fs/fuse /tmp/mnt/d/fuse
exec 3</tmp/mnt/d/fuse/dev.c
kill -9 $(pgrep -f 'serve passthrough /tmp/back' -P $keeper)
diff -r "$1"/fs/fuse /tmp/mnt/d/fuse
cmp "$1"/fs/fuse/dev.c <&3
exec 3<&-
rm -r /tmp/mnt/d
test -z "$(ls -A /tmp/mnt)"
kill $keeper
wait $keeper
! grep -q ' /tmp/mnt fuse' /proc/mounts
echo smoke-test-passed > $FUSE_RESTART_OUT
"#;

/// What the result depends on beside the tree.
pub fn key(paths: &Paths) -> Result<String> {
    let mut key = SMOKE.to_string();
    for f in FLAVOR.fragments().iter().chain(&["series"]) {
        key += &fs::read_to_string(paths.config(f)).with_context(|| f.to_string())?;
    }
    key += &series::hash(&test_bed(paths)?)?;
    Ok(key)
}

/// What makes lockdep work in UML; no part of the series.
fn test_bed(paths: &Paths) -> Result<Vec<PathBuf>> {
    series::list(&paths.repo.join("qemu/patches/7.3"))
}

pub fn run(paths: &Paths, source: &Source, tools: &Tools, patch: usize) -> Result<Record> {
    let program = suite::build_program(paths, false)?;
    for p in test_bed(paths)? {
        let out = super::tree::command(&source.tree)
            .args(["apply", "--whitespace=nowarn"])
            .arg(&p)
            .output()?;
        anyhow::ensure!(
            out.status.success(),
            "{} does not apply: {}",
            p.display(),
            String::from_utf8_lossy(&out.stderr)
        );
    }
    let built = compile(paths, source, tools);
    super::tree::git(&source.tree, &["checkout", "-q", "-f", "HEAD"])?;
    let image = match built? {
        Ok(image) => image,
        Err(why) => return Ok(Record::broken(why)),
    };
    boot(paths, source, &program, image, patch)
}

/// The inner error is what the compiler said.
fn compile(paths: &Paths, source: &Source, tools: &Tools) -> Result<Result<PathBuf, String>> {
    let dir = paths.cache_dir("build")?.join(&source.key).join("um");
    fs::create_dir_all(&dir)?;
    let log = paths.cache.join("logs/rfc-um.log");
    let wanted = build::wanted(paths, FLAVOR, source)?;
    let fragment = dir.join("wanted.config");
    fs::write(&fragment, config::render(&wanted))?;
    let mut c = tools.make(&source.tree, &dir, FLAVOR.arch());
    c.env("KCONFIG_ALLCONFIG", &fragment).arg("allnoconfig");
    ui::run_logged(&mut c, &log, "configuring um")?;
    config::verify(&wanted, &fs::read_to_string(dir.join(".config"))?)?;
    let (target, image) = FLAVOR.target();
    let jobs = std::thread::available_parallelism().map_or(2, |n| n.get());
    let mut c = tools.make(&source.tree, &dir, FLAVOR.arch());
    c.arg(format!("-j{jobs}")).arg(target);
    if !dir.join(image).exists() {
        ui::step("building UML (about 7 minutes, once)");
    }
    let mut c = build::nice(c);
    match ui::run_logged(&mut c, &log, "building um") {
        Ok(()) => Ok(Ok(dir.join(image))),
        Err(_) => Ok(Err(failure(&fs::read_to_string(&log).unwrap_or_default()))),
    }
}

fn boot(
    paths: &Paths,
    source: &Source,
    program: &Path,
    image: PathBuf,
    patch: usize,
) -> Result<Record> {
    let out = paths
        .cache_dir("run")?
        .join(format!("rfc-boot-{}", std::process::id()));
    let built = Built {
        name: "rfc-uml",
        hash: format!("patch {patch}"),
        dir: image.parent().unwrap_or(Path::new("/")).to_path_buf(),
        image,
    };
    let argv = ["sh", "-c", SMOKE]
        .iter()
        .map(|s| s.to_string())
        .chain([program, source.tree.as_path()].map(|p| p.display().to_string()))
        .collect();
    let opts = vm::Options {
        kernel: KernelName::Patched,
        timeout: Duration::from_secs(180),
        out: Some(out.clone()),
        quiet: true,
        argv,
        ..vm::Options::default()
    };
    let outcome = runner::boot(paths, &opts, &Uml, &built)?;
    let passed = fs::read_to_string(&out).unwrap_or_default();
    let _ = fs::remove_file(&out);
    if outcome.exit_code() == 0 && passed.trim() == "smoke-test-passed" {
        return Ok(Record::of(vec![]));
    }
    let mut why = vec![format!("{:?}", outcome.end)];
    why.extend(outcome.reports);
    why.push(outcome.log_tail);
    Ok(Record::broken(why.join("\n")))
}
