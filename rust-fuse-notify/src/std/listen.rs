// SPDX-License-Identifier: GPL-2.0
//! Descriptors that a keeper (or systemd) hands on: `LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES`.

use std::env;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{fcntl, FcntlArg, FdFlag, OFlag};

/// Name under which the `/dev/fuse` descriptor is passed.
pub const NAME_DEVICE: &str = "fusedev";
/// Name under which the memfd of state is passed.
pub const NAME_STATE: &str = "fusestate";

/// First descriptor that is passed, as `sd_listen_fds(3)` has it.
const FIRST: RawFd = 3;
/// More than anybody passes; a bound against nonsense.
const MOST: RawFd = 1024;

/// Why no descriptors could be adopted.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Nobody passed anything.
    #[error("{0} is not set: start this server under a keeper (fuse-restart keep ... -- SERVER), or from a systemd unit with a descriptor store")]
    NotSet(&'static str),
    /// A variable that is no number, or one that cannot be.
    #[error("{name}={value:?} is not a number that makes sense")]
    NotANumber {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
    },
    /// The descriptors are for another process, say the shell that started this one.
    #[error("LISTEN_PID={listed}, but this process is {own}: the descriptors are for another one; start the server directly, not through a shell or wrapper")]
    OtherProcess {
        /// The process that they are for.
        listed: u32,
        /// This process.
        own: u32,
    },
    /// Not one name a descriptor.
    #[error("LISTEN_FDNAMES={names:?} names {named} descriptors, LISTEN_FDS says {count}")]
    Names {
        /// The variable's content.
        names: String,
        /// Names in it.
        named: usize,
        /// Descriptors passed.
        count: usize,
    },
    /// The descriptor with this name is missing.
    #[error("no descriptor is named {name:?} in LISTEN_FDNAMES={names:?}")]
    Missing {
        /// The name.
        name: &'static str,
        /// The variable's content.
        names: String,
    },
    /// Two with one name: which of them is meant?
    #[error("{name:?} stands twice in LISTEN_FDNAMES={names:?}")]
    Twice {
        /// The name.
        name: &'static str,
        /// The variable's content.
        names: String,
    },
    /// A number without a descriptor behind it.
    #[error("descriptor {fd}, which should be {name:?}, cannot be used: {errno}")]
    Closed {
        /// The number.
        fd: RawFd,
        /// Its name.
        name: String,
        /// What the kernel said.
        errno: Errno,
    },
    /// A descriptor that never waits: a server would spin on it.
    #[error("the descriptor {NAME_DEVICE:?} is non-blocking and cannot be made blocking: {0}")]
    NonBlocking(Errno),
}

/// What a server that runs under a keeper was given.
#[derive(Debug)]
pub struct Inherited {
    /// `/dev/fuse`, mounted already; blocking.
    pub device: OwnedFd,
    /// The memfd that survives this process.
    pub state: OwnedFd,
}

/// Whether descriptors were passed to this process at all, to tell "run under a keeper" from "run by hand".
pub fn is_passed() -> bool {
    env::var_os("LISTEN_FDS").is_some()
}

/// Takes the descriptors over: they become close-on-exec, others that were passed are closed, and the variables are
/// removed from the environment. Call it once, before any thread is started.
///
/// # Errors
/// [`ListenError`] says which variable or descriptor is wrong; descriptors are left as they were then, but the
/// variables are removed in any case.
pub fn adopt_from_environment() -> Result<Inherited, ListenError> {
    let [pid, count, names] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"].map(|name| {
        let value = env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        // What this server starts must not believe that they are meant for it.
        env::remove_var(name);
        value.ok_or(ListenError::NotSet(name))
    });
    let passed = plan(std::process::id(), &pid?, &count?, &names?)?;
    for (fd, name) in (FIRST..).zip(&passed.names) {
        // SAFETY: only asked whether it is open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).map_err(|errno| {
            ListenError::Closed {
                fd,
                name: name.clone(),
                errno,
            }
        })?;
    }
    // SAFETY: they are open, as was just seen, and by the protocol of LISTEN_FDS they are this process's to own;
    // the variables that say so are gone, so nobody can take them twice.
    let mut owned: Vec<_> = (FIRST..)
        .take(passed.names.len())
        .map(|fd| Some(unsafe { OwnedFd::from_raw_fd(fd) }))
        .collect();
    let (Some(device), Some(state)) = (owned[passed.device].take(), owned[passed.state].take())
    else {
        // `plan` has seen that the two are different ones.
        unreachable!("one descriptor with two names");
    };
    make_blocking(&device).map_err(ListenError::NonBlocking)?;
    Ok(Inherited { device, state })
}

/// A description shared with an event loop may be non-blocking; a server that reads in a loop would spin on it.
fn make_blocking(device: &OwnedFd) -> Result<(), Errno> {
    let flags = OFlag::from_bits_retain(fcntl(device, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_NONBLOCK) {
        fcntl(device, FcntlArg::F_SETFL(flags & !OFlag::O_NONBLOCK))?;
    }
    Ok(())
}

/// What the variables say.
#[derive(Debug, PartialEq, Eq)]
struct Passed {
    names: Vec<String>,
    device: usize,
    state: usize,
}

fn plan(own: u32, pid: &str, count: &str, names: &str) -> Result<Passed, ListenError> {
    let number = |name, value: &str, max: u32| {
        let bad = || ListenError::NotANumber {
            name,
            value: value.to_owned(),
        };
        value
            .parse()
            .ok()
            .filter(|number| (1..=max).contains(number))
            .ok_or_else(bad)
    };
    let listed = number("LISTEN_PID", pid, u32::MAX)?;
    if listed != own {
        return Err(ListenError::OtherProcess { listed, own });
    }
    let count = number("LISTEN_FDS", count, MOST as u32)? as usize;
    let list: Vec<String> = names.split(':').map(str::to_owned).collect();
    if list.len() != count {
        return Err(ListenError::Names {
            names: names.to_owned(),
            named: list.len(),
            count,
        });
    }
    let find = |name: &'static str| {
        let mut at = list
            .iter()
            .enumerate()
            .filter(|(_, other)| *other == name)
            .map(|(at, _)| at);
        match (at.next(), at.next()) {
            (Some(at), None) => Ok(at),
            (None, _) => Err(ListenError::Missing {
                name,
                names: names.to_owned(),
            }),
            _ => Err(ListenError::Twice {
                name,
                names: names.to_owned(),
            }),
        }
    };
    let (device, state) = (find(NAME_DEVICE)?, find(NAME_STATE)?);
    Ok(Passed {
        names: list,
        device,
        state,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn variables_that_make_sense() {
        let passed = plan(7, "7", "3", "x:fusestate:fusedev").unwrap();
        assert_eq!((passed.device, passed.state), (2, 1));
    }

    #[test]
    fn variables_that_do_not() {
        use ListenError::*;
        assert!(matches!(
            plan(7, "8", "2", "fusedev:fusestate"),
            Err(OtherProcess { listed: 8, own: 7 })
        ));
        assert!(matches!(
            plan(7, "x", "2", ""),
            Err(NotANumber {
                name: "LISTEN_PID",
                ..
            })
        ));
        for count in ["", "-1", "0", "1025", "99999999999"] {
            assert!(
                matches!(
                    plan(7, "7", count, "a"),
                    Err(NotANumber {
                        name: "LISTEN_FDS",
                        ..
                    })
                ),
                "{count}"
            );
        }
        assert!(matches!(
            plan(7, "7", "2", "fusedev"),
            Err(Names {
                named: 1,
                count: 2,
                ..
            })
        ));
        assert!(matches!(
            plan(7, "7", "1", "fusedev"),
            Err(Missing {
                name: NAME_STATE,
                ..
            })
        ));
        assert!(matches!(
            plan(7, "7", "3", "fusedev:fusestate:fusedev"),
            Err(Twice {
                name: NAME_DEVICE,
                ..
            })
        ));
    }

    /// Runs in a child of the test below, where nothing else has descriptors 3 and up.
    #[test]
    #[ignore = "run by a_child_adopts"]
    fn child() {
        // The parent could not know the id of this process before it was there.
        env::set_var("LISTEN_PID", std::process::id().to_string());
        match adopt_from_environment() {
            Ok(inherited) => {
                assert!(!is_passed() && env::var_os("LISTEN_FDNAMES").is_none());
                for fd in [&inherited.device, &inherited.state] {
                    assert_eq!(fcntl(fd, FcntlArg::F_GETFD), Ok(libc::FD_CLOEXEC));
                }
                let flags =
                    OFlag::from_bits_retain(fcntl(&inherited.device, FcntlArg::F_GETFL).unwrap());
                assert!(!flags.contains(OFlag::O_NONBLOCK));
                println!("ADOPTED");
            }
            Err(error) => println!("REFUSED {error}"),
        }
    }

    fn run_child(redirect: &str) -> String {
        let script = format!(
            "exec \"$0\" --ignored --exact --nocapture std::listen::tests::child {redirect}"
        );
        let output = Command::new("/bin/sh")
            .args(["-c", &script])
            .arg(env::current_exe().unwrap())
            .env("LISTEN_FDS", "2")
            .env("LISTEN_FDNAMES", "fusedev:fusestate")
            .output()
            .unwrap();
        format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    }

    #[test]
    fn a_child_adopts() {
        let output = run_child("3</dev/null 4</dev/zero");
        assert!(output.contains("ADOPTED"), "{output}");
    }

    #[test]
    fn a_child_without_descriptors_refuses() {
        let output = run_child("3</dev/null 4<&-");
        assert!(
            output.contains("REFUSED descriptor 4, which should be \"fusestate\""),
            "{output}"
        );
    }
}
