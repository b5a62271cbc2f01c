// SPDX-License-Identifier: GPL-2.0
//! QEMU: the host's files are a 9p root, the kernel's log is the serial line,
//! a virtio port is ours.

use super::{accel, append, virtio_channel, Backend, Guest};
use crate::guest::{Channel, PORT};
use crate::kernel::Built;
use crate::paths::Paths;
use anyhow::Result;
use std::process::Command;

pub const QEMU: &str = "qemu-system-x86_64";

pub struct Qemu {
    pub kvm: bool,
}

impl Qemu {
    /// With KVM if a guest really boots with it on this machine.
    pub fn choose(paths: &Paths, kernel: &Built) -> Result<Qemu> {
        crate::setup::need_qemu()?;
        Ok(Qemu {
            kvm: accel::kvm_boots(paths, kernel)?,
        })
    }
}

impl Backend for Qemu {
    fn describe(&self) -> String {
        if self.kvm { "qemu-kvm" } else { "qemu-tcg" }.into()
    }

    fn channel(&self) -> Channel {
        virtio_channel()
    }

    /// `-no-reboot` makes a reboot the end, and that needs no ACPI.
    fn power_off(&self) -> bool {
        false
    }

    fn command(&self, g: &Guest) -> Result<Command> {
        let mut c = Command::new(QEMU);
        c.args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-machine",
            "q35",
        ]);
        // la57=off: with five-level page tables KASAN takes per-CPU data for wild
        // memory at boot, reports that, and then no more.
        if g.icount {
            c.args([
                "-accel",
                "tcg,thread=single",
                "-icount",
                "shift=0,sleep=off",
                "-cpu",
                "max,la57=off",
                "-smp",
                "1",
            ]);
        } else if self.kvm {
            c.args(["-accel", "kvm", "-cpu", "host", "-smp", &g.cpus.to_string()]);
        } else {
            c.args([
                "-accel",
                "tcg,thread=multi",
                "-cpu",
                "max,la57=off",
                "-smp",
                &g.cpus.to_string(),
            ]);
        }
        c.args(["-m", &format!("{}M", g.mem)])
            .arg("-kernel")
            .arg(g.image)
            .arg("-append")
            // no_timer_check: on a busy host the emulated timer ticks too late
            // for the kernel's patience, and it panics.
            .arg(format!(
                "console=ttyS0 no_timer_check root=hostroot rootfstype=9p \
                 rootflags=trans=virtio,version=9p2000.L,msize=262144,cache=loose,access=any ro {}",
                append(g)
            ))
            .args([
                "-chardev",
                &format!("file,id=log,path={}", comma(&g.log.display().to_string())),
            ])
            .args(["-serial", "chardev:log"])
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", &format!("socket,id=line,fd={}", g.channel_fd)])
            .args([
                "-device",
                &format!("virtserialport,chardev=line,name={PORT}"),
            ])
            .args([
                "-fsdev",
                "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
            ])
            .args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=hostroot"])
            .args(["-device", "virtio-rng-pci"]);
        Ok(c)
    }
}

/// QEMU's option syntax wants commas doubled.
fn comma(text: &str) -> String {
    text.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn args(kvm: bool, icount: bool) -> String {
        let g = Guest {
            image: Path::new("/k"),
            mem: 512,
            cpus: 2,
            icount,
            run_dir: Path::new("/r"),
            log: Path::new("/r/a,b"),
            exe: Path::new("/exe"),
            channel_fd: 7,
            append: &["extra=1".into()],
        };
        let c = Qemu { kvm }.command(&g).unwrap();
        c.get_args()
            .map(|a| a.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn the_root_is_read_only() {
        for a in [args(false, false), args(true, false), args(false, true)] {
            assert!(a.contains("path=/,security_model=none,readonly=on"), "{a}");
            assert!(a.contains("fuse_restart_job=/r/job.json extra=1"), "{a}");
            assert!(a.contains("path=/r/a,,b"), "{a}");
        }
    }

    #[test]
    fn icount_is_one_cpu_emulated_whatever_else_is_said() {
        let a = args(true, true);
        assert!(
            a.contains("-icount shift=0,sleep=off") && a.contains("-smp 1") && !a.contains("kvm"),
            "{a}"
        );
    }
}
