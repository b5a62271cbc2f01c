// SPDX-License-Identifier: GPL-2.0
//! `bench journal`: what the journal costs a passthrough server.
//!
//! Two mounts of one backing file system, one with and one without the journal, take short turns at the same work, so
//! that whatever else the machine does falls on both. What is told is the median over the turns of the ratio of two
//! neighbours, and the middle half of these ratios.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sys::signal::{kill, Signal};
use nix::sys::stat::{fchmod, futimens, Mode};
use nix::sys::time::TimeSpec;
use nix::unistd::Pid;
use serde::Serialize;
use zerocopy::IntoBytes;

use super::server::pages;
use crate::demo::rng::Rng;
use crate::keep::mount::mount_at;
use crate::raw::env::Env;

/// What the journal costs: `serve passthrough` with and without it, side by side, on metadata and on data
///
/// Metadata is what unpacking and removing an archive does (mkdir, create, write, chmod, utimes, close, rename, link,
/// unlink, rmdir); data is 4 KiB and 128 KiB, sequential and random, past the page cache (O_DIRECT), so that
/// every read and write reaches the server. A ratio of 1.02 means that the journal costs two percent of the time.
/// Needs root; mounts in a namespace of its own.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Turns of each server at each kind of work
    #[arg(long, value_name = "N", default_value_t = 31)]
    turns: u32,
    /// Files in one turn of metadata; a turn of data is as many requests of 4 KiB, or half as many of 128 KiB
    #[arg(long, value_name = "N", default_value_t = 200)]
    files: u32,
    /// Serve a directory made below DIR instead of a tmpfs
    #[arg(long, value_name = "DIR")]
    backing: Option<PathBuf>,
    /// Threads of each server
    #[arg(long, value_name = "N", default_value_t = 2)]
    threads: u16,
    /// Of the offsets of random reads and writes
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Write the results to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Bytes of the file that is read and written.
const DATA: u64 = 16 << 20;
/// How long a mount may take to appear, on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Line {
    work: &'static str,
    operations: u32,
    /// Median over the turns, in nanoseconds for each operation.
    without_ns: f64,
    with_ns: f64,
    ratio: f64,
    /// The middle half of the ratios.
    quartiles: [f64; 2],
    ratios: Vec<f64>,
}

#[derive(Serialize)]
struct Results {
    kernel: String,
    backing: String,
    turns: u32,
    lines: Vec<Line>,
}

pub fn run(args: &Args, env: &Env<'_>) -> Result<()> {
    ensure!(
        args.turns > 0 && args.files > 0,
        "nothing to measure: all numbers must be at least 1"
    );
    let backing = Backing::new(args, env.scratch)?;
    let mounts = [true, false].map(|journal| {
        let name = if journal { "with" } else { "without" };
        Mounted::new(args, env.scratch, &backing.path.join(name), journal)
    });
    let [with, without] = mounts;
    let (with, without) = (with?, without?);
    let results = Results {
        kernel: super::kernel()?,
        backing: match &args.backing {
            Some(dir) => dir.display().to_string(),
            None => "tmpfs".into(),
        },
        turns: args.turns,
        lines: measure(args, &with.at, &without.at)?,
    };
    println!(
        "kernel {}, backing {}, {} turns; ns per operation, medians; ratios of neighbouring turns",
        results.kernel, results.backing, results.turns
    );
    println!("                      without        with   ratio   (middle half)");
    for line in &results.lines {
        println!(
            "{:<18} {:>10.0}  {:>10.0}   {:>5.3}   ({:.3} to {:.3})",
            line.work,
            line.without_ns,
            line.with_ns,
            line.ratio,
            line.quartiles[0],
            line.quartiles[1]
        );
    }
    super::write_json(args.json.as_ref(), &results)
}

/// One kind of work: a turn at a mount, which is the work and how many operations it is.
struct Work {
    name: &'static str,
    operations: u32,
    turn: Box<Turn>,
}

/// Gets the mount, and which turn it is.
type Turn = dyn Fn(&Path, u32) -> Result<()>;

fn measure(args: &Args, with: &Path, without: &Path) -> Result<Vec<Line>> {
    let works = works(args);
    for mount in [with, without] {
        let file = mount.join("data");
        fs::write(&file, vec![7; DATA as usize]).with_context(|| format!("{}", file.display()))?;
    }
    let mut lines = Vec::new();
    for work in &works {
        let began = Instant::now();
        let (mut ours, mut theirs, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        // The first turn of both warms up, and is not told.
        for turn in 0..=args.turns {
            // Who comes first changes from turn to turn.
            let order = [turn % 2 == 0, turn % 2 != 0];
            let mut took = [0.0; 2];
            for journal in order {
                let mount = if journal { with } else { without };
                let start = Instant::now();
                (work.turn)(mount, turn)
                    .with_context(|| format!("{} in {}", work.name, mount.display()))?;
                took[usize::from(journal)] =
                    start.elapsed().as_nanos() as f64 / f64::from(work.operations);
            }
            if turn > 0 {
                theirs.push(took[0]);
                ours.push(took[1]);
                ratios.push(took[1] / took[0]);
            }
        }
        eprintln!("{}: {:.1} s", work.name, began.elapsed().as_secs_f64());
        ratios.sort_by(f64::total_cmp);
        let quarter = (ratios.len() - 1) / 4;
        lines.push(Line {
            work: work.name,
            operations: work.operations,
            without_ns: super::median(&theirs).context("no turn")?,
            with_ns: super::median(&ours).context("no turn")?,
            ratio: super::median(&ratios).context("no turn")?,
            quartiles: [ratios[quarter], ratios[ratios.len() - 1 - quarter]],
            ratios,
        });
    }
    Ok(lines)
}

fn works(args: &Args) -> Vec<Work> {
    let (files, seed) = (args.files, args.seed);
    let mut works = vec![Work {
        name: "metadata",
        operations: files,
        turn: Box::new(move |mount, turn| unpack_and_remove(mount, turn, files)),
    }];
    for (name, size, random, write) in [
        ("read 4K seq", 4096, false, false),
        ("read 4K random", 4096, true, false),
        ("write 4K seq", 4096, false, true),
        ("write 4K random", 4096, true, true),
        ("read 128K seq", 128 << 10, false, false),
        ("read 128K random", 128 << 10, true, false),
        ("write 128K seq", 128 << 10, false, true),
        ("write 128K random", 128 << 10, true, true),
    ] {
        let operations = if size == 4096 {
            files
        } else {
            files.div_ceil(2)
        };
        works.push(Work {
            name,
            operations,
            turn: Box::new(move |mount, turn| {
                // The same offsets for both.
                let rng = Rng::new(seed.wrapping_add(u64::from(turn)));
                data(
                    &mount.join("data"),
                    (size, operations),
                    write,
                    random.then_some(rng),
                )
            }),
        });
    }
    works
}

/// What `tar` does with many small files, and `rm -r` with them afterwards.
fn unpack_and_remove(mount: &Path, turn: u32, files: u32) -> Result<()> {
    let top = mount.join(format!("tree{turn}"));
    fs::create_dir(&top)?;
    let content = [b'x'; 3000];
    let time = TimeSpec::new(1_000_000_000, 0);
    let name = |n: u32| top.join(format!("dir{}/file{n}", n / 20));
    for n in 0..files {
        if n.is_multiple_of(20) {
            fs::create_dir(top.join(format!("dir{}", n / 20)))?;
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(name(n))?;
        file.write_all_at(&content[..(n as usize * 97) % content.len()], 0)?;
        fchmod(file.as_fd(), Mode::from_bits_truncate(0o644))?;
        futimens(file.as_fd(), &time, &time)?;
        drop(file);
        if n.is_multiple_of(10) {
            fs::rename(name(n), top.join(format!("moved{n}")))?;
            fs::hard_link(top.join(format!("moved{n}")), name(n))?;
        }
    }
    for n in 0..files {
        fs::remove_file(name(n))?;
        if n.is_multiple_of(10) {
            fs::remove_file(top.join(format!("moved{n}")))?;
        }
    }
    for n in 0..files.div_ceil(20) {
        fs::remove_dir(top.join(format!("dir{n}")))?;
    }
    Ok(fs::remove_dir(&top)?)
}

fn data(
    path: &Path,
    (size, count): (u64, u32),
    write: bool,
    mut random: Option<Rng>,
) -> Result<()> {
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    let mut buffer = pages(size as usize / 4096);
    let places = DATA / size;
    for n in 0..u64::from(count) {
        let place = match &mut random {
            Some(rng) => rng.between(0, places),
            None => n % places,
        };
        if write {
            file.write_all_at(buffer.as_bytes(), place * size)?;
        } else {
            file.read_exact_at(buffer.as_mut_bytes(), place * size)?;
        }
    }
    Ok(())
}

/// The directory that both servers serve parts of.
struct Backing {
    path: PathBuf,
    tmpfs: bool,
}

impl Backing {
    fn new(args: &Args, scratch: &Path) -> Result<Backing> {
        let tmpfs = args.backing.is_none();
        let path = match &args.backing {
            Some(dir) => nix::unistd::mkdtemp(&dir.join("fuse-restart-bench.XXXXXX"))
                .with_context(|| format!("no directory below {}", dir.display()))?,
            None => {
                let path = scratch.join("back");
                fs::create_dir(&path)?;
                let none = None::<&str>;
                mount(
                    none,
                    &path,
                    Some("tmpfs"),
                    MsFlags::empty(),
                    Some("size=512m"),
                )
                .context("mounting a tmpfs")?;
                path
            }
        };
        for name in ["with", "without"] {
            fs::create_dir(path.join(name))?;
        }
        Ok(Backing { path, tmpfs })
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        if self.tmpfs {
            let _ = umount2(&self.path, MntFlags::MNT_DETACH);
            let _ = fs::remove_dir(&self.path);
        } else {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// A server under a keeper.
struct Mounted {
    keeper: Child,
    at: PathBuf,
}

impl Mounted {
    fn new(args: &Args, scratch: &Path, backing: &Path, journal: bool) -> Result<Mounted> {
        let own = std::env::current_exe().context("finding our own binary")?;
        let at = scratch.join(if journal { "mnt-with" } else { "mnt-without" });
        fs::create_dir(&at)?;
        let mut command = Command::new(&own);
        command.args(["keep", "--max-restarts", "0", "--mountpoint"]);
        command.arg(&at).arg("--").arg(&own);
        command.args([
            "serve",
            "passthrough",
            "--threads",
            &args.threads.to_string(),
        ]);
        if !journal {
            command.arg("--no-journal");
        }
        let keeper = command
            .arg(backing)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .env("RUST_LOG", "error")
            .spawn()
            .context("starting a keeper")?;
        let mut mounted = Mounted { keeper, at };
        let start = Instant::now();
        while mount_at(&mounted.at)?.is_none() {
            if let Some(status) = mounted.keeper.try_wait()? {
                bail!("the keeper ended ({status}) before it had mounted; it says above why");
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "no mount at {} after {PATIENCE:?}",
                mounted.at.display()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
        // Waits for the first answer, or says that there is none.
        fs::metadata(&mounted.at).context("the server does not answer")?;
        Ok(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.keeper.id() as i32), Signal::SIGTERM);
        let _ = self.keeper.wait();
        let _ = fs::remove_dir(&self.at);
    }
}
