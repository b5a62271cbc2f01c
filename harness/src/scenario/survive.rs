// SPDX-License-Identifier: GPL-2.0
//! What survives a recovery: locks, handles of NFS and of nobody, mappings of ids, lookups that wait for each other.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};
use libc::S_IFDIR;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::wait::WaitStatus;

use super::bad_input::Uring;
use super::help::{expect_errno, expect_resent, open, populate, populated, still_serves};
use super::lost::{as_user, evict, lose, node, Staged};
use super::Scenario;
use crate::raw::app::Proc;
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit};
use crate::raw::msg::Message;
use crate::raw::ops::{self, Done};
use crate::raw::rare::{self, Lock};
use crate::raw::wire::{init, op, ROOT};

pub fn scenarios() -> Vec<Scenario> {
    let mut all = Vec::new();
    for lock in [Lock::Posix, Lock::Ofd, Lock::Flock] {
        all.push(Scenario::series(
            format!("survive/lock-local-{lock:?}").to_lowercase(),
            "a local lock is held through recoveries, and needs no server",
            move |env| lock_local(env, lock),
        ));
    }
    all.extend([
        Scenario::series(
            "survive/lock-remote",
            "who waits for a remote lock asks the new server, its holder gives it back there",
            lock_remote,
        ),
        Scenario::series(
            "survive/idmapped",
            "an idmapped mount maps the same ids, in held requests too",
            idmapped,
        ),
        Scenario::series(
            "survive/no-open",
            "files that were opened without a server's handle go on, and are not opened again",
            no_open,
        ),
        Scenario::series(
            "survive/handle",
            "file handles open what they named, cached or not, also while held",
            handle,
        ),
        Scenario::series(
            "survive/handle-deep",
            "the handle of a directory that is not cached finds its way to the root",
            handle_deep,
        ),
        Scenario::series(
            "survive/handle-no-export",
            "without export support a handle opens what is cached, and nothing else",
            handle_no_export,
        ),
        Scenario::series(
            "survive/parallel-lookups",
            "who waits for another's lookup of the same name gets its result",
            |env| parallel_lookups(env, false),
        ),
        Scenario::series(
            "survive/parallel-lookups-revoked",
            "who waits for a lookup in a directory that is revoked gets EIO",
            |env| parallel_lookups(env, true),
        ),
        Scenario::series(
            "survive/refusal-said",
            "a connection with passthrough is not granted, and the log says why",
            |env| {
                if !env.support.passthrough {
                    return skip("no passthrough here");
                }
                let config = Config {
                    max_stack_depth: 1,
                    ..Config::with(init::PASSTHROUGH)
                };
                refusal_said(env, config)
            },
        ),
        Scenario::series(
            "survive/refusal-said-io-uring",
            "so does it of one with io_uring",
            |env| {
                let _on = Uring::on()?;
                refusal_said(env, Config::with(init::OVER_IO_URING))
            },
        ),
    ]);
    all
}

/// Another process asks for the lock: what it gets, 0 or an errno.
fn ask(kit: &mut Kit<'_>, name: &str, lock: Lock) -> Result<i32> {
    let path = kit.path(name);
    let mut child = Proc::spawn("an asker", &[kit.dev.raw()], || {
        let Ok(fd) = ops::open(&path, OFlag::O_RDWR) else {
            return 200;
        };
        lock.try_lock(fd).map_or_else(|e| e as i32, |()| 0)
    })?;
    kit.serve_until("the end of the asker", |_| child.ended())?;
    child.wait_code(kit.patience)
}

fn lock_local(env: &Env<'_>, lock: Lock) -> Result<()> {
    let mut kit = populated(env, 2)?;
    let fd = open(&mut kit, "f0", OFlag::O_RDWR)?;
    let second = open(&mut kit, "f1", OFlag::O_RDWR)?;
    // Held by another process, which does nothing else.
    let holder = Staged::start(
        &mut kit,
        "a holder of the lock",
        || lock.try_lock(fd).map_err(|e| e as i32),
        |()| 0,
    )?;
    kit.settle()?;
    for _ in 0..2 {
        kit.restarted()?;
        // No server: locks are taken and given back all the same.
        for what in [Lock::try_lock, Lock::unlock] {
            let app = kit.app("a lock while held", move || what(lock, second))?;
            let result = app.finish(kit.patience)?;
            ensure!(result == Ok(()), "while held a lock gave {result:?}");
        }
        let recovered = kit.answer_replays(&mut |_, _| None)?;
        kit.commit(&recovered)?;
        let code = ask(&mut kit, "f0", lock)?;
        ensure!(
            code == Errno::EAGAIN as i32,
            "the lock is held, but another process got {code} for it"
        );
    }
    let status = holder.go(&mut kit)?;
    ensure!(
        matches!(status, WaitStatus::Exited(_, 0)),
        "the holder ended with {status:?}"
    );
    if lock != Lock::Posix {
        // The open file has a second descriptor, here: the lock is its.
        kit.run("unlock", move || lock.unlock(fd))??;
    }
    let code = ask(&mut kit, "f0", lock)?;
    ensure!(code == 0, "the lock is free, but asking for it gave {code}");
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn lock_remote(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::POSIX_LOCKS | init::FLOCK_LOCKS))?;
    populate(&mut kit, 1)?;
    let (fd, other) = (
        open(&mut kit, "f0", OFlag::O_RDWR)?,
        open(&mut kit, "f0", OFlag::O_RDWR)?,
    );
    // struct fuse_lk_in: fh, owner, then the range.
    let owner = |m: &Message| -> Result<u64> { Ok(m.arg::<[u64; 2]>()?[1]) };
    let app = kit.app("lock", move || Lock::Ofd.try_lock(fd))?;
    let taken = kit.until_op(op::SETLK)?;
    kit.answer(&taken)?;
    ensure!(kit.serve(&app)? == Ok(()), "the lock");
    let waiter = kit.app("wait for the lock", move || {
        Lock::Ofd.set(other, true, true)
    })?;
    let waits = kit.until_op(op::SETLKW)?;
    kit.recover()?;
    let again = kit.next_request()?;
    expect_resent(&kit, &waits, &again)?;
    // The new server keeps what the last one granted; the waiter waits on.
    let app = kit.app("unlock", move || Lock::Ofd.unlock(fd))?;
    let given = kit.until_op(op::SETLK)?;
    ensure!(
        owner(&given)? == owner(&taken)? && owner(&again)? != owner(&taken)?,
        "owners: {:x} took it, {:x} gives it back, {:x} waits",
        owner(&taken)?,
        owner(&given)?,
        owner(&again)?
    );
    kit.answer(&given)?;
    ensure!(kit.serve(&app)? == Ok(()), "the unlock");
    kit.answer(&again)?;
    ensure!(kit.serve(&waiter)? == Ok(()), "the waiter");
    kit.check_counts()?;
    still_serves(&mut kit)
}

/// A copy of the mount through which id 0 of the file system is id 10000.
fn idmapped_copy(mnt: &Path) -> Result<OwnedFd> {
    use std::os::unix::ffi::OsStrExt;
    let (ready, tell) = nix::unistd::pipe()?;
    let (wait, go) = nix::unistd::pipe()?;
    let close = [ready.as_raw_fd(), go.as_raw_fd()];
    let child = Proc::spawn("a user namespace", &close, || {
        let flags = nix::sched::CloneFlags::CLONE_NEWUSER;
        if nix::sched::unshare(flags).is_err() {
            return 1;
        }
        let _ = nix::unistd::write(&tell, b"!");
        let _ = nix::unistd::read(&wait, &mut [0]);
        0
    })?;
    drop((tell, wait));
    if nix::unistd::read(&ready, &mut [0])? == 0 {
        return skip("no user namespaces");
    }
    let pid = child.tid();
    for map in ["uid_map", "gid_map"] {
        std::fs::write(format!("/proc/{pid}/{map}"), "0 10000 1000").context(map)?;
    }
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/user"))?;
    let path = std::ffi::CString::new(mnt.as_os_str().as_bytes())?;
    let attr = [0x10_0000u64, 0, 0, namespace.as_raw_fd() as u64];
    // SAFETY: NUL-terminated strings and a structure of 32 bytes; the descriptor is fresh.
    let tree = unsafe {
        let fd = Errno::result(libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            path.as_ptr(),
            1 | libc::O_CLOEXEC,
        ))
        .context("open_tree")?;
        let tree = OwnedFd::from_raw_fd(fd as RawFd);
        Errno::result(libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &attr,
            32,
        ))
        .context("mount_setattr")?;
        tree
    };
    drop(go);
    Ok(tree)
}

fn idmapped(env: &Env<'_>) -> Result<()> {
    let config = Config {
        options: "default_permissions",
        ..Config::with(init::ALLOW_IDMAP)
    };
    let mut kit = Kit::granted_with(env, config)?;
    kit.tree.node_mut(ROOT).mode = S_IFDIR | 0o777;
    populate(&mut kit, 1)?;
    let mnt = kit.mnt.clone();
    let tree = kit.run("an idmapped mount", move || idmapped_copy(&mnt))??;
    let base = PathBuf::from(format!("/proc/self/fd/{}", tree.as_raw_fd()));
    let owner = |kit: &mut Kit<'_>, name: &str| -> Result<u32> {
        let path = base.join(name);
        let stat = kit.run("stat", move || ops::stat(&path))?;
        Ok(stat.with_context(|| format!("stat of {name}"))?.stx_uid)
    };
    ensure!(owner(&mut kit, "f0")? == 10_000, "the mount maps nothing");
    let inside = base.clone();
    let app = kit.app("mkdir as a mapped user", move || {
        as_user(&inside, 10_005, || ops::mkdir(Path::new("made")))
    })?;
    let old = kit.until_op(op::MKDIR)?;
    ensure!(
        old.header.uid == 5,
        "the server sees uid {}",
        old.header.uid
    );
    kit.recover()?;
    let again = kit.next_request()?;
    expect_resent(&kit, &old, &again)?;
    ensure!(
        (again.header.uid, again.header.gid) == (old.header.uid, old.header.gid),
        "sent again with uid {}",
        again.header.uid
    );
    kit.answer(&again)?;
    let made = kit.serve(&app)?;
    ensure!(made == Ok(()), "mkdir gave {made:?}");
    let id = node(&kit, "made")?;
    kit.tree.node_mut(id).uid = 5;
    ensure!(
        owner(&mut kit, "made")? == 10_005 && owner(&mut kit, "f0")? == 10_000,
        "the ids are mapped otherwise after the recovery"
    );
    kit.check_counts()?;
    drop(tree);
    still_serves(&mut kit)
}

fn no_open(env: &Env<'_>) -> Result<()> {
    let flags = init::NO_OPEN_SUPPORT | init::NO_OPENDIR_SUPPORT;
    let mut kit = Kit::granted_with(env, Config::with(flags))?;
    kit.tree.no_open = true;
    populate(&mut kit, 2)?;
    let fds = [
        open(&mut kit, "f0", OFlag::O_RDWR)?,
        open(&mut kit, "f1", OFlag::O_RDWR)?,
    ];
    let names = kit.run_on("list", "", ops::listdir)?;
    ensure!(names == Ok(vec!["f0".into(), "f1".into()]), "{names:?}");
    kit.settle()?;
    let victim = node(&kit, "f1")?;
    lose(&mut kit, &[victim])?;
    let [good, bad] = fds;
    let read = kit.run("pread", move || ops::pread(good, 12, 0))?;
    ensure!(read == Ok(b"content of 0".to_vec()), "f0 reads {read:?}");
    let read = kit.run("pread", move || ops::pread(bad, 12, 0))?;
    expect_errno("the revoked file", read, Errno::EIO)?;
    let read = kit.run_on("read", "f0", ops::read_file)?;
    ensure!(read == Ok(b"content of 0".to_vec()), "f0 reads {read:?}");
    let names = kit.run_on("list", "", ops::listdir)?;
    ensure!(names == Ok(vec!["f0".into()]), "{names:?}");
    for fd in fds {
        kit.run("close", move || ops::close(fd))?.ok();
    }
    kit.settle()?;
    let handles = [op::OPEN, op::OPENDIR, op::RELEASE, op::RELEASEDIR];
    let asked = kit.served.iter().find(|m| handles.contains(&m.opcode()));
    ensure!(
        asked.is_none(),
        "the new server was sent {}",
        asked.map_or(String::new(), ToString::to_string)
    );
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn by_handle(kit: &mut Kit<'_>, mount: RawFd, handle: &rare::Handle) -> Result<Done<RawFd>> {
    let handle = handle.clone();
    kit.run("open_by_handle_at", move || {
        rare::open_by_handle(mount, &handle)
    })
}

fn handle(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::EXPORT_SUPPORT))?;
    populate(&mut kit, 1)?;
    let mount = open(&mut kit, "", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let handle = kit.run_on("name_to_handle_at", "f0", rare::name_to_handle)??;
    let file = node(&kit, "f0")?;
    for evicted in [false, true] {
        if evicted {
            evict(&mut kit, file)?;
        }
        let recovered = kit.recover()?;
        let shown = recovered.replays.iter().any(|r| r.nodeid == file);
        ensure!(shown != evicted, "evicted: {evicted}, replayed: {shown}");
        let fd = by_handle(&mut kit, mount, &handle)?;
        let fd = fd.with_context(|| format!("by its handle, evicted: {evicted}"))?;
        let read = kit.run("pread", move || ops::pread(fd, 12, 0))?;
        ensure!(read == Ok(b"content of 0".to_vec()), "f0 reads {read:?}");
        kit.run("close", move || ops::close(fd))??;
        kit.settle()?;
    }
    // The request to find it is with the dead server.
    evict(&mut kit, file)?;
    let wanted = handle.clone();
    let app = kit.app("open_by_handle_at", move || {
        rare::open_by_handle(mount, &wanted)
    })?;
    let old = kit.until("the lookup of .", |m| m.is_named(op::LOOKUP, "."))?;
    kit.recover()?;
    let again = kit.next_request()?;
    expect_resent(&kit, &old, &again)?;
    kit.answer(&again)?;
    let fd = kit.serve(&app)?.context("by its handle, while held")?;
    let read = kit.run("pread", move || ops::pread(fd, 12, 0))?;
    ensure!(read == Ok(b"content of 0".to_vec()), "f0 reads {read:?}");
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn handle_deep(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::granted_with(env, Config::with(init::EXPORT_SUPPORT))?;
    let a = kit.tree.dir(ROOT, "a");
    let b = kit.tree.dir(a, "b");
    let c = kit.tree.dir(b, "c");
    kit.tree.file(c, "x", b"");
    let mount = open(&mut kit, "", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let handle = kit.run_on("name_to_handle_at", "a/b/c", rare::name_to_handle)??;
    evict(&mut kit, a)?;
    kit.recover()?;
    let fd = by_handle(&mut kit, mount, &handle)?.context("by its handle")?;
    let inside = PathBuf::from(format!("/proc/self/fd/{fd}"));
    let names = kit.run("list", move || ops::listdir(&inside))?;
    ensure!(names == Ok(vec!["x".into()]), "a/b/c lists {names:?}");
    let path = std::fs::read_link(format!("/proc/self/fd/{fd}"))?;
    ensure!(path == kit.path("a/b/c"), "its path is {}", path.display());
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn handle_no_export(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let mount = open(&mut kit, "", OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    let handle = match kit.run_on("name_to_handle_at", "f0", rare::name_to_handle)? {
        Err(Errno::EOPNOTSUPP) => return skip("no handles without export support here"),
        other => other?,
    };
    let file = node(&kit, "f0")?;
    kit.recover()?;
    let fd = by_handle(&mut kit, mount, &handle)?.context("what is cached")?;
    kit.run("close", move || ops::close(fd))??;
    evict(&mut kit, file)?;
    kit.recover()?;
    let opened = by_handle(&mut kit, mount, &handle)?;
    expect_errno("what is not cached", opened, Errno::ESTALE)?;
    still_serves(&mut kit)
}

fn parallel_lookups(env: &Env<'_>, revoked: bool) -> Result<()> {
    let mut kit = populated(env, 1)?;
    let dir = kit.tree.dir(ROOT, "d");
    kit.tree.file(dir, "cold", b"");
    // The directory is known, the name in it is not.
    kit.run_on("stat", "d", ops::stat)?.context("stat d")?;
    let mut apps = Vec::new();
    let stat = |p: &Path| ops::stat_cached(p).map(drop);
    apps.push(kit.on("stat", "d/cold", stat)?);
    let old = kit.until("the lookup", |m| m.is_named(op::LOOKUP, "cold"))?;
    for _ in 0..7 {
        let app = kit.on("stat", "d/cold", stat)?;
        app.wait_asleep(kit.patience)?;
        apps.push(app);
    }
    if revoked {
        lose(&mut kit, &[dir])?;
        for app in apps {
            expect_errno("a lookup in it", kit.serve(&app)?, Errno::EIO)?;
        }
    } else {
        kit.recover()?;
        let again = kit.next_request()?;
        expect_resent(&kit, &old, &again)?;
        kit.answer(&again)?;
        kit.served.clear();
        for app in apps {
            let result = kit.serve(&app)?;
            ensure!(result == Ok(()), "a lookup gave {result:?}");
        }
        let more = kit.served.iter().filter(|m| m.is_named(op::LOOKUP, "cold"));
        // As ever, those who wait are woken before the entry has its time (d_splice_alias(), then
        // fuse_change_entry_timeout()), so each of them may find none yet and ask once. Then it has one.
        let more = more.count();
        ensure!(more <= 7, "the name was looked up {more} more times");
        kit.served.clear();
        let app = kit.on("stat again", "d/cold", stat)?;
        let result = kit.serve(&app)?;
        ensure!(result == Ok(()), "a lookup gave {result:?}");
        let late = kit.served.iter().find(|m| m.is_named(op::LOOKUP, "cold"));
        ensure!(late.is_none(), "the answer was not kept: {late:?}");
    }
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn refusal_said(env: &Env<'_>, config: Config) -> Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    use std::os::unix::fs::OpenOptionsExt;
    let mut log = std::fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/kmsg")
        .context("/dev/kmsg")?;
    log.seek(SeekFrom::End(0))?;
    let kit = Kit::mount(env, config)?;
    expect_errno::<()>("the probe", Err(kit.dev.probe()), Errno::EOPNOTSUPP)?;
    let recovery = kit.conn.recovery()?.context("no recovery file")?;
    ensure!(
        recovery.state() == "unsupported",
        "the state is {}",
        recovery.state()
    );
    let wanted = format!("connection {}", kit.conn.id);
    let mut line = vec![0; 8192];
    loop {
        match log.read(&mut line) {
            Ok(n) => {
                let text = String::from_utf8_lossy(&line[..n]);
                if text.contains(&wanted) && text.contains("not restartable") {
                    return Ok(());
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
            // Overwritten meanwhile: go on with what is there.
            Err(e) if e.raw_os_error() == Some(libc::EPIPE) => continue,
            Err(e) => return Err(e).context("reading the log"),
        }
    }
    anyhow::bail!("the log says nothing of {wanted}")
}
