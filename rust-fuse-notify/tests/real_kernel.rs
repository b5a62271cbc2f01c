// SPDX-License-Identifier: GPL-2.0
//! A server on fuser is killed and comes back, on the kernel that runs the tests.
//!
//! On a kernel without the series this is the fallback: requests are resent. On one with it, it is the recovery.
//! Needs root and a `/dev/fuse` that can be mounted; without, it says so and does nothing.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::sync::Arc;
use std::time::Duration;

use fuser::{
    Errno, FileHandle as Fh, INodeNo, InitFlags, KernelConfig, OpenFlags, Request, Session,
    SessionACL,
};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use rust_fuse_notify::std::adopt::{Adopt, Recover, ServerError};
use rust_fuse_notify::std::listen;
use rust_fuse_notify::std::message::{Replay, Report};
use rust_fuse_notify::std::notify::{Notifier, NotifyError, Support};
use rust_fuse_notify::std::state::{Config, FileHandle, Keep, NewNode, NodeFlags, State};
use rust_fuse_notify::std::wire::{is_resent, Attr, Identity, FUSE_RESTARTABLE};

const IDENTITY: Identity = Identity([0x1234, 0x5678]);
const CONTENT: &[u8] = b"still here\n";
/// Nothing on this machine takes as long; what does is hanging.
const LONG: Duration = Duration::from_secs(60);

// ---- the server: a root with files that are named by one letter ----

struct Letters(Arc<State>);

fn node(letter: u8) -> NewNode {
    NewNode {
        handle: FileHandle::new(1, &[letter]).expect("one byte"),
        domain: 0,
        generation: 0,
        ino: u64::from(letter),
        mode: if letter == 1 {
            libc::S_IFDIR | 0o755
        } else {
            libc::S_IFREG | 0o644
        },
        flags: NodeFlags::NONE,
        aux: [0; 4],
    }
}

fn attr(node: &NewNode) -> fuser::FileAttr {
    let time = std::time::UNIX_EPOCH;
    let kind = if node.mode & libc::S_IFMT == libc::S_IFDIR {
        fuser::FileType::Directory
    } else {
        fuser::FileType::RegularFile
    };
    fuser::FileAttr {
        ino: INodeNo(node.ino),
        size: CONTENT.len() as u64,
        blocks: 1,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm: (node.mode & 0o777) as u16,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl fuser::Filesystem for Letters {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        die_if("DIE_IN_INIT", 1);
        // Refused by kernels without the series.
        let _ = config.add_capabilities(InitFlags::from_bits_retain(FUSE_RESTARTABLE));
        Ok(())
    }

    fn lookup(&self, req: &Request, _parent: INodeNo, name: &OsStr, reply: fuser::ReplyEntry) {
        let [letter] = *name.as_encoded_bytes() else {
            return reply.error(Errno::ENOENT);
        };
        if letter == b'z' && !is_resent(req.unique().0) {
            // Never answered by the instance that got it first.
            println!("STALLED");
            return std::mem::forget(reply);
        }
        match self.0.nodes().lookup(&node(letter)) {
            Ok(node) => {
                // fuser takes the nodeid from the attributes.
                let attr = fuser::FileAttr {
                    ino: INodeNo(node.nodeid),
                    ..attr(&node.info)
                };
                reply.entry(&Duration::ZERO, &attr, fuser::Generation(0));
            }
            Err(_) => reply.error(Errno::ENOMEM),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<Fh>, reply: fuser::ReplyAttr) {
        match self.0.nodes().get(ino.0) {
            Some(node) => reply.attr(
                &Duration::ZERO,
                &fuser::FileAttr {
                    ino,
                    ..attr(&node.info)
                },
            ),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: Fh,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock: Option<fuser::LockOwner>,
        reply: fuser::ReplyData,
    ) {
        if self.0.nodes().get(ino.0).is_none() {
            return reply.error(Errno::ESTALE);
        }
        let rest = CONTENT.get(offset as usize..).unwrap_or_default();
        reply.data(&rest[..rest.len().min(size as usize)]);
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        if let Some(node) = self.0.nodes().forget(ino.0, nlookup) {
            self.0.remove_node(node.nodeid);
        }
    }
}

/// Counts its replays.
struct Recovery(u32);

/// The n-th time that it is called, if the variable says n.
fn die_if(variable: &str, nth: u32) {
    if std::env::var(variable).is_ok_and(|at| at == nth.to_string()) {
        nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).expect("kill");
    }
}

impl Recover for Recovery {
    fn replay(&mut self, state: &State, replay: &Replay) -> Result<Attr, i32> {
        self.0 += 1;
        die_if("DIE_AT_REPLAY", self.0);
        let node = state.nodes().replayed(replay)?;
        let ino = if replay.nodeid == 1 { 1 } else { replay.nodeid };
        Ok(Attr {
            ino,
            mode: node.info.mode,
            nlink: 1,
            size: CONTENT.len() as u64,
            ..Attr::default()
        })
    }
    fn finish(&mut self, state: &State, report: Option<&Report>) -> Result<(), ServerError> {
        die_if("DIE_IN_FINISH", 1);
        if let Some(report) = report {
            state.settle(report, |_| Keep::Drop);
        }
        Ok(())
    }
}

/// One instance; run by the tests below in a process of its own.
#[test]
#[ignore = "run by the other tests"]
fn instance() {
    std::env::set_var("LISTEN_PID", std::process::id().to_string());
    let inherited = listen::adopt_from_environment().expect("descriptors");
    let config = Config {
        nodes: 1000,
        handles: 100,
        journal: 16,
        arena_pages: 0,
    };
    let state = Arc::new(State::open(inherited.state, IDENTITY, &config).expect("state"));
    state.nodes().set_root(&node(1));
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(3);
    let letters = Letters(state.clone());
    let adopted = Adopt::new(inherited.device, state)
        .run(&mut Recovery(0), |fd| {
            Session::from_fd(letters, fd, SessionACL::All, config)
        })
        .expect("adoption");
    println!("HOW {:?}", adopted.how);
    adopted.session.run().expect("session");
    println!("ENDED");
}

// ---- the keeper ----

struct Mounted {
    device: OwnedFd,
    state: OwnedFd,
    dir: PathBuf,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.dir);
    }
}

fn above_the_passed_ones(fd: OwnedFd) -> OwnedFd {
    let fd = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(10)).expect("dup");
    // SAFETY: just made, nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A mount, or the reason why there is none.
fn fresh_mount(name: &str) -> Result<Mounted, String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("not root".into());
    }
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|e| format!("/dev/fuse: {e}"))?;
    let device = above_the_passed_ones(device.into());
    let dir = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    if let Err(error) = mount(
        Some("letters"),
        &dir,
        Some("fuse"),
        flags,
        Some(data.as_str()),
    ) {
        let _ = std::fs::remove_dir(&dir);
        return Err(format!("mounting: {error}"));
    }
    let state = above_the_passed_ones(State::create_memfd().expect("memfd"));
    Ok(Mounted { device, state, dir })
}

fn pidfd(pid: u32) -> OwnedFd {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .expect("pidfd_open");
    // SAFETY: just made, nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

struct Instance(Child, BufReader<ChildStdout>);

impl Instance {
    /// The next line that begins with `word`.
    fn wait_for(&mut self, word: &str) -> String {
        for line in self.1.by_ref().lines() {
            let line = line.expect("the instance's output");
            eprintln!("instance {}: {line}", self.0.id());
            if let Some(at) = line.find(word) {
                return line[at..].to_owned();
            }
        }
        panic!(
            "the instance ended without saying {word}: {:?}",
            self.0.wait()
        );
    }

    /// Waits until it has killed itself.
    fn dies(&mut self) {
        let pidfd = pidfd(self.0.id());
        let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(LONG).expect("short enough");
        if nix::poll::poll(&mut fds, timeout) == Ok(0) {
            self.kill();
            let mut output = String::new();
            let _ = self.1.read_to_string(&mut output);
            panic!("the instance did not come to where it dies: {output}");
        }
        assert_eq!(self.0.wait().expect("wait").signal(), Some(libc::SIGKILL));
    }

    fn kill(&mut self) {
        self.0.kill().expect("kill");
        assert_eq!(self.0.wait().expect("wait").signal(), Some(libc::SIGKILL));
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Mounted {
    fn start(&self, env: &[(&str, &str)]) -> Instance {
        let (device, state) = (
            self.device.as_fd().as_raw_fd(),
            self.state.as_fd().as_raw_fd(),
        );
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        command
            .args([
                "--ignored",
                "--exact",
                "--nocapture",
                "--test-threads=1",
                "instance",
            ])
            .env("LISTEN_FDS", "2")
            .env("LISTEN_FDNAMES", "fusedev:fusestate")
            .envs(env.iter().copied())
            .stdout(Stdio::piped());
        // SAFETY: dup2 may be called after fork; both sources are above 9, so neither is overwritten.
        unsafe {
            command.pre_exec(move || {
                if libc::dup2(device, 3) < 0 || libc::dup2(state, 4) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let mut child = command.spawn().expect("spawn");
        let output = child.stdout.take().expect("piped");
        Instance(child, BufReader::new(output))
    }

    /// An application, in a thread: a hang is a failure, not a hang of the test.
    fn app<T: Send + 'static>(
        &self,
        work: impl FnOnce(PathBuf) -> T + Send + 'static,
    ) -> mpsc::Receiver<T> {
        let (sender, receiver) = mpsc::channel();
        let dir = self.dir.clone();
        std::thread::spawn(move || sender.send(work(dir)));
        receiver
    }

    fn read(&self, name: &'static str) -> Vec<u8> {
        let result = self.app(move |dir| std::fs::read(dir.join(name)));
        result
            .recv_timeout(LONG)
            .expect("the read hangs")
            .expect("read")
    }
}

macro_rules! mounted_or_skip {
    ($name:literal) => {
        match fresh_mount($name) {
            Ok(mounted) => mounted,
            Err(reason) => {
                eprintln!("SKIPPED: {reason}");
                return;
            }
        }
    };
}

#[test]
fn a_killed_server_comes_back() {
    let mounted = mounted_or_skip!("restart-letters");
    let mut first = mounted.start(&[]);
    let how = first.wait_for("HOW ");
    let granted = how.contains("Granted") && !how.contains("NotGranted");
    assert_eq!(mounted.read("a"), CONTENT);
    let open = mounted.app(|dir| File::open(dir.join("b")));
    let mut open = open.recv_timeout(LONG).expect("open hangs").expect("open");
    // This one is in the dead server's hands when it dies.
    let stalled = mounted.app(|dir| std::fs::metadata(dir.join("z")));
    first.wait_for("STALLED");
    first.kill();
    let mut second = mounted.start(&[]);
    let how = second.wait_for("HOW ");
    assert!(
        how.starts_with(if granted {
            "HOW Recovered"
        } else {
            "HOW Resent"
        }),
        "{how}"
    );
    let metadata = stalled
        .recv_timeout(LONG)
        .expect("the request was never answered")
        .expect("stat");
    assert_eq!(metadata.len(), CONTENT.len() as u64);
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut content = Vec::new();
        sender.send(open.read_to_end(&mut content).map(|_| content))
    });
    let content = receiver
        .recv_timeout(LONG)
        .expect("the old descriptor hangs")
        .expect("read");
    assert_eq!(content, CONTENT);
    umount2(&mounted.dir, MntFlags::MNT_DETACH).expect("unmount");
    second.wait_for("ENDED");
}

#[test]
fn init_that_a_dead_server_had_read_is_answered_by_the_next() {
    let mounted = mounted_or_skip!("restart-init");
    mounted.start(&[("DIE_IN_INIT", "1")]).dies();
    let stage = State::peek(mounted.state.as_fd()).expect("peek");
    assert_eq!(stage, rust_fuse_notify::std::state::Stage::BeforeInit);
    let mut second = mounted.start(&[]);
    assert!(second.wait_for("HOW ").starts_with("HOW First"));
    assert_eq!(mounted.read("a"), CONTENT);
}

/// Dies in each phase of its recovery, one instance after the other; the last one lives.
#[test]
fn killed_while_it_recovers() {
    let mounted = mounted_or_skip!("restart-again");
    let mut first = mounted.start(&[]);
    if !first.wait_for("HOW ").contains("First(Granted)") {
        eprintln!("SKIPPED: this kernel does not recover");
        return;
    }
    // The instances that are started below close their copies of the open files at exec, and would wait there for
    // an answer to FLUSH that only they could give. The first FLUSH tells the kernel that this server wants none.
    assert_eq!(mounted.read("a"), CONTENT);
    let mut open = Vec::new();
    for name in ["a", "b", "c", "d", "e", "f", "g"] {
        let file = mounted.app(move |dir| File::open(dir.join(name)));
        open.push(file.recv_timeout(LONG).expect("open hangs").expect("open"));
    }
    first.kill();
    let deaths = [
        ("DIE_AT_REPLAY", "1"),
        ("DIE_AT_REPLAY", "2"),
        ("DIE_AT_REPLAY", "8"),
        ("DIE_IN_FINISH", "1"),
        ("DIE_IN_INIT", "1"),
    ];
    for death in deaths {
        eprintln!("{death:?}");
        mounted.start(&[death]).dies();
        // A keeper that says so at once must not disturb the server's own.
        let notifier = Notifier::new(mounted.device.as_fd());
        notifier
            .restarted(Notifier::cookie(), Identity::UNSAID)
            .expect("RESTARTED by the keeper");
    }
    let mut last = mounted.start(&[]);
    let how = last.wait_for("HOW ");
    assert!(
        how.contains("replayed: 8, confirmed: 8, revoked: 0"),
        "{how}"
    );
    let epoch = 1 + 2 * deaths.len();
    assert!(how.contains(&format!("epoch: {epoch},")), "{how}");
    for mut file in open {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let mut content = Vec::new();
            sender.send(file.read_to_end(&mut content).map(|_| content))
        });
        assert_eq!(
            receiver
                .recv_timeout(LONG)
                .expect("an old descriptor hangs")
                .expect("read"),
            CONTENT
        );
    }
}

/// The errors of the design, each on a real connection, and that it goes on after them.
#[test]
fn notifications_that_are_refused() {
    let mounted = mounted_or_skip!("restart-refused");
    let notifier = Notifier::new(mounted.device.as_fd());
    let wrong = Identity([1, 2]);
    // Before INIT.
    assert_eq!(notifier.probe().expect("probe"), Support::OldKernel);
    let before = notifier.initialized().expect("NOTIFY_POLL");
    let mut first = mounted.start(&[]);
    let granted = first.wait_for("HOW ").contains("First(Granted)");
    assert!(notifier.initialized().expect("NOTIFY_POLL"));
    if granted {
        assert!(!before, "6.18 says yes before INIT, but 7.3 must not");
        assert_eq!(notifier.probe().expect("probe"), Support::Granted);
        let error = notifier
            .restarted(Notifier::cookie(), wrong)
            .expect_err("wrong identity");
        assert!(matches!(error, NotifyError::WrongIdentity(_)), "{error}");
        let error = notifier
            .commit(Notifier::cookie(), 1, IDENTITY)
            .expect_err("nothing to commit");
        assert!(
            matches!(error, NotifyError::WrongEpoch { epoch: 1 }),
            "{error}"
        );
    } else {
        assert_eq!(notifier.probe().expect("probe"), Support::OldKernel);
        let error = notifier
            .restarted(Notifier::cookie(), wrong)
            .expect_err("old kernel");
        assert!(matches!(error, NotifyError::NotUnderstood), "{error}");
    }
    assert_eq!(mounted.read("a"), CONTENT);
    if granted {
        first.kill();
        notifier
            .restarted(Notifier::cookie(), Identity::UNSAID)
            .expect("RESTARTED by the keeper");
        assert!(matches!(notifier.resend(), Err(NotifyError::Recovering)));
        let mut second = mounted.start(&[]);
        assert!(second.wait_for("HOW ").contains("confirmed: 2, revoked: 0"));
        assert_eq!(mounted.read("a"), CONTENT);
    }
    umount2(&mounted.dir, MntFlags::MNT_DETACH).expect("unmount");
    assert_eq!(notifier.probe().expect("probe"), Support::OldKernel);
}
