// SPDX-License-Identifier: GPL-2.0
//! One mount with its scripted server and its applications.
//!
//! The server side runs in the scenario's own thread: it reads a message when the scenario says so. "The server
//! dies" therefore means that the scenario stops answering; what it read stays unanswered, exactly as the kernel
//! sees it when a keeper still holds the descriptor.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use nix::errno::Errno;
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use zerocopy::IntoBytes;

use super::app::{describe, App, AppWatch, Bell};
use super::ctl::Connection;
use super::dev::{Device, Read1, MAX_WRITE};
use super::env::Env;
use super::msg::Message;
use super::sleeper::Sleeper;
use super::tree::{Answer, Tree};
use super::wait::wait_for;
use super::wire::{init, op, ForgetOne, InitIn, InitOut, InterruptIn};

pub const IDENTITY: [u64; 2] = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];

/// What the scripted server says in its INIT reply, and how it mounts.
#[derive(Clone, Debug)]
pub struct Config {
    /// Flags to return, whether the kernel offered them or not.
    pub flags: u64,
    pub identity: [u64; 2],
    /// Of the protocol.
    pub minor: u32,
    pub max_background: u16,
    pub max_readahead: u32,
    pub max_stack_depth: u32,
    /// Whether to answer INIT at all.
    pub answer_init: bool,
    /// Mount options beside the usual ones.
    pub options: &'static str,
    /// Mount this block device as `fuseblk`.
    pub device: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            flags: init::INIT_EXT
                | init::ASYNC_READ
                | init::BIG_WRITES
                | init::PARALLEL_DIROPS
                | init::RESTARTABLE,
            identity: IDENTITY,
            minor: 40,
            max_background: 12,
            max_readahead: 128 << 10,
            max_stack_depth: 0,
            answer_init: true,
            options: "",
            device: None,
        }
    }
}

impl Config {
    /// A server that does not sign the contract.
    pub fn unsigned() -> Config {
        let config = Config::default();
        Config {
            flags: config.flags & !init::RESTARTABLE,
            identity: [0; 2],
            ..config
        }
    }

    pub fn with(flags: u64) -> Config {
        let config = Config::default();
        Config {
            flags: config.flags | flags,
            ..config
        }
    }
}

pub struct Kit<'a> {
    pub env: &'a Env<'a>,
    pub dev: Device,
    pub tree: Tree,
    pub conn: Connection,
    /// The mount point.
    pub mnt: PathBuf,
    pub config: Config,
    /// What the kernel offered in INIT.
    pub offered: u64,
    /// RESTARTEDs the kernel has accepted so far.
    pub epoch: u32,
    pub patience: Duration,
    /// Everything that FORGETs gave back since the start, in order.
    pub forgotten: Vec<ForgetOne>,
    /// Ids named by INTERRUPT messages, in order.
    pub interrupts: Vec<u64>,
    /// What was answered honestly on the way to something else; scenarios clear and read it.
    pub served: Vec<Message>,
    /// The thread of a dead server that sleeps in a copy.
    pub sleeper: Option<Sleeper>,
    pub(super) cookie: u64,
    bell: Bell,
    watched: Vec<AppWatch>,
    mounted: bool,
}

impl<'a> Kit<'a> {
    /// Opens the device, mounts it in a private directory and answers INIT as `config` says.
    pub fn mount(env: &'a Env<'a>, config: Config) -> Result<Kit<'a>> {
        let dev = Device::open("/dev/fuse").context("cannot open /dev/fuse")?;
        let mnt = nix::unistd::mkdtemp(&env.scratch.join("mnt.XXXXXX"))
            .context("no directory to mount on")?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other{}{}",
            dev.raw(),
            if config.options.is_empty() { "" } else { "," },
            config.options
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let (source, kind) = match &config.device {
            Some(device) => (device.as_path(), "fuseblk"),
            None => (Path::new("fuse-restart-scenario"), "fuse"),
        };
        mount(
            Some(source),
            &mnt,
            Some(kind),
            flags,
            Some(options.as_str()),
        )
        .with_context(|| format!("cannot mount on {}", mnt.display()))?;
        let conn = Connection {
            id: connection_id(&mnt)?,
        };
        env.ids.add(conn.id);
        let mut kit = Kit {
            env,
            dev,
            tree: Tree::default(),
            conn,
            mnt,
            config,
            offered: 0,
            epoch: 0,
            patience: env.patience,
            forgotten: Vec::new(),
            interrupts: Vec::new(),
            served: Vec::new(),
            sleeper: None,
            cookie: 0,
            bell: Bell::new()?,
            watched: Vec::new(),
            mounted: true,
        };
        if kit.config.answer_init {
            let init = kit.read_init()?;
            kit.answer_init(&init)?;
        }
        Ok(kit)
    }

    /// Mounts as a server that signs, and insists that the kernel granted it.
    pub fn granted(env: &'a Env<'a>) -> Result<Kit<'a>> {
        Kit::granted_with(env, Config::default())
    }

    pub fn granted_with(env: &'a Env<'a>, config: Config) -> Result<Kit<'a>> {
        let kit = Kit::mount(env, config)?;
        let probe = kit.dev.probe();
        ensure!(
            probe == Errno::ESTALE,
            "the probe says {probe}, not ESTALE: FUSE_RESTARTABLE was not granted"
        );
        Ok(kit)
    }

    pub fn read_init(&mut self) -> Result<Message> {
        let m = self.next().context("no INIT arrived")?;
        ensure!(m.is(op::INIT), "expected INIT, got {m}");
        let arg: InitIn = m.arg()?;
        self.offered = u64::from(arg.flags) | (u64::from(arg.flags2) << 32);
        Ok(m)
    }

    pub fn answer_init(&mut self, m: &Message) -> Result<()> {
        let out = self.init_out();
        self.dev
            .reply_ok(m.unique(), out.as_bytes())
            .context("the kernel refused the INIT reply")
    }

    pub fn init_out(&self) -> InitOut {
        InitOut {
            major: 7,
            minor: self.config.minor,
            max_readahead: self.config.max_readahead,
            flags: self.config.flags as u32,
            flags2: (self.config.flags >> 32) as u32,
            max_background: self.config.max_background,
            congestion_threshold: self.config.max_background.div_ceil(2),
            max_write: MAX_WRITE,
            time_gran: 1,
            max_stack_depth: self.config.max_stack_depth,
            identity: self.config.identity,
            ..Default::default()
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.mnt.join(name)
    }

    // ---- the server's side -------------------------------------------------------------------

    /// The next message, whatever it is. Forgets and interrupts are noted.
    pub fn next(&mut self) -> Result<Message> {
        match self.dev.read(self.patience)? {
            Read1::Message(m) => self.note(m),
            Read1::Nothing => bail!(
                "no message arrived within {:.1} s{}",
                self.patience.as_secs_f64(),
                self.situation()
            ),
            Read1::Failed(e) => bail!("reading the device failed: {e}{}", self.situation()),
        }
    }

    fn note(&mut self, m: Message) -> Result<Message> {
        match m.opcode() {
            op::FORGET | op::BATCH_FORGET => {
                self.forgotten.extend(m.forgets()?);
                self.tree.apply(&m)?;
            }
            op::INTERRUPT => self.interrupts.push(m.arg::<InterruptIn>()?.unique),
            _ => {}
        }
        Ok(m)
    }

    /// The next message that wants an answer.
    pub fn next_request(&mut self) -> Result<Message> {
        loop {
            let m = self.next()?;
            if !m.wants_no_reply() {
                return Ok(m);
            }
        }
    }

    /// Whether a message can be read right now.
    pub fn readable(&self) -> Result<bool> {
        Ok(self
            .dev
            .poll(PollFlags::POLLIN, Duration::ZERO)?
            .contains(PollFlags::POLLIN))
    }

    /// Executes the request on the toy tree and answers it.
    pub fn answer(&mut self, m: &Message) -> Result<()> {
        let answer = self.tree.apply(m)?;
        self.send(m, &answer)
    }

    pub fn send(&mut self, m: &Message, answer: &Answer) -> Result<()> {
        let result = match answer {
            Answer::Nothing => return Ok(()),
            Answer::Ok(payload) => self.dev.reply_ok(m.unique(), payload),
            Answer::Err(errno) => self.dev.reply_error(m.unique(), *errno),
        };
        if result == Err(Errno::ENOENT) {
            // The requester is gone: nothing was taken.
            self.tree.undo(m, answer);
        }
        result.with_context(|| format!("the kernel refused the answer to {m}"))
    }

    /// Answers everything honestly until a message comes for which `wanted` says yes; that one is returned
    /// unanswered.
    pub fn until(&mut self, what: &str, wanted: impl Fn(&Message) -> bool) -> Result<Message> {
        let deadline = Instant::now() + self.patience;
        loop {
            let m = self
                .next()
                .with_context(|| format!("while waiting for {what}"))?;
            if wanted(&m) {
                return Ok(m);
            }
            ensure!(
                Instant::now() < deadline,
                "{what} did not come; the last message was {m}"
            );
            if !m.wants_no_reply() {
                self.answer(&m)?;
            }
        }
    }

    pub fn until_op(&mut self, opcode: u32) -> Result<Message> {
        self.until(&op::name(opcode), |m| m.is(opcode))
    }

    /// Like [`Kit::until_op`], but `None` when the application ends first.
    pub fn until_op_or_end<T: Send + 'static>(
        &mut self,
        opcode: u32,
        app: &App<T>,
    ) -> Result<Option<Message>> {
        let deadline = Instant::now() + self.patience;
        loop {
            self.bell.silence();
            if app.done() {
                return Ok(None);
            }
            if !self.wait_event(&op::name(opcode), deadline)? {
                continue;
            }
            let Read1::Message(m) = self.dev.read(Duration::ZERO)? else {
                continue;
            };
            let m = self.note(m)?;
            if m.is(opcode) {
                return Ok(Some(m));
            }
            if !m.wants_no_reply() {
                self.answer(&m)?;
            }
        }
    }

    /// Waits for the device to become readable (true) or for something that may have changed otherwise.
    fn wait_event(&self, what: &str, deadline: Instant) -> Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(
            !left.is_zero(),
            "{what} did not happen within {:.1} s{}",
            self.patience.as_secs_f64(),
            self.situation()
        );
        // Conditions of procfs and fusectl wake nobody up: look at them now and then.
        let millis = PollTimeout::from(left.as_millis().clamp(1, 20) as u8);
        let mut fds = [
            PollFd::new(self.dev.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.bell.fd(), PollFlags::POLLIN),
        ];
        match nix::poll::poll(&mut fds, millis) {
            Err(Errno::EINTR) => Ok(false),
            Err(e) => Err(e.into()),
            Ok(_) => Ok(fds[0].revents().is_some_and(|r| !r.is_empty())),
        }
    }

    /// Serves honestly until `done` holds, which is looked at after every message and every finished application.
    /// Patience is lost when nothing happens any more, not when much is to be done.
    pub fn serve_until(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut Self) -> Result<bool>,
    ) -> Result<()> {
        let mut deadline = Instant::now() + self.patience;
        loop {
            self.bell.silence();
            if done(self)? {
                return Ok(());
            }
            if self.wait_event(what, deadline)? {
                deadline = Instant::now() + self.patience;
                self.try_serve_one()
                    .with_context(|| format!("while waiting for {what}"))?;
            }
        }
    }

    /// Reads a message, if one can be had right now, and answers it honestly.
    fn try_serve_one(&mut self) -> Result<()> {
        let m = match self.dev.read(Duration::ZERO)? {
            Read1::Message(m) => self.note(m)?,
            // Poll had promised one, but the kernel has ended it since: its inode is revoked, its application killed.
            Read1::Nothing => return Ok(()),
            Read1::Failed(e) => bail!("reading the device failed: {e}{}", self.situation()),
        };
        if !m.wants_no_reply() {
            self.answer(&m)?;
        }
        self.served.push(m);
        Ok(())
    }

    /// Serves until the application has finished, and takes its result.
    pub fn serve<T: Send + 'static>(&mut self, app: &App<T>) -> Result<T> {
        let (what, tid) = (app.what.clone(), app.tid);
        self.serve_until(&what, |_| Ok(app.done()))
            .with_context(|| describe(tid))?;
        app.take()
            .with_context(|| format!("the result of {what} was taken before"))
    }

    /// Runs one application from start to end.
    pub fn run<T: Send + 'static>(
        &mut self,
        what: &str,
        run: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let app = self.app(what, run)?;
        self.serve(&app)
    }

    /// Serves until nothing is under way any more: no request is waiting, nothing can be read.
    pub fn settle(&mut self) -> Result<()> {
        self.serve_until("quiescence", |kit| {
            Ok(!kit.readable()? && kit.conn.waiting()? == 0 && !kit.readable()?)
        })
    }

    // ---- the applications' side ----------------------------------------------------------------

    /// Starts an application in a thread.
    pub fn app<T: Send + 'static>(
        &mut self,
        what: &str,
        run: impl FnOnce() -> T + Send + 'static,
    ) -> Result<App<T>> {
        let (app, watch) = App::spawn(what, &self.bell, run)?;
        self.watched.push(watch);
        Ok(app)
    }

    /// Starts an application on a path below the mount.
    pub fn on<T: Send + 'static>(
        &mut self,
        what: &str,
        name: &str,
        run: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> Result<App<T>> {
        let path = self.path(name);
        self.app(&format!("{what} {name}"), move || run(&path))
    }

    /// Runs an application on a path from start to end.
    pub fn run_on<T: Send + 'static>(
        &mut self,
        what: &str,
        name: &str,
        run: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> Result<T> {
        let app = self.on(what, name, run)?;
        self.serve(&app)
    }

    /// Starts an application whose request nobody shall read yet: it returns when `waiting` counts `n` requests and
    /// the application sleeps.
    pub fn parked<T: Send + 'static>(
        &mut self,
        what: &str,
        name: &str,
        n: u64,
        run: impl FnOnce(&Path) -> T + Send + 'static,
    ) -> Result<App<T>> {
        let app = self.on(what, name, run)?;
        self.conn
            .wait_waiting(n, self.patience)
            .with_context(|| app.what.clone())?;
        app.wait_asleep(self.patience)?;
        Ok(app)
    }

    /// What the kernel says about the connection, for error messages.
    pub fn situation(&self) -> String {
        let waiting = self
            .conn
            .waiting()
            .map_or("gone".to_owned(), |n| n.to_string());
        let recovery = self.conn.recovery().ok().flatten();
        let state = recovery.map_or("no recovery file".to_owned(), |r| {
            format!("state {}", r.state())
        });
        let hanging: Vec<&str> = self
            .watched
            .iter()
            .filter(|w| !w.done())
            .map(|w| w.what.as_str())
            .collect();
        format!(" (waiting {waiting}, {state}, applications under way: {hanging:?})")
    }

    /// Says that the mount is gone, when an application has unmounted it.
    pub fn was_unmounted(&mut self) {
        self.mounted = false;
    }

    /// Ends the connection and checks that this ends every application. Called by `Drop` as well.
    pub fn finish(&mut self) {
        if self.conn.exists() {
            if let Err(e) = self.conn.abort() {
                self.env
                    .problem(format!("cannot abort connection {}: {e}", self.conn.id));
            }
        }
        self.sleeper = None;
        for watch in self.watched.drain(..) {
            if wait_for("the end of an application", self.patience, || {
                Ok(watch.done())
            })
            .is_err()
            {
                self.env.problem(format!(
                    "{} hangs although the connection was aborted; {}",
                    watch.what,
                    describe(watch.tid)
                ));
            }
        }
        if std::mem::take(&mut self.mounted) {
            if let Err(e) = umount2(&self.mnt, MntFlags::MNT_DETACH) {
                self.env
                    .problem(format!("cannot detach {}: {e}", self.mnt.display()));
            }
        }
        let _ = fs::remove_dir(&self.mnt);
    }
}

impl Drop for Kit<'_> {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The id under which fusectl shows the mount: the device number as the kernel keeps it, which mountinfo has in two
/// parts. A `stat` would need the server.
fn connection_id(mnt: &Path) -> Result<u32> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read mountinfo")?;
    parse_connection_id(&table, &mnt.display().to_string())
        .with_context(|| format!("{} is not in mountinfo", mnt.display()))
}

fn parse_connection_id(table: &str, mnt: &str) -> Option<u32> {
    let line = table
        .lines()
        .rev()
        .find(|l| l.split(' ').nth(4) == Some(mnt))?;
    let (major, minor) = line.split(' ').nth(2)?.split_once(':')?;
    Some(major.parse::<u32>().ok()? << 20 | minor.parse::<u32>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_connection_is_the_device_number_of_the_topmost_mount() {
        let table = "20 1 0:5 / /tmp/a rw - tmpfs x rw\n21 20 0:77 / /tmp/b rw - fuse f rw\n22 21 0:78 / /tmp/b rw - fuse f rw\n";
        assert_eq!(parse_connection_id(table, "/tmp/b"), Some(78));
        assert_eq!(parse_connection_id(table, "/tmp/c"), None);
        let block = "20 1 7:3 / /m rw - fuseblk /dev/loop3 rw\n";
        assert_eq!(parse_connection_id(block, "/m"), Some((7 << 20) | 3));
    }
}
