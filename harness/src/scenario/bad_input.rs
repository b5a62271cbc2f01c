// SPDX-License-Identifier: GPL-2.0
//! Bad input: every wrong notification gets its own error, changes nothing, and the connection goes on.

use anyhow::{ensure, Context, Result};
use nix::errno::Errno;
use nix::sys::stat::{makedev, mknod, Mode, SFlag};
use zerocopy::IntoBytes;

use super::help::{enter, expect_errno, populated, still_serves, Phase};
use super::{Needs, Scenario};
use crate::raw::dev::{Device, Read1};
use crate::raw::env::{skip, Env};
use crate::raw::kit::{Config, Kit, IDENTITY};
use crate::raw::ops;
use crate::raw::wire::{
    init, notify, op, CuseInitOut, OutHeader, RestartedOut, COOKIE_BIT, RESTARTED_COMMIT,
};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario::series(
            "bad-input/wrong-size",
            "a notification of the wrong size is EINVAL",
            wrong_size,
        ),
        Scenario::series(
            "bad-input/unknown-flags",
            "an unknown flag is EINVAL",
            unknown_flags,
        ),
        Scenario::series(
            "bad-input/cookie",
            "a cookie without bit 62 could be a request's id: EINVAL",
            bad_cookie,
        ),
        Scenario::series(
            "bad-input/probe",
            "COMMIT while serving is ESTALE and changes nothing",
            probe,
        ),
        Scenario::series(
            "bad-input/commit-early",
            "COMMIT before the report is ESTALE, in every phase",
            commit_early,
        ),
        Scenario::series(
            "bad-input/commit-old",
            "COMMIT of another epoch is ESTALE",
            commit_old,
        ),
        Scenario::series(
            "bad-input/commit-twice",
            "the second COMMIT of one report is ESTALE",
            commit_twice,
        ),
        Scenario::series(
            "bad-input/before-init",
            "no notification before INIT: EINVAL",
            before_init,
        ),
        Scenario::series(
            "bad-input/after-abort",
            "no notification after abort",
            after_abort,
        ),
        Scenario::series(
            "bad-input/unsigned",
            "a connection that did not sign is EOPNOTSUPP",
            unsigned,
        ),
        Scenario::series(
            "bad-input/cuse",
            "CUSE connections have nothing to replay: EOPNOTSUPP",
            cuse,
        ),
        Scenario::series(
            "bad-input/passthrough",
            "not granted together with FUSE_PASSTHROUGH",
            passthrough,
        ),
        Scenario::series(
            "bad-input/minor",
            "not granted to a server whose attributes are shorter than what a replay expects",
            minor,
        ),
        Scenario::series(
            "bad-input/io-uring",
            "not granted together with FUSE_OVER_IO_URING",
            io_uring,
        ),
        Scenario::new(
            "bad-input/old-kernel",
            Needs::Stock,
            "an old kernel says EINVAL to the probe",
            old_kernel,
        ),
        Scenario::new(
            "bad-input/ordinary-replies",
            Needs::Nothing,
            "wrong replies do not end a connection",
            replies,
        ),
    ]
}

pub(super) fn good() -> RestartedOut {
    RestartedOut {
        cookie: COOKIE_BIT | 9,
        identity: IDENTITY,
        ..Default::default()
    }
}

/// The state before and after must be the same, and the connection must work.
pub(super) fn untouched(
    env: &Env<'_>,
    attack: impl FnOnce(&mut Kit<'_>) -> Result<()>,
) -> Result<()> {
    let mut kit = populated(env, 3)?;
    let before = kit.conn.recovery()?;
    attack(&mut kit)?;
    let after = kit.conn.recovery()?;
    ensure!(
        before == after,
        "the recovery file changed from {before:?} to {after:?}"
    );
    ensure!(
        !kit.readable()?,
        "something can be read though nothing was accepted"
    );
    still_serves(&mut kit)?;
    kit.check_counts()?;
    still_serves(&mut kit)
}

fn wrong_size(env: &Env<'_>) -> Result<()> {
    untouched(env, |kit| {
        let whole = [good().as_bytes(), &[0; 64]].concat();
        for size in [0, 1, 8, 16, 24, 31, 33, 40, 64, 96] {
            let header = OutHeader {
                len: 16 + size as u32,
                error: notify::RESTARTED,
                unique: 0,
            };
            let written = kit
                .dev
                .write_raw(&[header.as_bytes(), &whole[..size]].concat());
            expect_errno(
                &format!("a RESTARTED of {size} bytes"),
                written,
                Errno::EINVAL,
            )?;
        }
        let lies = OutHeader {
            len: 48,
            error: notify::RESTARTED,
            unique: 0,
        };
        let written = kit.dev.write_raw(&[lies.as_bytes(), &whole[..31]].concat());
        expect_errno(
            "a header that lies about the length",
            written,
            Errno::EINVAL,
        )
    })
}

fn unknown_flags(env: &Env<'_>) -> Result<()> {
    untouched(env, |kit| {
        for bit in 1..32 {
            for commit in [0, RESTARTED_COMMIT] {
                let out = RestartedOut {
                    flags: (1 << bit) | commit,
                    ..good()
                };
                expect_errno(
                    &format!("flag {bit}"),
                    kit.dev.restarted(out),
                    Errno::EINVAL,
                )?;
            }
        }
        Ok(())
    })
}

fn bad_cookie(env: &Env<'_>) -> Result<()> {
    untouched(env, |kit| {
        for cookie in [0, 1, 2, !COOKIE_BIT, 1 << 63] {
            for flags in [0, RESTARTED_COMMIT] {
                let out = RestartedOut {
                    cookie,
                    flags,
                    ..good()
                };
                expect_errno(
                    &format!("cookie {cookie:#x}"),
                    kit.dev.restarted(out),
                    Errno::EINVAL,
                )?;
            }
        }
        Ok(())
    })
}

fn probe(env: &Env<'_>) -> Result<()> {
    untouched(env, |kit| {
        for epoch in [0, 1, u32::MAX] {
            for identity in [IDENTITY, [0; 2], [5; 2]] {
                let out = RestartedOut {
                    flags: RESTARTED_COMMIT,
                    epoch,
                    identity,
                    ..good()
                };
                expect_errno(
                    &format!("COMMIT of epoch {epoch} while serving"),
                    kit.dev.restarted(out),
                    Errno::ESTALE,
                )?;
            }
        }
        ensure!(
            kit.dev.probe() == Errno::ESTALE,
            "the probe says {}",
            kit.dev.probe()
        );
        Ok(())
    })
}

fn commit_early(env: &Env<'_>) -> Result<()> {
    for phase in [Phase::Said, Phase::Root, Phase::Replay, Phase::Refused] {
        let mut kit = populated(env, 3)?;
        enter(&mut kit, phase)?;
        let epoch = kit.epoch;
        expect_errno(
            &format!("COMMIT in {phase:?}"),
            kit.commit_epoch(epoch),
            Errno::ESTALE,
        )?;
        ensure!(
            kit.dev.probe() == Errno::ESTALE,
            "the probe in {phase:?} says {}",
            kit.dev.probe()
        );
        kit.recover()
            .with_context(|| format!("a recovery after a refused COMMIT in {phase:?}"))?;
        still_serves(&mut kit)?;
    }
    Ok(())
}

fn commit_old(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    kit.recover()?;
    kit.restarted()?;
    kit.restarted()?;
    let recovered = kit.answer_replays(&mut |_, _| None)?;
    ensure!(
        recovered.report.epoch == 3,
        "three RESTARTEDs make epoch {}",
        recovered.report.epoch
    );
    for epoch in [0, 1, 2, 4, 3 + 256, u32::MAX] {
        expect_errno(
            &format!("COMMIT of epoch {epoch} in epoch 3"),
            kit.commit_epoch(epoch),
            Errno::ESTALE,
        )?;
    }
    let wrong = RestartedOut {
        cookie: kit.cookie(),
        flags: RESTARTED_COMMIT,
        epoch: 3,
        identity: [7; 2],
    };
    expect_errno(
        "COMMIT by another file system",
        kit.dev.restarted(wrong),
        Errno::ESTALE,
    )?;
    kit.conn
        .wait_state(&["prepared"], kit.patience)
        .context("a refused COMMIT must change nothing")?;
    kit.commit(&recovered)?;
    still_serves(&mut kit)
}

fn commit_twice(env: &Env<'_>) -> Result<()> {
    let mut kit = populated(env, 3)?;
    kit.recover()?;
    let epoch = kit.epoch;
    expect_errno("the second COMMIT", kit.commit_epoch(epoch), Errno::ESTALE)?;
    still_serves(&mut kit)
}

fn before_init(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::mount(
        env,
        Config {
            answer_init: false,
            ..Default::default()
        },
    )?;
    expect_errno(
        "RESTARTED before INIT was read",
        kit.dev.restarted(good()),
        Errno::EINVAL,
    )?;
    let m = kit.read_init()?;
    expect_errno(
        "RESTARTED before INIT was answered",
        kit.dev.restarted(good()),
        Errno::EINVAL,
    )?;
    ensure!(
        kit.dev.probe() == Errno::EINVAL,
        "the probe before INIT says {}",
        kit.dev.probe()
    );
    kit.answer_init(&m)?;
    ensure!(
        kit.dev.probe() == Errno::ESTALE,
        "the probe after INIT says {}",
        kit.dev.probe()
    );
    still_serves(&mut kit)
}

fn after_abort(env: &Env<'_>) -> Result<()> {
    let kit = populated(env, 3)?;
    kit.conn.abort()?;
    for out in [
        good(),
        RestartedOut {
            flags: RESTARTED_COMMIT,
            ..good()
        },
    ] {
        let said = kit.dev.restarted(out);
        let fine = matches!(said, Err(Errno::EINVAL | Errno::ENODEV));
        ensure!(
            fine,
            "after abort RESTARTED gave {said:?}, not EINVAL or ENODEV"
        );
    }
    Ok(())
}

fn unsigned(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::mount(env, Config::unsigned())?;
    still_serves(&mut kit)?;
    expect_errno("RESTARTED", kit.dev.restarted(good()), Errno::EOPNOTSUPP)?;
    ensure!(
        kit.dev.probe() == Errno::EOPNOTSUPP,
        "the probe says {}",
        kit.dev.probe()
    );
    let recovery = kit.conn.recovery()?.context("no `recovery` file")?;
    ensure!(
        recovery.state() == "unsupported",
        "the state is {:?}",
        recovery.state()
    );
    // A parked request must not have been disturbed either.
    kit.tree.file(1, "parked", b"");
    let app = kit.on("stat", "parked", |p| ops::stat(p).map(drop))?;
    let m = kit.until_op(op::LOOKUP)?;
    expect_errno(
        "RESTARTED with a request under way",
        kit.dev.restarted(good()),
        Errno::EOPNOTSUPP,
    )?;
    kit.answer(&m)?;
    ensure!(kit.serve(&app)? == Ok(()), "the parked stat failed");
    still_serves(&mut kit)
}

fn cuse(env: &Env<'_>) -> Result<()> {
    let node = nix::unistd::mkdtemp(&env.scratch.join("cuse.XXXXXX"))?;
    let path = node.join("cuse");
    mknod(
        &path,
        SFlag::S_IFCHR,
        Mode::from_bits_truncate(0o600),
        makedev(10, 203),
    )
    .context("mknod")?;
    let opened = Device::open(&path.display().to_string());
    let _ = std::fs::remove_dir_all(&node);
    let mut dev = match opened {
        Ok(dev) => dev,
        Err(e) => return skip(format!("no CUSE in this kernel: {e}")),
    };
    let said = dev.restarted(good());
    let early = matches!(said, Err(Errno::EOPNOTSUPP | Errno::EINVAL));
    ensure!(early, "RESTARTED on CUSE before CUSE_INIT gave {said:?}");
    let Read1::Message(m) = dev.read_blocking()? else {
        anyhow::bail!("no CUSE_INIT")
    };
    ensure!(m.is(op::CUSE_INIT), "expected CUSE_INIT, got {m}");
    let out = CuseInitOut {
        major: 7,
        minor: 40,
        max_read: 4096,
        max_write: 4096,
        ..Default::default()
    };
    let name = format!("DEVNAME=fuse-restart-{}\0", std::process::id());
    dev.reply_ok(m.unique(), &[out.as_bytes(), name.as_bytes()].concat())
        .context("CUSE_INIT was not accepted")?;
    for identity in [[0; 2], IDENTITY] {
        let out = RestartedOut { identity, ..good() };
        expect_errno("RESTARTED on CUSE", dev.restarted(out), Errno::EOPNOTSUPP)?;
    }
    ensure!(
        dev.probe() == Errno::EOPNOTSUPP,
        "the probe on CUSE says {}",
        dev.probe()
    );
    Ok(())
}

fn passthrough(env: &Env<'_>) -> Result<()> {
    if !env.support.passthrough {
        return skip("this kernel has no FUSE_PASSTHROUGH");
    }
    let mut kit = Kit::mount(
        env,
        Config {
            max_stack_depth: 1,
            ..Config::with(init::PASSTHROUGH)
        },
    )?;
    not_granted(&mut kit)
}

/// Switches FUSE over io_uring on for as long as this lives; the default of kernels is off.
pub(super) struct Uring {
    was: String,
}

const ENABLE_URING: &str = "/sys/module/fuse/parameters/enable_uring";

impl Uring {
    pub(super) fn on() -> Result<Uring> {
        let Ok(was) = std::fs::read_to_string(ENABLE_URING) else {
            return skip("this kernel has no FUSE over io_uring");
        };
        std::fs::write(ENABLE_URING, "Y")
            .with_context(|| format!("cannot write {ENABLE_URING}"))?;
        Ok(Uring { was })
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let _ = std::fs::write(ENABLE_URING, self.was.trim());
    }
}

fn io_uring(env: &Env<'_>) -> Result<()> {
    let _on = Uring::on()?;
    let kit = Kit::mount(env, Config::with(init::OVER_IO_URING))?;
    ensure!(
        kit.offered & init::OVER_IO_URING != 0,
        "io_uring is on, yet not offered"
    );
    // No operation is tried: this connection waits for a ring that nobody sets up.
    ensure!(
        kit.dev.probe() == Errno::EOPNOTSUPP,
        "the probe says {}",
        kit.dev.probe()
    );
    Ok(())
}

fn not_granted(kit: &mut Kit<'_>) -> Result<()> {
    cannot_be_recovered(kit)?;
    still_serves(kit)
}

fn cannot_be_recovered(kit: &Kit<'_>) -> Result<()> {
    ensure!(
        kit.dev.probe() == Errno::EOPNOTSUPP,
        "the probe says {}",
        kit.dev.probe()
    );
    expect_errno("RESTARTED", kit.dev.restarted(good()), Errno::EOPNOTSUPP)
}

/// Nothing else is asked of it: what it would have to answer is not what this kit speaks.
fn minor(env: &Env<'_>) -> Result<()> {
    let kit = Kit::mount(
        env,
        Config {
            minor: 8,
            ..Config::default()
        },
    )?;
    cannot_be_recovered(&kit)
}

fn old_kernel(env: &Env<'_>) -> Result<()> {
    // The kernel did not offer the flag; a server that returns it anyway must not be harmed either.
    for config in [Config::unsigned(), Config::default()] {
        let mut kit = Kit::mount(env, config)?;
        ensure!(
            kit.dev.probe() == Errno::EINVAL,
            "the probe says {}",
            kit.dev.probe()
        );
        expect_errno("RESTARTED", kit.dev.restarted(good()), Errno::EINVAL)?;
        ensure!(
            kit.conn.recovery()?.is_none(),
            "an old kernel has a `recovery` file"
        );
        still_serves(&mut kit)?;
    }
    Ok(())
}

/// Wrong replies of an ordinary server: they are the kit's own proof that it can be wrong and go on.
fn replies(env: &Env<'_>) -> Result<()> {
    let mut kit = Kit::mount(env, Config::unsigned())?;
    kit.tree.file(1, "a", b"a");
    let app = kit.on("stat", "a", |p| ops::stat(p).map(drop))?;
    let m = kit.until_op(op::LOOKUP)?;
    expect_errno(
        "a reply to nobody",
        kit.dev.reply_ok(m.unique() + 1000, &[0; 128]),
        Errno::ENOENT,
    )?;
    expect_errno(
        "an error that is none",
        kit.dev.reply_error(m.unique(), 1000),
        Errno::EINVAL,
    )?;
    let lies = OutHeader {
        len: 99,
        error: 0,
        unique: m.unique(),
    };
    expect_errno(
        "a header that lies",
        kit.dev.write_raw(lies.as_bytes()),
        Errno::EINVAL,
    )?;
    ensure!(!app.done(), "the application was answered by a wrong reply");
    // A payload of the wrong length does end this one request, with EIO.
    expect_errno(
        "a short entry",
        kit.dev.reply_ok(m.unique(), &[0; 20]),
        Errno::EINVAL,
    )?;
    expect_errno("stat", kit.serve(&app)?, Errno::EIO)?;
    expect_errno(
        "a second answer",
        kit.dev.reply_error(m.unique(), libc::ENOENT),
        Errno::ENOENT,
    )?;
    still_serves(&mut kit)
}
