//! Becoming less: ids dropped, nothing gained by exec, no core dump with a key in it.
//!
//! The child is started before any of this: qmail-queue is setuid, and `no_new_privs` is inherited.

use std::io;

use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

/// Drops supplementary groups, group and user, where one is given (TLS_UID, TLS_GID, as skarnet's programs).
///
/// # Errors
/// The system call's; the caller must not go on then.
pub fn become_user(uid: Option<u32>, gid: Option<u32>) -> io::Result<()> {
    if uid.is_some() || gid.is_some() {
        setgroups(&gid.map(Gid::from_raw).into_iter().collect::<Vec<_>>())?;
    }
    if let Some(gid) = gid {
        setgid(Gid::from_raw(gid))?;
    }
    if let Some(uid) = uid {
        setuid(Uid::from_raw(uid))?;
    }
    Ok(())
}

/// No new privileges, no core dump, no debugger of the same user.
///
/// # Errors
/// The system call's.
pub fn harden() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}
